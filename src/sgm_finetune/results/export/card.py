"""The model card (README.md) of an export: contents, data, scores, use and training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sgm_finetune.base.config import HEAD_TASKS
from sgm_finetune.base.text import printable
from sgm_finetune.measure.plan_file import parse_plan
from sgm_finetune.measure.plan_summary import describe_plan
from sgm_finetune.results.answers import generates_text
from sgm_finetune.results.export.target import ADAPTERS, ExportFormat, hub_model
from sgm_finetune.results.load import Result
from sgm_finetune.results.metric_names import METRICS, Metric
from sgm_finetune.results.report.usage import head_arguments

_PIPELINES = {
    "causal-lm": "text-generation",
    "preference": "text-generation",
    "reward": "text-classification",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
}
"""Task -> the hub's name for it."""
_SERVED = {
    "bnb-4bit": ("```bash", "vllm serve this-folder  # needs bitsandbytes", "```", ""),
    "compressed-tensors": ("```bash", "vllm serve this-folder", "```", ""),
}
"""Format -> the command that serves a model that generates."""
_LOADED = {
    "bnb-4bit": ', device_map="auto")  # needs bitsandbytes',
    "compressed-tensors": ', device_map="auto")  # needs compressed-tensors',
}
"""Format -> the rest of the line that loads it with Transformers."""
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def model_card(result: Result, to: ExportFormat, comparison: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Returns the text of README.md. `comparison` is what the check measured; `files` maps roles (`gguf`) to names."""
    config, metrics = result.config, result.metrics
    hub_id = hub_model(config.model.name)
    model, trained_on = _names(result)
    data = ModelCardData(
        base_model=hub_id,
        library_name="peft" if to == "adapter" else "gguf" if to.startswith("gguf") else "transformers",
        pipeline_tag=_PIPELINES.get(config.model.task),
        tags=[
            "sgm-finetune",
            *(["lora"] if to in ADAPTERS or not result.is_full else []),
            *(["gguf"] if to.startswith("gguf") else []),
        ],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {model}, trained on {trained_on}",
        f"{model}, fine-tuned for the task `{config.model.task}` with sgm-finetune "
        + (
            "by training chosen matrices whole."
            if result.is_full
            else "by spectral gradient merging: LoRA in which some matrices share factors."
        ),
        _contents(result, to, comparison),
        f"## Data\n\n{code(str(metrics['data'])) if metrics.get('data') else trained_on}",
        _scores(metrics),
        f"## How to use it\n\n{_usage(result, to, files)}",
        _describe_training(result),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n").content


def base_name(path: str) -> str:
    """Returns a hub id unchanged, or the last part of a path.

    >>> base_name("owner/model"), base_name("/home/me/models/mine")
    ('owner/model', 'mine')
    """
    return path if hub_model(path) else path.rstrip("/").rpartition("/")[2]


def code(text: str) -> str:
    """Returns `text` as inline code of Markdown, which shows it as it is: no markup, HTML or link in it counts.

    Every name, label and description that comes from a file stands in a card like this.

    >>> print(code("<b>[a](b)</b>\\n# c"))
    `<b>[a](b)</b> # c`
    >>> print(code("a``b`"))
    ``` a``b` ```
    """
    line = printable(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _names(result: Result) -> tuple[str, str]:
    """Returns the base model and the training data as the card names them."""
    data = result.config.data
    sources = [code(base_name(one.name or one.train or "data")) for one in data.sources]
    return code(base_name(result.config.model.name)), ", ".join(sources)


def _contents(result: Result, to: ExportFormat, comparison: Mapping[str, Any]) -> str:
    quantised = result.config.model.quantization
    kinds = {
        "adapter": "This is a PEFT adapter. It holds the update only and needs the base model.",
        "merged": "This is the whole model: the base's weights plus the update, each tensor rounded once.",
        "bnb-4bit": "This is the whole model in bitsandbytes' 4 bits (NF4): the base's weights plus the update, "
        "rounded together. Embeddings, norms and heads keep their type.",
        "compressed-tensors": "This is the whole model in 4 bits (W4A16): the base's weights plus the update, rounded "
        "together by AutoRound with the inputs that training examples give each layer. Embeddings, norms and the head "
        "keep their type.",
        "gguf": "This is the whole model in one GGUF file: the base's weights plus the update.",
        "gguf-adapter": "This is a LoRA adapter for llama.cpp. It holds the update only and needs the base model as "
        "GGUF.",
    }
    text, update, trained = [kinds[to]], "the update", "the trained model"
    if cut := comparison.get("cut"):
        update, trained = "the cut update", "the trained model with the cut update"
        how = "The matrices were trained whole, and each change was"
        if not result.is_full:
            how = f"Each update was trained at rank {cut['rank_before']} and"
        text.append(
            f"{how} cut to its best approximation of rank {cut['rank']}{_cost(cut)}. The scores below were measured "
            "before it."
        )
    if combined := comparison.get("combined"):
        update, trained = "the combined update", "the base with the combined update"
        others = ", ".join(code(base_name(name)) for name in combined["others"])
        weights = ", ".join(f"{weight:g}" for weight in combined["weights"])
        text.append(
            f"The adapter of this run is combined with {others} by PEFT's method `{combined['method']}`, with the "
            f"weights {weights}. The scores below are those of this run's adapter alone."
        )
    if quantised != "none" and (comparison.get("base") or {}).get("weights") == "trained":
        text.append(
            f"The adapter was trained on the base in {quantised}; this export has the weights that training computed "
            "with, rounded and dequantised."
        )
    elif quantised != "none":
        text.append(
            f"The adapter was trained on the base in {quantised}; this export uses the base as published. The scores "
            f"below were measured on the {quantised} base and can differ a little."
        )
    text.append(
        f"{comparison['by']} loaded this export, and its logits were compared with those of the unquantised base with "
        f"{update} at {comparison['num_positions']} positions: they differ by {comparison['difference']:.1e} "
        f"(relative norm), and the top token is the same at {comparison['top_agreement']:.0%} of the positions."
    )
    if scored := comparison.get("validation"):
        text.append(
            f"On {scored['num_examples']:,} validation examples its loss is {scored['loss']:.4f}, and that of "
            f"{trained} {scored['loss_trained']:.4f}."
        )
    if answers := comparison.get("answers"):
        text.append(
            f"Of {answers['num_compared']} prompts of the test data, the export answered {answers['num_equal']} token "
            f"by token as {trained} does, and ended its answers there too."
        )
    return "\n".join(text)


def _cost(cut: Mapping[str, Any]) -> str:
    """What a cut costs; empty where it was not measured."""
    if cut["validation_loss"] is None:
        return ""
    return (
        f": the loss on {cut['num_validation']:,} validation examples was {cut['validation_loss_before']:.4f} before "
        f"the cut and is {cut['validation_loss']:.4f} after it"
    )


def _scores(metrics: Mapping[str, Any]) -> str:
    before, after = metrics.get("before", {}), metrics.get("after", {})
    rows = [
        f"| {metric.name} | {_number(before.get(metric.key), metric)} | {_number(after[metric.key], metric)} |"
        for metric in METRICS
        if metric.key in after
    ]
    if not rows:
        return ""
    return "\n".join(["## Scores on the test data", "", "| | before | after |", "|---|---|---|", *rows])


def _number(value: float | None, metric: Metric) -> str:
    return "–" if value is None else f"{value:.{metric.digits}f}"


def _usage(result: Result, to: ExportFormat, files: Mapping[str, str]) -> str:
    auto = _AUTO[result.config.model.task]
    base = base_name(result.config.model.name)
    generates = generates_text(result.config.model.task)
    has_head = result.config.model.task in HEAD_TASKS
    head = head_arguments(result.labels, result.head.is_new) if has_head else ""
    match to:
        case "adapter":
            lines = [
                "```python",
                "from peft import PeftModel",
                f"from transformers import AutoTokenizer, {auto}{', GenerationConfig' if generates else ''}",
                "",
                f"base = {auto}.from_pretrained({json.dumps(base)}{head})",
                'model = PeftModel.from_pretrained(base, "this-folder")',
                'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
                *(
                    [
                        "# where an answer ends: model.generate(..., generation_config=settings)",
                        'settings = GenerationConfig.from_pretrained("this-folder")',
                    ]
                    if generates
                    else []
                ),
                "```",
            ]
        case "merged" | "bnb-4bit" | "compressed-tensors":
            lines = [
                *(_SERVED.get(to, ()) if generates else ()),
                "```python",
                f"from transformers import AutoTokenizer, {auto}",
                "",
                f'model = {auto}.from_pretrained("this-folder"{_LOADED.get(to, ")")}',
                'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
                "```",
            ]
        case "gguf" if not generates:
            lines = [
                "```bash",
                f'llama-embedding -m {files["gguf"]} --pooling rank -p "a text"  # llama.cpp: the score of each class',
                "```",
            ]
        case "gguf":
            lines = [
                "```bash",
                f"llama-cli -m {files['gguf']}                 # llama.cpp",
                "ollama create my-model -f Modelfile && ollama run my-model",
                "```",
            ]
        case "gguf-adapter":
            lines = [
                "```bash",
                f"llama-cli -m base.gguf --lora {files['gguf']}  # base.gguf: the base model, of any type",
                "```",
            ]
    if result.labels:
        lines += ["", f"Labels: {', '.join(map(code, result.labels))}."]
    return "\n".join(lines)


def _describe_training(result: Result) -> str:
    metrics, config = result.metrics, result.config
    plan = parse_plan(result.content["plan"], str(result.path))
    lines = [
        "## How it was trained",
        "",
        f"- plan: {describe_plan(plan)}",
        f"- rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, base quantization {config.model.quantization}"
        if plan.settings.kind == "lora"
        else f"- trained as {config.model.dtype}, updated in the backward pass",
    ]
    if "steps" in metrics:
        lines.append(
            f"- {metrics['steps']:,} steps of {config.training.batch_size} examples, "
            f"optimizer {code(str(metrics['optimizer']))}, learning rate {metrics['learning_rate']:g}, "
            f"seed {config.training.seed}"
        )
    versions = {name: number for name, number in metrics.get("environment", {}).items() if name != "device"}
    if not versions:
        versions = {name: version(name) for name in ("sgm-finetune", "torch", "transformers", "peft")}
    lines.append(f"- {', '.join(code(f'{name} {number}') for name, number in versions.items())}")
    return "\n".join(lines)
