"""One finding of `sgm doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["works", "slow", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    broken: `sgm finetune` cannot run. missing: an optional part is absent. slow: it works, but slowly or tightly.
    """

    area: str
    verdict: Verdict
    text: str
    remedy: str = ""
