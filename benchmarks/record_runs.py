"""Appends finished runs to benchmarks/results/demo_runs.json and prints a row and a table for each.

    python src/finetune.py
    python src/finetune.py --config configs/minilm-imdb.yaml
    python src/finetune.py --config configs/smollm2-lm.yaml
    python src/finetune.py --config configs/smollm2-chat.yaml
    python src/finetune.py --config configs/minilm-entities.yaml
    python benchmarks/record_runs.py output outputs/minilm-imdb outputs/smollm2-lm outputs/smollm2-chat ...

A record holds the resolved configuration (`python src/finetune.py --config FILE` repeats the run from it), the metrics,
the versions and, for each kind of matrix, the numbers behind its plan. `python benchmarks/quality.py --tables` writes
the table of whole runs in docs/results.md from the records.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from sgm_finetune.results.metric_names import METRICS

SHOWN = ("entity_f1", "accuracy", "r2", "rouge_l", "perplexity")
"""Metrics that a row may show, the most informative one first."""
RESULTS = Path(__file__).parent / "results" / "demo_runs.json"


def record(output: Path) -> dict[str, Any]:
    """The record of the run in `output`, without the numbers of single matrices."""
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    return {
        "command": "python src/finetune.py --config CONFIG, CONFIG as below",
        "date": date.today().isoformat(),
        "config": yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8")),
        "metrics": json.loads((output / "metrics.json").read_text(encoding="utf-8")),
        "kinds": plan["kinds"],
        "groups": [
            {"kind": group["kind"], "side": group["side"], "size": len(group["members"])} for group in plan["groups"]
        ],
        "kept_own": kept_own(plan),
    }


def kept_own(plan: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Kind -> side -> mean fraction of held-out gradient energy that a matrix's own basis keeps."""
    shares: dict[str, list[dict[str, float]]] = {}
    for matrix in plan["matrices"]:
        if matrix["kept_own"] is not None:
            shares.setdefault(matrix["kind"], []).append(matrix["kept_own"])
    return {
        kind: {side: sum(share[side] for share in found) / len(found) for side in ("input", "output")}
        for kind, found in shares.items()
    }


def row(run: dict[str, Any]) -> str:
    """One line: the model, its metric before and after, minutes and parameters."""
    metrics = run["metrics"]
    before, after = metrics["before"], metrics["after"]
    metric = next(m for key in SHOWN for m in METRICS if m.key == key and key in after)
    digits = 2 if metric.key == "perplexity" else 3
    return (
        f"{metrics['model']}: {metric.name} {before[metric.key]:.{digits}f} → {after[metric.key]:.{digits}f}, "
        f"{metrics['seconds']['total'] / 60:.1f} min, {metrics['trainable_parameters']:,} parameters "
        f"({metrics['plain_lora_parameters']:,} unshared)"
    )


def table(run: dict[str, Any]) -> str:
    """The tables of docs/evidence/gradient-agreement.md: layers of a kind, then readers of the same activations."""
    lines = [
        "| kind | cosine between layers, mean / largest | same layer, other data | own basis keeps, input / output | "
        "of that, two layers' shared basis: input / output | one basis for all: input / output |",
        "|---|---|---|---|---|---|",
    ]
    for kind in run["kinds"]:
        if kind["cosine_mean"] is not None:
            own = run["kept_own"].get(kind["kind"], {"input": float("nan"), "output": float("nan")})
            lines.append(
                f"| {short(kind['kind'])} | {kind['cosine_mean']:.2f} / {kind['cosine_max']:.2f} | "
                f"{kind['cosine_other_half']:.2f} | {own['input']:.2f} / {own['output']:.2f} | "
                f"{kind['retention_input']:.2f} / {kind['retention_output']:.2f} | "
                f"{kind['retention_all_input']:.2f} / {kind['retention_all_output']:.2f} |"
            )
    lines += ["", "| readers | pairs: input | all: input | groups |", "|---|---|---|---|"]
    for kind in run["kinds"]:
        if kind["cosine_mean"] is None:
            sizes = Counter(group["size"] for group in run["groups"] if group["kind"] == kind["kind"])
            lines.append(
                f"| {short(kind['kind'])} | {kind['retention_input']:.2f} | {kind['retention_all_input']:.2f} | "
                f"{', '.join(f'{count} of {size}' for size, count in sorted(sizes.items(), reverse=True)) or '–'} |"
            )
    return "\n".join(lines)


def short(kind: str) -> str:
    """The last part of a kind's name that identifies it; `dense` alone does not, so its parent stays before it."""
    parts = [part for part in kind.split(".") if part != "*"]
    return ".".join(parts[-2:]) if parts[-1] == "dense" else parts[-1]


FINETUNE = "python src/finetune.py"


@dataclass(frozen=True)
class WholeRun:
    """A row of docs/results.md's table of whole runs: the latest record of `data` with `step`."""

    title: str
    command: str
    data: str
    step: str
    metric: str
    """Form of the metric: keys of `before` and `after` between braces."""


WHOLE_RUNS = (
    WholeRun(
        "SmolLM2-135M in 4 bits, Rotten Tomatoes", FINETUNE, "rotten-tomatoes", "fast",
        "accuracy {0[accuracy]:.3f} → {1[accuracy]:.3f} (majority class {1[majority_accuracy]:.3f}), "
        "{1[num_examples]:,} texts",
    ),
    WholeRun(
        "MiniLM (BERT encoder), IMDB", f"{FINETUNE} --config configs/minilm-imdb.yaml training.step=peft",
        "imdb", "peft",
        "accuracy {0[accuracy]:.3f} → {1[accuracy]:.3f} (majority class {1[majority_accuracy]:.3f}), "
        "{1[num_examples]:,} texts",
    ),
    WholeRun(
        "SmolLM2-135M in 4 bits, Jane Austen", f"{FINETUNE} --config configs/smollm2-lm.yaml", "jane-austen", "fast",
        "perplexity {0[perplexity]:.1f} → {1[perplexity]:.1f}, {1[num_tokens]:,} tokens",
    ),
    WholeRun(
        "SmolLM2-135M in 4 bits, XSum as chat", f"{FINETUNE} --config configs/smollm2-chat.yaml training.step=peft",
        "xsum", "peft",
        "ROUGE-L {0[rouge_l]:.3f} → {1[rouge_l]:.3f}, {1[num_generated]} answers; perplexity {0[perplexity]:.1f} → "
        "{1[perplexity]:.1f}, {1[num_tokens]:,} tokens",
    ),
    WholeRun(
        "MiniLM, names in news (CoNLL sample)", f"{FINETUNE} --config configs/minilm-entities.yaml", "conll-sample",
        "fast", "entity F1 {0[entity_f1]:.3f} → {1[entity_f1]:.3f}, {1[num_examples]} sentences",
    ),
)  # fmt: skip


def whole_runs_table() -> str:
    """The table of whole runs: command, metric before and after on test data, minutes."""
    records = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| run | command | before → after, on test data |", "|---|---|---|"]
    for shown in WHOLE_RUNS:
        *_, metrics = (
            record["metrics"]
            for record in records
            if record["config"]["data"]["name"] == shown.data
            and record["config"]["training"].get("step", "peft") == shown.step  # older records have no such key
        )
        result = shown.metric.format(metrics["before"], metrics["after"])
        lines.append(f"| {shown.title} | `{shown.command}` | {result}; {metrics['seconds']['total'] / 60:.1f} min |")
    return "\n".join(lines)


def main() -> None:
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for folder in sys.argv[1:]:
        runs.append(record(Path(folder)))
        print(row(runs[-1]), table(runs[-1]), sep="\n")
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
