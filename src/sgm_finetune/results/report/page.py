"""The report: one offline HTML page made from the folder of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm_finetune.base.files import write_text
from sgm_finetune.measure.plan_summary import describe_selection
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix
from sgm_finetune.results.report import grid_figures, training_figures
from sgm_finetune.results.report.classes_section import classes_section
from sgm_finetune.results.report.examples_section import examples_section
from sgm_finetune.results.report.formats import count, decimal, finite, layer_ranges
from sgm_finetune.results.report.headlines import headlines
from sgm_finetune.results.report.histogram_figure import histogram_figure
from sgm_finetune.results.report.pictures import SimilarityTable
from sgm_finetune.results.report.pool_figure import pool_figure
from sgm_finetune.results.report.provenance_section import head, provenance_section
from sgm_finetune.results.report.render import render
from sgm_finetune.results.report.run_files import Run, catch_bad_values, load_run
from sgm_finetune.results.report.scan_table import short_kinds
from sgm_finetune.results.report.ship_section import ship_section
from sgm_finetune.results.report.similarity_figures import (
    LOWEST_SHOWN,
    layers_figure,
    readers_figure,
)
from sgm_finetune.results.report.svg import heat_gradient, readable_on
from sgm_finetune.results.report.usage import commands, python_snippet
from sgm_finetune.results.verdict import shortfall

MANY_GROUPS = 16
"""More groups than these are folded on the page."""

_SIZES = (
    ("num_examples", "test examples"),
    ("num_words", "words"),
    ("num_tokens", "predicted tokens"),
    ("num_generated", "generated answers"),
)
WHY_ABOVE_ONE = (
    "A value above 1 is possible: the common basis is fitted to the gradients of several matrices, so it follows "
    "chance less than a basis of one matrix, and keeps more on other data."
)
_SIDES = {"input": "input side", "output": "output side", None: "cosine"}
_STAGES = ("scan", "probe", "rate_trials", "train", "evaluate", "total")


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
        **head(run),
        **_results(run.metrics),
        **classes_section(run.metrics),
        **examples_section(run),
        **ship_section(run.ship),
        **_training(run),
        **_sharing(run.plan, run.metrics),
        **_pools(run),
        heat_gradient=heat_gradient(),
        **_snr(run.plan),
        **_measurements(run),
        **provenance_section(run),
        commands=commands(run.config, run.folder),
        snippet=python_snippet(run.config, run.metrics, run.folder),
        snippet_purpose="Load it with Transformers, once it is merged" if run.config.is_full else "Load it with PEFT",
    )


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    after = metrics.get("after") or {}
    sizes = [f"{count(after[key])} {what}" for key, what in _SIZES if after.get(key) is not None]
    lines = headlines(metrics)
    return {
        "headlines": lines,
        "has_intervals": any("95 %" in line.note for line in lines),
        **_sources(metrics),
        "test_size": " · ".join(sizes),
        "shortfall": shortfall(metrics),
    }


def _sources(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what each source of a mixture gave to the training, and its test before and after."""
    before, after = ((metrics.get(when) or {}).get("sources") or {} for when in ("before", "after"))
    found = []
    for share in metrics.get("mixture") or ():
        name, own = share["name"], after.get(share["name"]) or {}
        lines = headlines({"before": before.get(name), "after": own})
        found.append({**share, "tested": own.get("num_examples"), "lines": {line.name: line for line in lines}})
    return {
        "sources": found,
        "source_metrics": list(dict.fromkeys(name for source in found for name in source["lines"])),
    }


