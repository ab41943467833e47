"""A translation: another program's keys, taken one after the other, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import listed, short_repr
from sgm_finetune.base.untrusted import Written
from sgm_finetune.data.columns import LAYOUTS, Layout
from sgm_finetune.data.tables import ENDINGS
from sgm_finetune.data.text_file import inner_suffix

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Translation:
    """The keys of a configuration that are not translated yet, and what the others became.

    `values` are ours, by dotted key, and `notes` say what has no counterpart here, or another meaning. A key that is
    null or empty counts as absent.
    """

    def __init__(self, theirs: Mapping[str, Any]):
        self._theirs = {str(name): value for name, value in theirs.items() if not _is_absent(value)}
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []
        self.unneeded: list[str] = []
        """Keys for which SGM has no setting because it always does so, or finds out by itself."""

    def take(self, name: str) -> Any:
        """The value of a key as it was written, which is then translated; None if it is absent."""
        return self._theirs.pop(name, None)

    def text(self, name: str) -> str | None:
        """The value of a key that is no list and no mapping. Raises UserError for another one."""
        value = self.take(name)
        if isinstance(value, list | dict):
            raise UserError(f"`{name}` is a {type(value).__name__}, not a single value; correct it")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """The value of a key with keys of its own; empty if it is absent. Raises UserError for another one."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"`{name}`: {describe(value)} has no keys of its own; correct it")
        return value or {}

    def number(self, name: str) -> float | None:
        """The value of a key as a number. Raises UserError for another one."""
        value = self.text(name)
        try:
            number = None if value is None else float(value)
        except ValueError:
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise UserError(f"`{name}`: {short_repr(str(value))} is not a number; correct it")
        return number

    def flag(self, name: str) -> bool:
        """The value of a key as a truth value, false if it is absent. Raises UserError for another one."""
        value = self.text(name)
        if value is not None and str(value).lower() not in _FLAGS:
            raise UserError(f"`{name}`: {short_repr(str(value))} is not true or false; correct it")
        return value is not None and _FLAGS[str(value).lower()]

    def set(self, key: str, value: Any) -> None:
        """Sets our `key`, unless `value` is None."""
        if value is not None:
            self.values[key] = value

    def move(self, name: str, key: str) -> None:
        """Our `key` takes the value of theirs as it is."""
        self.set(key, self.text(name))

    def drop(self, *names: str) -> None:
        """Leaves out keys that SGM does not need."""
        self.unneeded += [name for name in names if self.take(name) is not None]

    def note(self, line: str) -> None:
        self.notes.append(line)

    def finish(self) -> None:
        """Notes every key that nothing has taken, except for switches that are off."""
        for name, value in list(self._theirs.items()):
            if str(value).lower() not in ("false", "no", "off", "none"):
                self.note(f"{name}: {describe(value)} has no counterpart")
            self.take(name)

    def by_section(self) -> dict[str, Any]:
        """Our values in their sections."""
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            section, _, leaf = key.rpartition(".")
            target = found.setdefault(section, {}) if section else found
            target[leaf] = value
        return found


def describe(value: Any) -> str:
    """A value as a person reads it.

    >>> describe("a"), describe(["a", "b"]), describe({"x": 1})
    ('a', 'a, b', 'x')
    """
    if isinstance(value, dict):
        return listed([str(name) for name in value])
    return listed([describe(one) for one in value]) if isinstance(value, list) else short_repr(str(value)).strip("'")


def _is_absent(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, Written) and value.is_null)


NO_TRAINING = (
    "has no counterpart: sgm import reads supervised fine-tuning, preferences (dpo, ipo, orpo, simpo, kto) and reward "
    "models"
)
"""Ends the message about a configuration for another kind of training."""

# Keys that programs above Transformers' Trainer have in common

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_8bit",), "paged_adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "adamw"),
}
_OF_WHOLE_MATRICES = {"adafactor": "adafactor", "muon": "muon"}
_SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}  # fmt: skip


def translate_steps(
    t: Translation, optimizer: str, schedule: str, epochs: str, micro: str, rate: float, default_schedule: str
) -> None:
    """Batches, steps, optimizer, learning rate and schedule.

    The other arguments are their names of the keys, and what they take when the last two are absent.
    """
    per_device, accumulated = t.number(micro) or 1, t.number("gradient_accumulation_steps") or 1
    t.set("training.batch_size", round(per_device * accumulated))
    if accumulated > 1:
        t.set("training.micro_batch_size", round(per_device))
    t.note(
        f"training.batch_size={round(per_device * accumulated)} counts the examples of all processes, and {micro} "
        "those of one: multiply it by the number of GPUs"
    )
    t.move(epochs, "training.epochs")
    steps = t.number("max_steps")
    if steps is not None and steps > 0:
        t.set("training.max_steps", round(steps))
    _translate_optimizer(t, t.text(optimizer) or "adamw_torch", t.number("learning_rate") or rate)
    _translate_schedule(t, t.text(schedule) or default_schedule, steps)
    t.move("weight_decay", "training.weight_decay")
    t.move("max_grad_norm", "training.max_grad_norm")
    t.move("seed", "training.seed")


def _translate_optimizer(t: Translation, optimizer: str, rate: float) -> None:
    name = optimizer.lower()
    optimizers = _OPTIMIZERS | (_OF_WHOLE_MATRICES if t.values.get("adapter.kind") == "full" else {})
    if name not in optimizers:
        t.note(f"optimizer {optimizer} has no counterpart, and its learning rate {rate:g} would not fit another one")
        return
    t.set("training.optimizer", optimizers[name])
    t.set("training.learning_rate", rate)
    if name.startswith("paged") and optimizers[name] == "adamw":
        t.note(f"optimizer {optimizer} is AdamW here; its state is not paged (paged_adamw_8bit is)")
    if t.values.get("adapter.kind") == "full":
        return
    t.note(
        "training.optimizer and training.learning_rate are theirs; leave out both for spectral descent at its default "
        "rate, or set training.learning_rate=auto"
    )


