"""Makes a run fit into `memory.budget`: what it gives up for that, cheapest first (docs/estimate.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import host_memory_within_reach
from sgm_finetune.base.text import gib
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.architecture import can_recompute_blocks, read_model_config, why_not_at
from sgm_finetune.train.budget.estimate import estimate
from sgm_finetune.train.budget.needs import PHASES, Estimate
from sgm_finetune.train.budget.reuse import replaced, with_rank

SMALLEST_RANK = 4
SMALLEST_FRACTION = 0.25


@dataclass(frozen=True)
class Fitted:
    """A configuration that fits, its estimate, and the keys that changed, as `key=now (was before)`."""

    config: Config
    estimate: Estimate
    given_up: tuple[str, ...]


def fit(
    config: Config, prepared: PreparedData, budget: int, plan: Plan | None = None, held: int | None = None
) -> Fitted:
    """Returns `config`, changed until its predicted peak is within `budget` bytes.

    Each change concerns the phase that needs most. A test takes smaller batches, which keeps its results. A step or the
    probe takes, in this order: smaller micro-batches (the same gradient); checkpointing (the same gradient, parts of it
    computed twice), on a GPU with offload to the host; the base on disk, or in the host's memory if there is a GPU; a
    smaller rank; fewer layers, those nearest to the output. A given plan keeps its rank and layers. Where the weights
    alone are more than the budget, the base goes elsewhere first. Where whole matrices are trained, checkpointing comes
    before smaller micro-batches, whose gradients would have to be kept, and rank and another place are no choice.
    `held` is as in `estimate`.
    Raises UserError when all of this is not enough.
    """
    current = config
    cache: dict[tuple, Any] = {}
    while True:
        needed = estimate(current, prepared, plan, cache, held)
        if needed.firm_bytes <= budget:
            return Fitted(current, needed, tuple(_changes(config, current)))
        fixed = needed.weights_bytes + needed.process_bytes
        if fixed > budget and (moved := _elsewhere(current, prepared)) is not None:
            current = moved
            continue
        if fixed > budget:
            raise UserError(
                f"memory.budget={gib(budget)} is not enough: weights, libraries and data take {gib(fixed)} before "
                f"the run computes anything; {_smaller_weights(current)}"
            )
        smaller = _concession(current, prepared, needed, plan) or _elsewhere(current, prepared)
        if smaller is None:
            raise UserError(
                f"memory.budget={gib(budget)} is not enough: {PHASES[needed.firm_phase]} needs "
                f"{gib(needed.firm_bytes)} with every other setting at its smallest ({gib(needed.weights_bytes)} "
                f"weights, {gib(needed.process_bytes)} libraries and data); {_smaller_weights(current)}, or a smaller "
                "data.max_length"
            )
        current = smaller


def _concession(config: Config, prepared: PreparedData, needed: Estimate, plan: Plan | None) -> Config | None:
    """`config` with the cheapest change that makes its largest phase smaller, or None when none is left."""
    training = config.training
    match needed.firm_phase:
        case "test" | "validate" | "test after" if training.eval_batch_size > 1:
            return replaced(config, "training", eval_batch_size=training.eval_batch_size // 2)
        case "step":
            return _smaller_step(config, prepared, needed, plan)
        case "probe" if needed.micro_batch_size > 1:  # the probe's pieces are half a micro-batch
            return _smaller_step(config, prepared, needed, plan)
    return None


def _smaller_step(config: Config, prepared: PreparedData, needed: Estimate, plan: Plan | None) -> Config | None:
    batch, checkpointing = _smaller_micro_batch(config, needed), _more_checkpointing(config, prepared)
    for changed in (checkpointing, batch) if config.is_full else (batch, checkpointing):
        if changed is not None:
            return changed
    if (moved := _elsewhere(config, prepared)) is not None:
        return moved
    if plan is not None:
        return None
    if config.adapter.rank > SMALLEST_RANK and not config.is_full:
        return with_rank(config, max(SMALLEST_RANK, config.adapter.rank // 2))
    fraction = config.selection.top_fraction or 1.0
    if fraction > SMALLEST_FRACTION and config.selection.snr_threshold is None:
        return replaced(config, "selection", top_fraction=max(SMALLEST_FRACTION, fraction / 2), by="depth")
    return None


def _smaller_micro_batch(config: Config, needed: Estimate) -> Config | None:
    if needed.micro_batch_size == 1:
        return None
    divisors = (n for n in range(needed.micro_batch_size // 2, 0, -1) if config.training.batch_size % n == 0)
    return replaced(config, "training", micro_batch_size=next(divisors))


def _more_checkpointing(config: Config, prepared: PreparedData) -> Config | None:
    checkpointing = config.training.checkpointing
    if not can_recompute_blocks(config.model, read_model_config(config.model, prepared.folder)):
        return None
    if not checkpointing:
        return replaced(config, "training", checkpointing=True)
    return replaced(config, "training", checkpointing="offload") if checkpointing != "offload" and has_gpu() else None


def _elsewhere(config: Config, prepared: PreparedData) -> Config | None:
    """`config` with the base on disk, or in the host's memory if there is a GPU; None where it is there, or cannot or
    must not be."""
    place = _other_place()
    if config.model.residence is not None or config.training.shard or config.is_full:
        return None
    described = read_model_config(config.model, prepared.folder)
    if why_not_at(place, config.model, described) is not None:
        return None
    moved = replaced(config, "model", residence=place)
    if place == "disk" or config.training.checkpointing:
        return moved
    if not can_recompute_blocks(config.model, described):
        return None
    return replaced(moved, "training", checkpointing=True)


def _other_place() -> Literal["host", "disk"]:
    return "host" if has_gpu() else "disk"


def _changes(before: Config, now: Config) -> list[str]:
    changes = []
    for section, values in before.model_dump().items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            current = getattr(getattr(now, section), key)
            if current != value:
                changes.append(f"{section}.{key}={_format_value(current)} (was {_format_value(value)})")
    return changes


def _format_value(value: Any) -> str:
    """A value as config.yaml writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"


def _smaller_weights(config: Config) -> str:
    """A remedy: how to make the weights smaller."""
    if config.is_full:
        return (
            "try model.dtype=bfloat16, or a smaller model" if config.model.dtype == "float32" else "try a smaller model"
        )
    remedies = ["model.quantization=nf4"] if config.model.quantization == "none" else []
    place, shard = _other_place(), config.training.shard
    if config.model.residence != place and not shard and why_not_at(place, config.model) is None:
        remedies.append(f"model.residence={place}")
    return f"try {' or '.join(remedies) or 'a smaller model'}"


def check_fits(needed: Estimate, within_reach: int, config: Config) -> None:
    """Raises UserError, with a remedy, when a run needs more than the `within_reach` bytes of memory."""
    if needed.host_bytes > (host := host_memory_within_reach()):
        raise UserError(
            f"model.residence=host keeps {gib(needed.host_bytes)} of base in the host's memory, and {gib(host)} are "
            f"within reach there; try {'model.quantization=nf4 or ' if config.model.quantization == 'none' else ''}a "
            "smaller model"
        )
    if needed.firm_bytes <= within_reach:
        return
    remedy = _smaller_weights(config)
    if needed.weights_bytes + needed.process_bytes < within_reach:
        remedy = f"memory.budget={within_reach / 2**30:.1f}GiB finds what fits"
    raise UserError(
        f"This run needs about {gib(needed.firm_bytes)} of memory ({PHASES[needed.firm_phase]}), and "
        f"{gib(within_reach)} are within reach on this {needed.device}; {remedy}"
    )
