"""An estimate as text: one line, and a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from sgm_finetune.base.text import about, gib, mib
from sgm_finetune.train.budget.needs import PHASES, Estimate

_PARTS = {
    "process_bytes": "libraries and data",
    "weights_bytes": "weights",
    "adapter_bytes": "adapters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activation_bytes": "activations",
    "logits_bytes": "logits",
}


def describe_estimate(needed: Estimate, within_reach: int) -> str:
    """One line: the peak memory, its phase and the weights' part of it, then disk space and time."""
    parts = [
        f"about {gib(needed.peak_bytes)} at most ({PHASES[needed.peak_phase]}), "
        f"{gib(needed.weights_bytes)} of it weights; {gib(within_reach)} within reach",
        f"{mib(needed.disk_bytes)} on disk",
        *([f"{gib(needed.store_bytes)} of base in SGM's cache"] if needed.store_bytes else []),
        *([f"{gib(needed.host_bytes)} of base in the host's memory"] if needed.host_bytes else []),
        *([f"a step reads {gib(needed.read_bytes)} of base from {_source(needed)}"] if needed.read_bytes else []),
        f"about {about(sum(needed.seconds.values()))} after the scan",
    ]
    return " · ".join(parts)


def estimate_table(needed: Estimate, within_reach: int) -> Table:
    """The parts of a training step, then the memory of every phase, disk space and time."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    where = f"micro-batch of {needed.micro_batch_size}, the longest of {needed.longest} tokens"
    table.add_row("[bold]a step consists of[/bold]", "MiB", where)
    for key, name in _PARTS.items():
        table.add_row(f"  {name}", _in_mib(getattr(needed, key)))
        if key == "weights_bytes" and needed.mapped_bytes:
            table.add_row(
                "    on disk", _in_mib(needed.mapped_bytes), "a block, and what is read of output layer or embeddings"
            )
    table.add_row(
        "[bold]most memory while[/bold]", "MiB", f"on this {needed.device}: {_in_mib(within_reach)} within reach"
    )
    for phase, num_bytes in needed.phases.items():
        table.add_row(f"  {PHASES[phase]}", _in_mib(num_bytes), "peak" if phase == needed.peak_phase else "")
    if needed.host_bytes:
        table.add_row("[bold]host[/bold]", _in_mib(needed.host_bytes), "the base, in the host's memory")
    table.add_row("[bold]disk[/bold]", _in_mib(needed.disk_bytes), "what is trained, checkpoints")
    if needed.store_bytes:
        table.add_row("  the base's blocks", _in_mib(needed.store_bytes), "in SGM's cache, once for all runs")
    table.add_row("[bold]time after the scan[/bold]", "s", f"{needed.steps:,} steps, at this machine's speed")
    if needed.read_bytes:
        what = f"{gib(needed.read_bytes)} of base from {_source(needed)}, at {gib(needed.read_rate)}/s"
        table.add_row("  of that, a step's reading", f"{needed.read_bytes / needed.read_rate:,.0f}", what)
    for what, seconds in needed.seconds.items():
        table.add_row(f"  {what.replace('_', ' ')}", f"{seconds:,.0f}")
    return table


def _source(needed: Estimate) -> str:
    """Where a step reads the base from."""
    return "the host's memory" if needed.host_bytes else "the disk"


def _in_mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"