def _training(run: Run) -> dict[str, Any]:
    metrics, history, limit = run.metrics, run.history, run.config.training.max_grad_norm
    seconds = metrics.get("seconds") or {}
    best, predicted = metrics.get("best_step"), (metrics.get("predicted") or {}).get("peak_bytes")
    figure, memory = training_figures.step_figure, training_figures.MEMORY
    trials = metrics.get("rate_trials")
    small = [
        (
            training_figures.rates_figure(trials),
            f"loss of {trials['num_held_out']} training examples after trials of {trials['steps']} steps, by learning "
            f"rate (dotted: the lowest point, {trials['best']:g}; for all steps that is {trials['chosen']:g})"
            if trials
            else "",
        ),
        (figure(history, "learning_rate", "Learning rate by step"), "learning rate"),
        (
            figure(history, "grad_norm", "Gradient norm by step"),
            f"norm of the gradient, before it is cut to {limit:g}",
        ),
        (figure(history, training_figures.TOKENS_PER_SECOND, "Tokens per second by step"), "tokens per second"),
        (
            figure(history, memory, "Peak memory by step", 2.0**-30, predicted),
            "peak memory so far, GiB" + (" (dashed: predicted)" if predicted else ""),
        ),
    ]
    return {
        "training_figure": training_figures.training_figure(history, best),
        "large_figure": training_figures.large_figure(history, best),
        "step_figures": [(drawn, caption) for drawn, caption in small if drawn is not None],
        "has_validation": bool(training_figures.points_of(history, "eval_loss")),
        "has_mean": bool(training_figures.running_mean(training_figures.points_of(history, "loss"))),
        "stages": [
            (stage.replace("_", " "), seconds.get(stage))
            for stage in _STAGES
            if stage != "rate_trials" or stage in seconds
        ],
    }