def _translate_schedule(t: Translation, schedule: str, steps: float | None) -> None:
    name = schedule.lower()
    if name in _SCHEDULES:
        t.set("training.schedule", _SCHEDULES[name])
    else:
        t.note(f"schedule {schedule} has no counterpart; it is linear here")
    fraction, warmup = t.number("warmup_ratio"), t.number("warmup_steps")
    if warmup and 0 < warmup < 1:  # Transformers 5 has one key for both
        fraction, warmup = warmup, None
    if warmup and steps is not None and steps > 0:
        fraction = min(warmup / steps, 0.99)
    elif warmup:
        t.note(f"warmup_steps: {warmup:g} is a fraction here, training.warmup_fraction; the default 0.06 holds")
        return
    t.set("training.warmup_fraction", 0 if fraction is None else round(fraction, 4))


def translate_evaluation(t: Translation, eval_steps: float | None) -> None:
    """Steps between validations, and the checkpoints that stay."""
    if (limit := t.number("save_total_limit")) is not None and limit >= 1:
        t.set("training.save_total_limit", round(limit))
    if eval_steps is not None and eval_steps >= 1:
        t.set("training.eval_steps", round(eval_steps))
    elif eval_steps is not None and eval_steps > 0:
        t.note(f"eval_steps: {eval_steps:g} is a number of steps here, training.eval_steps; four validations are made")


def translate_held_out(t: Translation, name: str) -> None:
    """The part of the training data that is held out for validation, a fraction or a number of examples."""
    size = t.number(name)
    if size is not None and 0 < size < 1:
        t.set("data.validation_fraction", size)
    elif size is not None and size >= 1:
        t.set("data.num_validation", round(size))
    t.note(
        "SGM holds out validation data, by which it keeps the best checkpoint, and test data: see "
        "data.validation_fraction, data.test_fraction, data.validation, data.test"
    )


def translate_template(t: Translation, name: str) -> None:
    template = t.text(name)
    if template not in (None, "tokenizer_default"):
        t.note(f"{name}: {template}: SGM takes the chat template that comes with the tokenizer")


def translate_trust(t: Translation) -> None:
    if t.flag("trust_remote_code"):
        t.set("model.trust_remote_code", True)
        t.note("model.trust_remote_code=true runs the Python code that comes with the model; read it first")


def translate_whole(t: Translation) -> None:
    """All weights of the blocks are trained, without adapters."""
    t.set("adapter.kind", "full")
    t.note("adapter.kind=full trains the matrices of the blocks; adapter.also adds norms, embeddings and the head")


def translate_targets(t: Translation, modules: Any) -> None:
    """Which matrices have adapters. `modules` is a list, or a text with commas; `all`, `all-linear` are SGM's way."""
    names = modules if isinstance(modules, list) else [name.strip() for name in str(modules or "all").split(",")]
    if names not in (["all"], ["all-linear"]):
        t.note(f"target modules {describe(names)}: SGM trains all linear layers of the blocks, or what selection names")


def set_data_source(t: Translation, path: str, subset: str | None = None) -> None:
    """data.train for a file, data.name for a hub data set or a folder."""
    if inner_suffix(Path(path)) in ENDINGS:
        t.set("data.train", path)
    else:
        t.set("data.name", f"{path}:{subset}" if subset else path)


def set_sources(t: Translation, sources: Mapping[str, Translation], weights: Sequence[float] | None = None) -> None:
    """data.train or data.name for one source, data.mixture for several: what each was translated to.

    The keys of `sources` begin their notes. A source without data that SGM could name is left out; a note says why.
    """
    for name, source in sources.items():
        t.notes += [f"{name}: {note}" for note in source.notes]
        t.unneeded += [key for key in source.unneeded if key not in t.unneeded]
    if len(sources) == 1:
        t.values |= next(iter(sources.values())).values
        return
    entries = []
    for number, source in enumerate(sources.values()):
        entry = {key.removeprefix("data."): value for key, value in source.values.items()}
        if weights is not None:
            entry["weight"] = weights[number]
        if "train" in entry or "name" in entry:
            entries.append(entry)
    t.set("data.mixture", entries or None)


def set_format(t: Translation, layout: str, columns: Mapping[str, str | None]) -> None:
    """data.format of a language model's data, and data.columns."""
    t.set("data.format", layout)
    set_columns(t, next(known for known in LAYOUTS["causal-lm"] if known.name == layout), columns)


def set_pair_columns(t: Translation, loss: str, columns: Mapping[str, str | None]) -> None:
    """data.columns of data for `loss`: single answers with a label for kto, and pairs of answers for all others."""
    name = "verdict" if loss == "kto" else "preference"
    set_columns(t, next(known for known in LAYOUTS["preference"] if known.name == name), columns)


def set_columns(t: Translation, layout: Layout, columns: Mapping[str, str | None]) -> None:
    """data.columns for the roles whose column is not the one that SGM looks for."""
    chosen = {role: str(name) for role, name in columns.items() if name and str(name) != layout.column(role, {})}  # type: ignore[arg-type]
    t.set("data.columns", chosen or None)


def translate_preference(t: Translation, loss: str, beta: float | None, **numbers: float | None) -> None:
    """model.task=preference, its loss and what belongs to it. SGM computes what the base says before the training."""
    t.set("model.task", "preference")
    t.set("preference.loss", loss)
    t.set("preference.beta", beta)
    for name, number in numbers.items():
        t.set(f"preference.{name}", number)
