"""How the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""Arguments of Transformers' `generate` for the likeliest token always."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token always."""
    top_p: float = 1.0
    """Samples from the likeliest tokens that together hold this probability."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of Transformers' `generate`."""
        if self.temperature == 0:
            return dict(GREEDY)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