def _sharing(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    trainable, plain = metrics.get("trainable_parameters"), metrics.get("plain_lora_parameters")
    saved = 1 - trainable / plain if finite(trainable) and finite(plain) and plain else None
    by_name = {matrix.name: matrix for matrix in plan.matrices}
    numbers, shown, prefix = grid_figures.group_numbers(plan), grid_figures.shown_numbers(plan), shared_prefix(plan)
    colours = {name: grid_figures.group_colour(number) for name, number in numbers.items()}
    groups = [
        {
            "group": group,
            "name": group.name.removeprefix(prefix),
            "number": shown.get(group.name, "\N{NO-BREAK SPACE}"),
            "colour": colours[group.name],
            "text": readable_on(colours[group.name]),
            "layers": layer_ranges(by_name[name].layer for name in group.members),
            "spread": _spread(group, [by_name[name] for name in group.members]),
        }
        for group in plan.groups
    ]
    kept = [kind.retention_input for kind in plan.kinds] + [kind.retention_output for kind in plan.kinds]
    kept += [kind.retention_all_input for kind in plan.kinds] + [kind.retention_all_output for kind in plan.kinds]
    num_pools = sum(group.side == "both" for group in plan.groups)
    of_groups = [number for group in plan.groups for number in (group.similarity, group.joint_retention)]
    return {
        "plan": plan,
        "saved": saved,
        "selection": describe_selection(plan.settings),
        "silent": no_signal(plan.matrices),
        "why_above_one": WHY_ABOVE_ONE,
        "has_kept_above_one": any(number is not None and number > 1.005 for number in kept),
        "has_group_above_one": any(number is not None and number > 1.005 for number in of_groups),
        "num_pools": num_pools,
        "pooled": 0 < num_pools == len(groups),
        "num_merged": sum(len(group.members) for group in plan.groups),
        "why_no_groups": _why_no_groups(plan),
        "groups_figure": grid_figures.groups_figure(plan),
        "has_alone": any(matrix.selected and matrix.group is None for matrix in plan.matrices),
        "has_frozen": not all(matrix.selected for matrix in plan.matrices),
        "prefix": prefix,
        "kinds": [
            (kind, kind.kind.removeprefix(prefix), sum(group.kind == kind.kind for group in plan.groups))
            for kind in plan.kinds
        ],
        "groups": groups,
        "has_numbers": bool(shown),
        "groups_folded": len(groups) > MANY_GROUPS,
    }


def _pools(run: Run) -> dict[str, Any]:
    """Draws who uses which direction of each pool that the run measured."""
    kinds, prefix = {group.name: group.kind for group in run.plan.groups}, shared_prefix(run.plan)
    shown = grid_figures.shown_numbers(run.plan)
    drawn = []
    for index, table in enumerate(run.pictures.pools):
        name = kinds.get(table.pool, table.pool).removeprefix(prefix)
        if table.pool in shown:
            name += f", pool {shown[table.pool]}"
        drawn.append((name, table, pool_figure(table, name, run.plan, index)))
    return {"pools": drawn}


def _spread(group: Group, members: Sequence[PlannedMatrix]) -> str:
    """Returns the SNR spread of a group. A member without signal has an SNR of 0, which no number of dB expresses."""
    if silent := no_signal(members):
        return f"no signal in {silent}"
    return decimal(group.snr_spread_db, 1) + (" dB" if finite(group.snr_spread_db) else "")


def no_signal(matrices: Sequence[PlannedMatrix]) -> str:
    """Returns the matrices without any signal as text, by kind, with their layers unless all of them have none."""
    names = short_kinds(dict.fromkeys(matrix.kind for matrix in matrices))
    parts = []
    for kind, name in names.items():
        of_kind = [matrix for matrix in matrices if matrix.kind == kind]
        silent = [matrix.layer for matrix in of_kind if matrix.snr == 0]
        if silent and len(silent) == len(of_kind):
            parts.append(name)
        elif silent:
            parts.append(f"{name} (layer{'' if len(set(silent)) == 1 else 's'} {layer_ranges(silent)})")
    return ", ".join(parts)


def shared_prefix(plan: Plan) -> str:
    """Returns the prefix that the kinds of all layers share, which tables leave out."""
    names = short_kinds(dict.fromkeys(matrix.kind for matrix in plan.matrices if matrix.layer is not None))
    prefixes = {kind.removesuffix(short) for kind, short in names.items()}
    return prefixes.pop() if len(prefixes) == 1 else ""


def _why_no_groups(plan: Plan) -> str:
    if plan.groups:
        return ""
    if plan.settings.kind == "full":
        return (
            "The filled matrices were trained whole. The others, and all that is no matrix here, stayed as they were"
            + (f", but for: {', '.join(plan.settings.also)}." if plan.settings.also else ".")
        )
    if not any(kind.side for kind in plan.kinds):
        return "Merging was off or not possible, so every matrix has its own two factors, as in plain LoRA."
    settings = plan.settings
    threshold = f"{settings.threshold:g}".replace("-", "−")
    both = " on both sides" if settings.scope == "pool" and settings.criterion == "subspace" else ""
    return (
        f"No two matrices passed the criterion “{settings.criterion}” at threshold {threshold}{both}, "
        "so every matrix has its own two factors, as in plain LoRA."
    )


def _snr(plan: Plan) -> dict[str, Any]:
    return {
        "snr_decides": _snr_decides(plan),
        "snr_figure": grid_figures.snr_figure(plan),
        "snr_range": grid_figures.snr_range(plan),
    }


def _snr_decides(plan: Plan) -> str:
    """Returns what the SNR decided in this run."""
    settings = plan.settings
    by_ratio = (settings.top_fraction and settings.by == "snr") or settings.snr_threshold is not None
    decided = [
        *(["which matrices are trained"] if by_ratio else []),
        *(["which matrices may share"] if settings.snr_tolerance_db is not None or settings.criterion == "snr" else []),
    ]
    if not decided:
        return "In this run the ratio decided nothing; with selection.top_fraction it decides what is trained."
    return f"In this run the ratio decided {' and '.join(decided)}."


def _measurements(run: Run) -> dict[str, Any]:
    """Draws the histograms and the similarities that the grouping used: layers x layers, or readers by layer."""
    readers: dict[str, list[SimilarityTable]] = {}
    layers: dict[str, list[SimilarityTable]] = {}
    kinds = {matrix.kind for matrix in run.plan.matrices}
    for table in run.pictures.similarities:
        of_layers = table.kind in kinds or "[" in table.kind or table.side != "input"
        if len(table.members) > 1:
            (layers if of_layers else readers).setdefault(table.kind, []).append(table)
    drawn = run.pictures.histograms or readers or layers
    numbers, prefix = itertools.count(), shared_prefix(run.plan)
    return {
        "has_measurements": bool(drawn),
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
        "has_cosines": any(table.side is None for table in run.pictures.similarities),
        "lowest_shown": f"{LOWEST_SHOWN:g}",
    }
