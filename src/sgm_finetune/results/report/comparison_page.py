"""A comparison for people: on the terminal, and as a page."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgm_finetune.results.report.comparison import RunComparison
from sgm_finetune.results.report.formats import NOTHING
from sgm_finetune.results.report.render import render
from sgm_finetune.results.report.training_figures import RUN_COLOURS, compared_losses_figure


def print_comparison(comparison: RunComparison, console: Console) -> None:
    """A column a run; the better value of a measure is bold with a star."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("↑ higher, ↓ lower is better", overflow="fold")
    for name, alike in zip(comparison.names, comparison.tested_alike, strict=True):
        table.add_column(Text(name if alike else f"{name}\n(other test data)"), justify="right", overflow="fold")
    for row in comparison.rows:
        cells = [Text(f"{text} *", "bold") if at == row.best else Text(text) for at, text in enumerate(row.texts)]
        table.add_row(row.label, *cells)
    if comparison.differing:
        table.add_section()
        for key, values in comparison.differing.items():
            table.add_row(Text(key), *(Text(shown(value)) for value in values))
    console.print(table)
    for line in (comparison.verdict, *comparison.remarks):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def render_comparison(comparison: RunComparison) -> str:
    """The page, with the runs' curves over each other."""
    curves = [(name, run.history) for name, run in zip(comparison.names, comparison.runs, strict=True)]
    return render(
        "compare.html.j2",
        comparison=comparison,
        colours=[RUN_COLOURS[at % len(RUN_COLOURS)] for at in range(len(curves))],
        figures=[
            (figure, caption)
            for figure, caption in (
                (
                    compared_losses_figure(curves, "loss", "Training loss by step"),
                    "Training loss (faint: of each step)",
                ),
                (compared_losses_figure(curves, "eval_loss", "Validation loss by step"), "Validation loss"),
            )
            if figure is not None
        ],
        differing=[(key, [shown(value) for value in values]) for key, values in comparison.differing.items()],
    )


def shown(value: object) -> str:
    """As YAML has it.

    >>> [shown(v) for v in (None, True, 0.5, "auto")]
    ['–', 'true', '0.5', 'auto']
    """
    if value is None:
        return NOTHING
    return str(value).lower() if isinstance(value, bool) else str(value)
