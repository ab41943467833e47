"""Shows a comparison of runs on the terminal and as an HTML page."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgm_finetune.base.console import print_line
from sgm_finetune.results.report.comparison import RunComparison, value_of
from sgm_finetune.results.report.render import render


def print_comparison(comparison: RunComparison, console: Console) -> None:
    """Prints one column for each run. The best value of a metric is bold and has a star."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("↑ higher, ↓ lower is better", overflow="fold")
    for name, alike in zip(comparison.names, comparison.tested_alike, strict=True):
        table.add_column(Text(name if alike else f"{name}\n(other test data)"), justify="right", overflow="fold")
    for row in comparison.rows:
        cells = [Text(text) for text in row.texts]
        if row.best is not None:
            cells[row.best] = Text(f"{row.texts[row.best]} *", "bold")
        table.add_row(row.label, *cells)
    if comparison.differing:
        table.add_section()
        for key in comparison.differing:
            table.add_row(Text(key), *(Text(value_of(run, key)) for run in comparison.runs))
    console.print(table)
    for line in (comparison.verdict, *comparison.remarks):
        print_line(console, line)


def render_comparison(comparison: RunComparison) -> str:
    """Returns the HTML page, with the loss curves of all runs in one figure."""
    from sgm_finetune.results.report.training_figures import RUN_COLOURS, compared_losses_figure  # loads matplotlib

    curves = [(name, run.history) for name, run in zip(comparison.names, comparison.runs, strict=True)]
    figures = [
        (compared_losses_figure(curves, "loss", "Training loss by step"), "Training loss (bold: running mean)"),
        (compared_losses_figure(curves, "eval_loss", "Validation loss by step"), "Validation loss"),
    ]
    return render(
        "compare.html.j2",
        comparison=comparison,
        colours=[RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(curves))],
        figures=[(figure, caption) for figure, caption in figures if figure is not None],
        differing=[(key, [value_of(run, key) for run in comparison.runs]) for key in comparison.differing],
    )
