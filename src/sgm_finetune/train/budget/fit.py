"""A run that fits into `memory.budget`: what it gives up for that, the least costly first (docs/estimate.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import gib
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.method.plan import Plan
from sgm_finetune.train.budget.estimate import Estimate, estimate

FITTED = {
    "training": ("micro_batch_size", "eval_batch_size", "checkpointing"),
    "adapter": ("rank", "alpha"),
    "selection": ("top_fraction", "prefer_depth"),
}
"""What `fit` may change."""


PHASES = {
    "load": "loading",
    "test": "testing the untouched model",
    "probe": "probing",
    "step": "training",
    "validate": "validating",
    "test after": "testing",
}
"""In words."""


SMALLEST_RANK = 4


SMALLEST_FRACTION = 0.25


@dataclass(frozen=True)
class Fitted:
    """The configuration that fits, what it will need, and the keys that were changed: `key: before -> now`."""

    config: Config
    estimate: Estimate
    given_up: tuple[str, ...]


def fit(config: Config, prepared: PreparedData, budget: int, plan: Plan | None = None) -> Fitted:
    """Changes `config` until its predicted peak is within `budget` bytes, always in the phase that needs most.

    A test takes smaller batches: its results stay. A step, and with it the probe, takes smaller micro-batches (the same
    gradient), then checkpointing (the same gradient, computed partly twice; then, on a GPU, from what the host holds),
    then a smaller rank, then fewer layers, the ones nearest to the output; a given plan's rank and layers stay. Raises
    UserError where that is not enough.
    """
    first = found = config
    followed: dict[tuple, Any] = {}
    while True:
        needed = estimate(found, prepared, plan, followed)
        if needed.firm_bytes <= budget:
            return Fitted(found, needed, tuple(_changes(first, found)))
        if (fixed := needed.weights_bytes + needed.process_bytes) > budget:
            raise UserError(
                f"memory.budget={gib(budget)} is not enough: weights, libraries and data take {gib(fixed)} before "
                f"anything is computed; {_lighter(config)}"
            )
        smaller = _concession(found, needed, plan)
        if smaller is None:
            raise UserError(
                f"memory.budget={gib(budget)} is not enough: {PHASES[needed.firm_phase]} needs "
                f"{gib(needed.firm_bytes)} with all else as small as it gets, {gib(needed.weights_bytes)} of it "
                f"weights, {gib(needed.process_bytes)} libraries and data; {_remedy(found)}"
            )
        found = smaller


def _concession(config: Config, needed: Estimate, plan: Plan | None) -> Config | None:
    training = config.training
    match needed.firm_phase:
        case "test" | "validate" | "test after" if training.eval_batch_size > 1:
            return _with(config, "training", eval_batch_size=training.eval_batch_size // 2)
        case "step":
            return _smaller_step(config, needed, plan)
        case "probe" if needed.micro_batch_size > 1:  # its pieces are of half of that
            return _smaller_step(config, needed, plan)
    return None


def _smaller_step(config: Config, needed: Estimate, plan: Plan | None) -> Config | None:
    training = config.training
    if needed.micro_batch_size > 1:
        divisors = (n for n in range(needed.micro_batch_size // 2, 0, -1) if training.batch_size % n == 0)
        return _with(config, "training", micro_batch_size=next(divisors))
    if not training.checkpointing:
        return _with(config, "training", checkpointing=True)
    if training.checkpointing != "offload" and has_gpu():
        return _with(config, "training", checkpointing="offload")
    if plan is not None:
        return None
    if config.adapter.rank > SMALLEST_RANK:
        rank = max(SMALLEST_RANK, config.adapter.rank // 2)
        return _with(config, "adapter", rank=rank, alpha=config.adapter.alpha * rank / config.adapter.rank)
    fraction = config.selection.top_fraction or 1.0
    if fraction > SMALLEST_FRACTION and config.selection.snr_threshold is None:
        return _with(config, "selection", top_fraction=max(SMALLEST_FRACTION, fraction / 2), prefer_depth=True)
    return None


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _changes(before: Config, now: Config) -> list[str]:
    found = []
    for section, values in before.model_dump().items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if (changed := getattr(getattr(now, section), key)) != value:
                found.append(f"{section}.{key}={_written(changed)} (was {_written(value)})")
    return found


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool | str) else f"{value:g}"


def _remedy(config: Config) -> str:
    return f"{_lighter(config)}, or a smaller data.max_length"


def _lighter(config: Config) -> str:
    return "try model.quantization=nf4" if config.model.quantization == "none" else "try a smaller model"


def as_begun(config: Config, earlier: Config, asked: Config | None = None) -> Config:
    """`config` with what was fitted to the same budget when its run began. Of `asked`, what it began from, a key that
    differs from it now was changed by a person since, and stays as it is."""
    if config.memory.budget is None or config.memory.budget != earlier.memory.budget:
        return config
    asked = asked or config
    for section, keys in FITTED.items():
        now, then, began = (getattr(part, section) for part in (config, asked, earlier))
        fitted = {key: getattr(began, key) for key in keys if getattr(now, key) == getattr(then, key)}
        config = _with(config, section, **fitted)
    return config


def check_fits(needed: Estimate, within_reach: int, config: Config) -> None:
    """Raises UserError, with what would help, where a run needs more memory than there is."""
    if needed.firm_bytes <= within_reach:
        return
    fixed = needed.weights_bytes + needed.process_bytes
    helps = f"memory.budget={within_reach / 2**30:.1f}GiB finds what fits" if fixed < within_reach else _lighter(config)
    raise UserError(
        f"This run needs about {gib(needed.firm_bytes)} of memory ({PHASES[needed.firm_phase]}), and "
        f"{gib(within_reach)} are within reach on this {needed.device}; {helps}"
    )
