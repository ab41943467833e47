"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

from sgm_finetune.report.page import render_report

__all__ = ["render_report"]
