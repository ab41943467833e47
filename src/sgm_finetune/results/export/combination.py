"""Which adapters an export combines, with which weights and how: what `sgm export --add` was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.files import PTH

Method = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
"""PEFT's names for the ways to combine adapters."""
_EXACT: tuple[Method, ...] = ("cat", "linear", "svd")
"""Methods that use every number of the factors; the others prune them and need a density."""
OF_ONE_RANK: tuple[Method, ...] = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that combine the factors number by number."""


@dataclass(frozen=True)
class Combination:
    """The adapter of a result, and others of the same base."""

    others: tuple[Path, ...]
    """Output folders of runs, or folders of PEFT adapters."""
    weights: tuple[float, ...]
    """The first is that of the result itself."""
    method: Method = "cat"
    density: float | None = None
    """Share of the numbers that a method which prunes keeps, in (0, 1]."""

    def check(self) -> None:
        """Raises UserError for what is wrong before anything is read."""
        if len(self.weights) != 1 + len(self.others):
            raise UserError(
                f"--weights has {len(self.weights)}, and there are {1 + len(self.others)} adapters: that of output.dir "
                "and each --add"
            )
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise UserError("--weights are finite numbers, and not all of them are 0")
        prunes = self.method not in _EXACT
        if prunes and (self.density is None or not 0 < self.density <= 1):
            raise UserError(
                f"--method {self.method} needs --density, the share of the numbers that it keeps, above 0 and at most "
                "1: for example --density 0.5"
            )
        if self.density is not None and not prunes:
            raise UserError(f"--density is for methods that prune, and --method {self.method} keeps everything")
        for folder in self.others:
            if not ((folder / PTH).is_file() or (folder / "adapter_config.json").is_file()):
                raise UserError(f"--add {folder} holds neither {PTH} nor adapter_config.json; name a run or an adapter")

    def to_dict(self) -> dict[str, Any]:
        """The combination as plain data."""
        return {
            "others": [str(folder) for folder in self.others],
            "weights": list(self.weights),
            "method": self.method,
            "density": self.density,
        }


def parse_weights(text: str) -> tuple[float, ...]:
    """The numbers of `--weights`. Raises UserError for anything else.

    >>> parse_weights("0.7,-0.3")
    (0.7, -0.3)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--weights {text[:60]} are no numbers with commas between them, such as 0.7,0.3") from None
