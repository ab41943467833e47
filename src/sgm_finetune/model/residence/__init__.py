"""A frozen base that stays on disk: its files, their place in memory, and which block of them is resident."""
