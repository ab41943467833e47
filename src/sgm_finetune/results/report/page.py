"""The report: one offline HTML page made from the folder of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib import colormaps
from matplotlib.colors import to_hex

from sgm_finetune.base.files import write_text
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.examples import NUM_SHOWN
from sgm_finetune.results.report import grid_figures, training_figures
from sgm_finetune.results.report.formats import count, finite, layer_ranges
from sgm_finetune.results.report.headlines import headlines
from sgm_finetune.results.report.histogram_figure import histogram_figure
from sgm_finetune.results.report.pictures import SimilarityTable
from sgm_finetune.results.report.render import render
from sgm_finetune.results.report.run_files import Run, catch_bad_values, load_run
from sgm_finetune.results.report.scan_table import short_kinds
from sgm_finetune.results.report.similarity_figures import (
    LOWEST_SHOWN,
    layers_figure,
    readers_figure,
    similarity_gradient,
)
from sgm_finetune.results.report.svg import readable_on
from sgm_finetune.results.report.usage import commands, python_snippet

MANY_CLASSES = 12
MANY_GROUPS = 16
MANY_EXAMPLES = 6
"""More classes, groups or examples than these are folded on the page."""

_SIZES = (
    ("num_examples", "test examples"),
    ("num_words", "words"),
    ("num_tokens", "predicted tokens"),
    ("num_generated", "generated answers"),
)
_SIDES = {"input": "input side", "output": "output side", None: "cosine"}
_STAGES = ("scan", "probe", "train", "evaluate", "total")


def remake_report(folder: Path) -> Path:
    """Writes report.html from the other files in `folder` and returns its path.

    The folder may have been moved. Raises UserError when it does not hold the files of a finished run.
    """
    run = load_run(folder)
    with catch_bad_values(str(folder)):
        page = render_report(run)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def render_report(run: Run) -> str:
    """Returns the page. Its commands name `run.folder` where it is now."""
    return render(
        "report.html.j2",
        metrics=run.metrics,
        **_results(run.metrics),
        **_examples(run),
        **_training(run.metrics, run.history),
        **_sharing(run.plan, run.metrics),
        **_snr(run.plan),
        **_measurements(run),
        **_provenance(run),
        commands=commands(run.config, run.folder),
        snippet=python_snippet(run.config, run.metrics, run.folder),
    )


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    after = metrics.get("after") or {}
    table: list[list[int]] = after.get("confusion_matrix") or []
    rows = []
    for label, counts in zip(metrics["labels"] if table else [], table, strict=True):
        total = sum(counts)
        cells = [(number, number / total if total else 0.0) for number in counts]
        rows.append((label, cells, total))
    sizes = [f"{count(after[key])} {what}" for key, what in _SIZES if after.get(key) is not None]
    return {
        "headlines": headlines(metrics),
        "test_size": " · ".join(sizes),
        "confusion": rows,
        "counted": "words" if "num_words" in after else "examples",
        "confusion_folded": len(rows) > MANY_CLASSES,
    }


def _examples(run: Run) -> dict[str, Any]:
    found, num_changed = run.examples.get("examples", []), run.examples.get("num_changed", {})
    predicts_numbers = "r2" in run.metrics["after"]
    writes_answers = run.config.model.task in ("causal-lm", "seq2seq-lm")
    words = ("became right", "became wrong", "stayed wrong")
    if predicts_numbers:
        words = ("moved closer", "moved further away", "stayed equally far")
    elif writes_answers:
        words = ("became equal to the reference", "became different", "stayed different")
    parts = [f"{count(num_changed.get(sort))} {word}" for sort, word in zip(NUM_SHOWN, words, strict=True)]
    total = sum(num_changed.values())
    summary = (
        f"The {'answer' if writes_answers else 'prediction'} changed for {count(total)} of the first "
        f"{count(run.examples.get('num_compared'))} test examples: {', '.join(parts)}"
        f"{'. Some of them:' if len(found) < total else ':'}"
    )
    has_long_text = any(len(one[key]) > 40 for one in found for key in ("truth", "before", "after"))
    return {
        "examples": _alternate(found),
        "between": "\n" if has_long_text else " · ",
        "examples_summary": summary,
        "examples_first": MANY_EXAMPLES,
        "truth_name": "reference" if writes_answers else "true",
        "predicts_numbers": predicts_numbers,
    }


def _alternate(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one example that became right, one that became wrong, and so on, so that neither sort hides the other."""
    sorts = [[one for one in examples if one["became"] == sort] for sort in NUM_SHOWN]
    return [one for row in itertools.zip_longest(*sorts) for one in row if one is not None]


