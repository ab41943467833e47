"""What can become of a test example in training."""

from __future__ import annotations

from typing import Literal

Became = Literal["mended", "spoilt", "other", "right"]
"""Right now (or closer), wrong now (or further away), still wrong (or equally far), still right."""

SHOWN_SORTS: tuple[Became, ...] = ("mended", "spoilt", "other")
"""Those of which the report shows examples."""
SORTS: tuple[Became, ...] = (*SHOWN_SORTS, "right")
