"""Whole matrices: trained in the backward pass, kept as what changed (docs/full.md)."""