def _training(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = metrics.get("seconds") or {}
    best, predicted = metrics.get("best_step"), (metrics.get("predicted") or {}).get("peak_bytes")
    small = [
        (training_figures.step_figure(history, "learning_rate", "Learning rate by step"), "learning rate"),
        (
            training_figures.step_figure(history, training_figures.TOKENS_PER_SECOND, "Tokens per second by step"),
            "tokens per second",
        ),
        (
            training_figures.step_figure(history, training_figures.MEMORY, "Peak memory by step", 2.0**-30, predicted),
            "peak memory so far, GiB" + (" (dashed: predicted)" if predicted else ""),
        ),
    ]
    return {
        "training_figure": training_figures.training_figure(history, best),
        "step_figures": [(figure, caption) for figure, caption in small if figure is not None],
        "has_validation": bool(training_figures.points_of(history, "eval_loss")),
        "has_mean": bool(training_figures.running_mean(training_figures.points_of(history, "loss"))),
        "stages": [(stage, seconds.get(stage)) for stage in _STAGES],
    }


def _sharing(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    trainable, plain = metrics.get("trainable_parameters"), metrics.get("plain_lora_parameters")
    saved = 1 - trainable / plain if finite(trainable) and finite(plain) and plain else None
    by_name = {matrix.name: matrix for matrix in plan.matrices}
    numbers, prefix = grid_figures.group_numbers(plan), shared_prefix(plan)
    colours = {name: grid_figures.group_colour(number) for name, number in numbers.items()}
    groups = [
        {
            "group": group,
            "name": group.name.removeprefix(prefix),
            "number": numbers[group.name],
            "colour": colours[group.name],
            "text": readable_on(colours[group.name]),
            "layers": layer_ranges(by_name[name].layer for name in group.members),
        }
        for group in plan.groups
    ]
    return {
        "plan": plan,
        "saved": saved,
        "num_merged": sum(len(group.members) for group in plan.groups),
        "why_no_groups": _why_no_groups(plan),
        "groups_figure": grid_figures.groups_figure(plan),
        "prefix": prefix,
        "kinds": [
            (kind, kind.kind.removeprefix(prefix), sum(group.kind == kind.kind for group in plan.groups))
            for kind in plan.kinds
        ],
        "groups": groups,
        "groups_folded": len(groups) > MANY_GROUPS,
    }


def shared_prefix(plan: Plan) -> str:
    """Returns the prefix that the kinds of all layers share, which tables leave out."""
    names = short_kinds(dict.fromkeys(matrix.kind for matrix in plan.matrices if matrix.layer is not None))
    prefixes = {kind.removesuffix(short) for kind, short in names.items()}
    return prefixes.pop() if len(prefixes) == 1 else ""


def _why_no_groups(plan: Plan) -> str:
    if plan.groups:
        return ""
    if not any(kind.side for kind in plan.kinds):
        return "Merging was off or not possible, so every matrix has its own two factors, as in plain LoRA."
    settings = plan.settings
    return (
        f"No two matrices passed the criterion “{settings.criterion}” at threshold {settings.threshold:g}, "
        "so every matrix has its own two factors, as in plain LoRA."
    )


def _snr(plan: Plan) -> dict[str, Any]:
    colours = colormaps[grid_figures.SNR_COLOURS]
    return {
        "snr_figure": grid_figures.snr_figure(plan),
        "snr_range": grid_figures.snr_range(plan),
        "snr_gradient": ", ".join(to_hex(colours(step / 6)) for step in range(7)),
    }


def _measurements(run: Run) -> dict[str, Any]:
    """Draws the histograms and the similarities that the grouping used: layers x layers, or readers by layer."""
    readers: dict[str, list[SimilarityTable]] = {}
    layers: dict[str, list[SimilarityTable]] = {}
    kinds = {matrix.kind for matrix in run.plan.matrices}
    for table in run.pictures.similarities:
        of_layers = table.kind in kinds or "[" in table.kind or table.side != "input"
        if len(table.members) > 1:
            (layers if of_layers else readers).setdefault(table.kind, []).append(table)
    numbers, prefix = itertools.count(), shared_prefix(run.plan)
    return {
        "histograms": [(h, histogram_figure(h, number)) for number, h in enumerate(run.pictures.histograms)],
        "reader_figures": [
            (kind.removeprefix(prefix), readers_figure(of, run.plan, next(numbers))) for kind, of in readers.items()
        ],
        "layer_figures": [
            (
                kind.removeprefix(prefix),
                [(_SIDES[table.side], layers_figure(table, run.plan, next(numbers))) for table in of],
            )
            for kind, of in layers.items()
        ],
        "similarity_gradient": similarity_gradient(),
        "has_cosines": any(table.side is None for table in run.pictures.similarities),
        "lowest_shown": f"{LOWEST_SHOWN:g}",
    }


def _provenance(run: Run) -> dict[str, Any]:
    environment, config = run.environment, run.config
    machine, seeds = environment.get("machine") or {}, environment.get("seeds")
    if not seeds:
        seeds = {"training": config.training.seed, "data": config.data.seed, "probe": config.probe.seed}
    command = " ".join(map(str, environment.get("command", [])))
    cores = f"{machine['cores']} cores, {machine.get('threads')} threads" if machine.get("cores") else ""
    facts = {
        "Command": command,
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in seeds.items()),
        "Fingerprint of the test data": run.metrics.get("test_fingerprint"),
        "System": machine.get("system"),
        "Processor": ", ".join(part for part in (machine.get("processor"), cores) if part),
        "GPU": ", ".join(machine.get("gpus", [])),
    }
    return {
        "facts": [(name, value) for name, value in facts.items() if value],
        "versions": list((environment.get("versions") or run.metrics.get("environment") or {}).items()),
        "resolved": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip(),
    }
