"""Shows a sweep on the terminal and as an HTML page."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from sgm_finetune.base.search_space import SearchSpace
from sgm_finetune.results.report.formats import count, decimal, duration
from sgm_finetune.results.report.render import render
from sgm_finetune.results.sweep_folder import Sweep, describe, ranked
from sgm_finetune.train.tries import Try

_MOST_ROWS = 15
"""Tries in the table on the terminal; the page has all."""


def sweep_table(found: Sweep) -> Table:
    """The tries by their validation loss, the best ones first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("try", justify="right")
    for key in found.ranges:
        table.add_column(Text(key.rpartition(".")[2]), justify="right", overflow="fold")
    for name in ("loss", "steps", "parameters", "time", ""):
        table.add_column(name, justify="right")
    for one in ranked(found.tries)[:_MOST_ROWS]:
        cells = [str(one.number), *(one.settings[key] for key in found.ranges), *_numbers(one)]
        words = {"complete": "best" if one == found.winner else "", "pruned": "stopped", "failed": "failed"}
        table.add_row(*map(Text, [*cells, words[one.state]]), style="bold" if one == found.winner else None)
    if (more := len(found.tries) - _MOST_ROWS) > 0:
        table.add_row("…", Text(f"{more} more"))
    return table


def _numbers(one: Try) -> list[str]:
    """Loss, steps, parameters and time of a try, as texts."""
    return [decimal(one.loss, 4), count(one.steps), count(one.trainable_parameters), duration(one.seconds)]


def _remark(found: Sweep, one: Try) -> str:
    return "best" if one == found.winner else one.reason or ""


def render_sweep(found: Sweep, space: SearchSpace) -> str:
    """The HTML page of a sweep of which a try is complete."""
    from sgm_finetune.results.report.sweep_figures import course_figure, key_figure, tries_figure  # loads matplotlib

    best = found.winner
    assert best is not None
    figures = [
        (tries_figure(found.tries, best), "Validation loss of each try, and the lowest so far."),
        *(
            (key_figure(part, found.tries, best, f"sweep-key-{index}"), f"Validation loss by {part.key}.")
            for index, part in enumerate(space.ranges)
        ),
        (course_figure(found.tries, best), "Validation losses in the course of each training; the best try in colour."),
    ]
    states = [one.state for one in found.tries]
    return render(
        "sweep.html.j2",
        found=found,
        best=best,
        settings=describe(best.settings),
        counts={state: states.count(state) for state in ("complete", "pruned", "failed")},
        figures=figures,
        rows=[
            (one, [one.settings[key] for key in found.ranges], _numbers(one), _remark(found, one))
            for one in ranked(found.tries)
        ],
    )
