"""metrics, plan, log history -> one offline HTML page: no request, no script, everything escaped."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple, TypeGuard

import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex

from sgm_finetune.config import Config, Task
from sgm_finetune.evaluation import MEASURES, Measure
from sgm_finetune.method.plan import Plan
from sgm_finetune.report import figures

NOTHING = "–"
MANY_CLASSES = 12
MANY_GROUPS = 16

_STAGES = ("scan", "probe", "train", "evaluate", "total")


class Headline(NamedTuple):
    """One metric before and after, as text."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None
    """None: equal, or not measured."""
    note: str


def render_report(*, config: Config, plan: Plan, metrics: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The page. `metrics` is the content of metrics.json, `history` Transformers' log history."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"decimal": decimal, "count": count, "duration": duration, "memory": memory}
    template = environment.from_string((files("sgm_finetune.report") / "template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        metrics=metrics,
        nothing=NOTHING,
        **_results(metrics),
        **_training(metrics, history),
        **_sharing(plan, metrics),
        **_snr(plan),
        commands=commands(config),
        snippet=python_snippet(config, metrics),
        resolved=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def headlines(metrics: Mapping[str, Any]) -> list[Headline]:
    """What a reader wants first: the task's measures, in the order of `MEASURES`."""
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    found = []
    for measure in MEASURES:
        if measure.key in {**before, **after}:
            squared = measure.key == "loss" and "r2" in after
            found.append(_headline(replace(measure, unit="squared error") if squared else measure, before, after))
    for task, numbers in after.get("harness", {}).items():
        earlier = before.get("harness", {}).get(task, {})
        found += [_headline(Measure(key, f"{task}: {key}"), earlier, numbers) for key in numbers]
    return found


def _headline(measure: Measure, before: Mapping[str, Any], after: Mapping[str, Any]) -> Headline:
    old, new, digits = before.get(measure.key), after.get(measure.key), max(1, measure.digits - 1)
    change, better = "", None
    if _finite(old) and _finite(new):
        difference = round(new, digits) - round(old, digits)
        change = ("+" if difference > 0 else "") + decimal(difference, digits)
        better = None if round(difference, digits) == 0 else (difference > 0) == measure.higher_is_better
    notes = [measure.unit] if measure.unit else []
    if measure.baseline is not None:
        notes.append(f"always naming the most frequent class: {decimal(after.get(measure.baseline), digits)}")
    if not measure.higher_is_better:
        notes.append("lower is better")
    name = measure.name[0].upper() + measure.name[1:]
    return Headline(name, decimal(old, digits), decimal(new, digits), change, better, "; ".join(notes))


def commands(config: Config) -> list[str]:
    """Shell lines that measure the result again."""
    folder = config.output.dir
    return ["python src/evaluate.py" + ("" if folder == "output" else f" {shlex.quote(f'output.dir={folder}')}")]


_AUTO_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def python_snippet(config: Config, metrics: Mapping[str, Any]) -> str:
    """Lines of Python that load the adapter with PEFT alone, on the base in full precision."""
    model = config.model
    adapter = json.dumps(f"{config.output.dir.rstrip('/')}/adapter", ensure_ascii=False)
    auto, arguments = _AUTO_CLASSES[model.task], ""
    if model.task in ("sequence-classification", "token-classification"):
        arguments = f", num_labels={len(metrics['labels']) or 1}, pad_token_id=tokenizer.pad_token_id"
    if model.revision is not None:
        arguments += f", revision={json.dumps(model.revision)}"
    name = json.dumps(model.name, ensure_ascii=False)
    by_name = "/" in model.name and not model.name.startswith("~")  # else an embedded model, or a folder beside us
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        *([] if by_name else ["from sgm_finetune.model_folder import local_folder"]),
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
        f"base = {auto}.from_pretrained({name if by_name else f'local_folder({name})'}{arguments})",
        f"model = PeftModel.from_pretrained(base, {adapter})",
    ]
    return "\n".join(lines)


def layer_ranges(layers: Iterable[int | None]) -> str:
    """Layers in words as short as they go.

    >>> layer_ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    numbers = sorted({layer for layer in layers if layer is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or NOTHING


def decimal(value: float | None, digits: int = 2) -> str:
    """
    >>> decimal(-0.25), decimal(1234.5, 1), decimal(-0.0001), decimal(None)
    ('−0.25', '1,234.5', '0.00', '–')
    """
    if not _finite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def count(value: float | None) -> str:
    """
    >>> count(1234567)
    '1,234,567'
    """
    return f"{round(value):,}".replace("-", "−") if _finite(value) else NOTHING


def duration(seconds: float | None) -> str:
    """
    >>> [duration(s) for s in (0.04, 12.34, 75, 7384, None)]
    ['0.04 s', '12.3 s', '1 min 15 s', '2 h 3 min', '–']
    """
    if not _finite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """
    >>> memory(3 * 2**29), memory(5 * 2**20), memory(700)
    ('1.5 GiB', '5.0 MiB', '700 B')
    """
    if not _finite(size):
        return NOTHING
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    after = metrics.get("after") or {}
    table: list[list[int]] = after.get("confusion_matrix") or []
    rows = []
    for label, counts in zip(metrics["labels"] if table else [], table, strict=True):
        total = sum(counts)
        rows.append((label, [(n, n / total if total else 0.0) for n in counts], total))
    sizes = [f"{count(after[key])} {what}" for key, what in _SIZES if after.get(key) is not None]
    return {
        "headlines": headlines(metrics),
        "test_size": " · ".join(sizes),
        "confusion": rows,
        "counted": "words" if "num_words" in after else "examples",
        "confusion_folded": len(rows) > MANY_CLASSES,
    }


_SIZES = (
    ("num_examples", "test examples"),
    ("num_words", "words"),
    ("num_tokens", "predicted tokens"),
    ("num_generated", "generated answers"),
)


def _training(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = metrics.get("seconds") or {}
    best = metrics.get("best_step")
    return {
        "training_figure": figures.training_figure(history, best),
        "has_validation": bool(figures.loss_points(history, "eval_loss")),
        "has_mean": bool(figures.running_mean(figures.loss_points(history, "loss"))),
        "stages": [(stage, seconds.get(stage)) for stage in _STAGES],
    }


def _sharing(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    trainable, plain = metrics.get("trainable_parameters"), metrics.get("plain_lora_parameters")
    saved = 1 - trainable / plain if _finite(trainable) and _finite(plain) and plain else None
    by_name = {matrix.name: matrix for matrix in plan.matrices}
    numbers = figures.group_numbers(plan)
    groups = [
        {
            "group": group,
            "number": numbers[group.name],
            "colour": (colour := figures.group_colour(numbers[group.name])),
            "text": figures.readable_on(colour),
            "layers": layer_ranges(by_name[name].layer for name in group.members),
        }
        for group in plan.groups
    ]
    return {
        "plan": plan,
        "saved": saved,
        "num_merged": sum(len(group.members) for group in plan.groups),
        "why_no_groups": _why_no_groups(plan),
        "groups_figure": figures.groups_figure(plan),
        "kinds": [(kind, sum(group.kind == kind.kind for group in plan.groups)) for kind in plan.kinds],
        "groups": groups,
        "groups_folded": len(groups) > MANY_GROUPS,
    }


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
    colours = colormaps[figures.SNR_COLOURS]
    return {
        "snr_figure": figures.snr_figure(plan),
        "snr_range": figures.snr_range(plan),
        "snr_gradient": ", ".join(to_hex(colours(step / 6)) for step in range(7)),
    }
