"""The keys that `memory.budget` may change, and how a resumed run keeps the values that it began with."""

from __future__ import annotations

from typing import Any

from sgm_finetune.base.config import Config

ADJUSTABLE = {
    "training": ("micro_batch_size", "eval_batch_size", "checkpointing"),
    "adapter": ("rank", "alpha"),
    "selection": ("top_fraction", "prefer_depth"),
}
"""The keys that `fit` may change, by section."""


def reuse_fit(config: Config, earlier: Config, asked: Config | None = None) -> Config:
    """Returns `config` with the settings that `fit` found when the run began, if the budget is the same.

    `earlier` is the fitted configuration of the run, `asked` the one that it was fitted from (default: `config`). A key
    that differs between `asked` and `config` was changed by the user since, and keeps the user's value.
    """
    if config.memory.budget is None or config.memory.budget != earlier.memory.budget:
        return config
    asked = asked or config
    for section, keys in ADJUSTABLE.items():
        now, then, began = (getattr(part, section) for part in (config, asked, earlier))
        unchanged = {key: getattr(began, key) for key in keys if getattr(now, key) == getattr(then, key)}
        config = replaced(config, section, **unchanged)
    return config


def replaced(config: Config, section: str, **values: Any) -> Config:
    """`config` with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
