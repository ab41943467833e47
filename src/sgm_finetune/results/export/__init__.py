"""Bringing a result into the formats that other programs load, each compared with what was trained (docs/export.md)."""
