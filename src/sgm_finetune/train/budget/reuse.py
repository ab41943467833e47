"""The keys that `memory.budget`, `adapter.parameters` and `training.learning_rate=auto` may change, and how a resumed
run keeps the values that it began with."""

from __future__ import annotations

from typing import Any

from sgm_finetune.base.config import Config

ADJUSTABLE = {
    "model": ("residence",),
    "training": ("micro_batch_size", "eval_batch_size", "checkpointing"),
    "adapter": ("rank", "alpha"),
    "selection": ("top_fraction", "by"),
}
"""The keys that `fit` may change, by section."""
OF_RANK = {"adapter": ("rank", "alpha")}
"""The keys that `adapter.parameters` and a given plan decide, by section."""


def reuse_fit(config: Config, earlier: Config, asked: Config | None = None) -> Config:
    """Returns `config` with the settings that were chosen when the run began: by `fit`, if the budget of memory is the
    same, by `fit_parameters`, by a given plan, and by trials of the learning rate.

    `earlier` is the fitted configuration of the run, `asked` the one that it was fitted from (default: `config`). A key
    that differs between `asked` and `config` was changed by the user since, and keeps the user's value.
    """
    chosen = {} if earlier.adapter.parameters is None and earlier.plan is None else OF_RANK
    if config.memory.budget is not None and config.memory.budget == earlier.memory.budget:
        chosen = ADJUSTABLE
    asked = asked or config
    for section, keys in chosen.items():
        now, then, began = (getattr(part, section) for part in (config, asked, earlier))
        unchanged = {key: getattr(began, key) for key in keys if getattr(now, key) == getattr(then, key)}
        config = replaced(config, section, **unchanged)
    if config.training.learning_rate == asked.training.learning_rate == "auto":
        config = replaced(config, "training", learning_rate=earlier.training.learning_rate)
    return config


def with_rank(config: Config, rank: int) -> Config:
    """`config` with another rank, and alpha in the same ratio to it."""
    adapter = config.adapter
    if rank == adapter.rank:
        return config
    return replaced(config, "adapter", rank=rank, alpha=adapter.alpha * rank / adapter.rank)


def replaced(config: Config, section: str, **values: Any) -> Config:
    """`config` with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
