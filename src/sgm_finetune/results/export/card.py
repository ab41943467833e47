"""The model card (README.md) of an export: what it is, what it was trained on, what it scores, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from sgm_finetune.measure.plan_file import parse_plan
from sgm_finetune.measure.plan_summary import describe_plan
from sgm_finetune.results.load import Result
from sgm_finetune.results.metrics import MEASURES, Measure

Format = Literal["adapter", "merged", "gguf"]

_PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
}
"""The hub's names of tasks."""
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def model_card(result: Result, to: Format, comparison: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of README.md. `files`: what the folder holds of use, by role (`gguf`, `modelfile`)."""
    config, metrics = result.config, result.metrics
    hub_id = hub_model(config.model.name)
    data = ModelCardData(
        base_model=hub_id,
        library_name={"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[to],
        pipeline_tag=_PIPELINES.get(config.model.task),
        tags=["sgm-finetune", "lora"] + ["gguf"] * (to == "gguf"),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title(result)}",
        f"`{base_name(config.model.name)}`, fine-tuned with sgm-finetune by spectral gradient merging (LoRA, some "
        f"of whose factors are shared by matrices), task `{config.model.task}`.",
        _contents(result, to, comparison),
        f"## Data\n\n{metrics.get('data') or base_name(config.data.name or config.data.train or 'unknown')}",
        _scores(metrics),
        f"## How it is used\n\n{_usage(result, to, files)}",
        _training(result),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n").content


def hub_model(name: str) -> str | None:
    """The name, where others can have the model by it: a hub id."""
    return name if name.count("/") == 1 and not Path(name).expanduser().exists() and not name.startswith(".") else None


def base_name(path: str) -> str:
    """A hub id as it is, of a path its last part alone.

    >>> base_name("owner/model"), base_name("/home/me/models/mine")
    ('owner/model', 'mine')
    """
    return path if hub_model(path) else path.rstrip("/").rpartition("/")[2]


def title(result: Result) -> str:
    data = result.config.data
    return f"{base_name(result.config.model.name)}, trained on {base_name(data.name or data.train or 'data')}"


def _contents(result: Result, to: Format, comparison: Mapping[str, Any]) -> str:
    quantised = result.config.model.quantization
    lines = {
        "adapter": "A PEFT adapter: the update alone. It needs the base model.",
        "merged": "The whole model: the update added to the base's own weights, each rounded once to its type.",
        "gguf": "The whole model in one GGUF file: the update added to the base's own weights.",
    }
    text = [lines[to]]
    if quantised != "none":
        text.append(
            f"The base was held in {quantised} while it was trained; here it is as published, so the scores below, "
            f"which were measured on the {quantised} base, can differ a little."
        )
    text.append(
        f"Loaded again by {comparison['by']}, its logits differ from those of the unquantised base with the update "
        f"by {comparison['difference']:.1e} (relative norm, {comparison['num_positions']} positions); the largest "
        f"logit is the same in {comparison['top_agreement']:.0%} of them."
    )
    return "\n".join(text)


def _scores(metrics: Mapping[str, Any]) -> str:
    before, after = metrics.get("before", {}), metrics.get("after", {})
    rows = [
        f"| {measure.name} | {_number(before.get(measure.key), measure)} | {_number(after[measure.key], measure)} |"
        for measure in MEASURES
        if measure.key in after
    ]
    if not rows:
        return ""
    return "\n".join(["## Scores on test data", "", "| | before | after |", "|---|---|---|", *rows])


def _number(value: float | None, measure: Measure) -> str:
    return "–" if value is None else f"{value:.{measure.digits}f}"


def _usage(result: Result, to: Format, files: Mapping[str, str]) -> str:
    auto = _AUTO[result.config.model.task]
    base = base_name(result.config.model.name)
    labels = ""
    if result.config.model.task.endswith("classification"):
        count = len(result.labels) or 1
        labels = f", num_labels={count}"
    match to:
        case "adapter":
            lines = [
                "```python",
                "from peft import PeftModel",
                f"from transformers import AutoTokenizer, {auto}",
                "",
                f'base = {auto}.from_pretrained("{base}"{labels})',
                'model = PeftModel.from_pretrained(base, "this-folder")',
                'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
                "```",
            ]
        case "merged":
            lines = [
                "```python",
                f"from transformers import AutoTokenizer, {auto}",
                "",
                f'model = {auto}.from_pretrained("this-folder")',
                'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
                "```",
            ]
        case "gguf":
            lines = [
                "```bash",
                f"llama-cli -m {files['gguf']}                 # llama.cpp",
                "ollama create my-model -f Modelfile && ollama run my-model",
                "```",
            ]
    if result.labels:
        lines += ["", f"Labels: {', '.join(result.labels)}."]
    return "\n".join(lines)


def _training(result: Result) -> str:
    metrics, config = result.metrics, result.config
    plan = parse_plan(result.content["plan"], str(result.path))
    lines = [
        "## How it was trained",
        "",
        f"- plan: {describe_plan(plan)}",
        f"- rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, base in {config.model.quantization}",
    ]
    if "steps" in metrics:
        lines.append(
            f"- {metrics['steps']} steps of {config.training.batch_size} examples, optimizer {metrics['optimizer']}, "
            f"learning rate {metrics['learning_rate']:g}, seed {config.training.seed}"
        )
    versions = {k: v for k, v in metrics.get("environment", {}).items() if k != "device"}
    versions = versions or {name: version(name) for name in ("sgm-finetune", "torch", "transformers", "peft")}
    lines.append(f"- {', '.join(f'{name} {number}' for name, number in versions.items())}")
    return "\n".join(lines)
