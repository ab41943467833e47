"""How the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""Arguments of Transformers' `generate` for the likeliest token always."""
COLDEST = 1e-4
"""Below this temperature, scores divided by it may be infinite, and the likeliest token has all of the probability."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0, or less than COLDEST, takes the likeliest token always."""
    top_p: float = 1.0
    """Samples from the likeliest tokens that together hold this probability."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of Transformers' `generate`."""
        if self.temperature < COLDEST:
            return dict(GREEDY)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
