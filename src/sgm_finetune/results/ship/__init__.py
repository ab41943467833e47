"""The gate before shipping: what is measured before and after, and the rules that decide (docs/tutorials/ship.md)."""
