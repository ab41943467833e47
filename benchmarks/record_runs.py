"""Appends finished runs to benchmarks/results/demo_runs.json and prints them as README rows.

    python src/finetune.py
    python src/finetune.py --config configs/minilm-imdb.yaml
    python src/finetune.py --config configs/smollm2-lm.yaml
    python src/finetune.py --config configs/smollm2-chat.yaml
    python src/finetune.py --config configs/minilm-entities.yaml
    python benchmarks/record_runs.py output outputs/minilm-imdb outputs/smollm2-lm outputs/smollm2-chat ...

A record holds the resolved configuration, which with `python src/finetune.py --config FILE` repeats the run, the
metrics, the versions and, per kind of matrix, the numbers that its plan rests on.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from sgm_finetune.results.metrics import MEASURES

SHOWN = ("entity_f1", "accuracy", "r2", "rouge_l", "perplexity")
"""Metrics that a row may show, the most telling one first."""
RESULTS = Path(__file__).parent / "results" / "demo_runs.json"


def record(output: Path) -> dict[str, Any]:
    """What a run's folder says, without its matrices."""
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
    """Per kind, the mean share of held-out gradient energy that a matrix's own basis keeps, on either side."""
    shares: dict[str, list[dict[str, float]]] = {}
    for matrix in plan["matrices"]:
        if matrix["kept_own"] is not None:
            shares.setdefault(matrix["kind"], []).append(matrix["kept_own"])
    return {
        kind: {side: sum(share[side] for share in found) / len(found) for side in ("input", "output")}
        for kind, found in shares.items()
    }


def row(run: dict[str, Any]) -> str:
    metrics = run["metrics"]
    before, after = metrics["before"], metrics["after"]
    measure = next(m for key in SHOWN for m in MEASURES if m.key == key and key in after)
    digits = 2 if measure.key == "perplexity" else 3
    return (
        f"{metrics['model']}: {measure.name} {before[measure.key]:.{digits}f} → {after[measure.key]:.{digits}f}, "
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
    """The last part of a kind's name that says something: `dense` alone does not."""
    parts = [part for part in kind.split(".") if part != "*"]
    return ".".join(parts[-2:]) if parts[-1] == "dense" else parts[-1]


def main() -> None:
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for folder in sys.argv[1:]:
        runs.append(record(Path(folder)))
        print(row(runs[-1]), table(runs[-1]), sep="\n")
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
