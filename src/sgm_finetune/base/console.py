"""What a command prints while it works: one line a step, progress bars; and the seconds that each step takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Span, Text

from sgm_finetune.base.text import printable

_NARROWEST = 20
"""Columns beside its head that a line keeps in however narrow a terminal."""


class PrintableConsole(Console):
    """A console on which text never commands the terminal: only rich's own styles and movements do.

    Every command prints on one, so that no name, datum or answer needs care where it is printed.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):  # before its lines are broken, since an escape code is longer
            renderable = _printable_text(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _printable_text(text: Text) -> Text:
    """`text` with escape codes, and its styles where they were.

    >>> _printable_text(Text.assemble("a\\x1b", ("b", "bold"))).spans
    [Span(5, 6, 'bold')]
    """
    shown = printable(text.plain)
    if shown == text.plain:
        return text
    places = [0]
    for character in text.plain:
        places.append(places[-1] + len(printable(character)))
    cleaned = text.blank_copy(shown)
    cleaned.spans = [Span(places[span.start], places[min(span.end, len(text))], span.style) for span in text.spans]
    return cleaned


def print_line(console: Console, line: str, head: str | Text = "", style: str = "") -> None:
    """Prints `line` as it is after `head` (bold, unless it is a Text): brackets in names and paths are not markup.

    A terminal shows it broken between words, and the lines that follow begin below the first one's begin. A word that
    is longer than the terminal is wide stays whole, so that a path can be copied. Elsewhere it is one line, which
    scripts can read.
    """
    begin = Text(head, "bold") if isinstance(head, str) else head
    hang = " " * begin.cell_len
    width = max(_NARROWEST, console.width - len(hang)) if console.is_terminal else None
    for part in _broken(line, width):
        console.print(begin + Text(part, style), soft_wrap=True)
        begin = Text(hang)


def _broken(line: str, width: int | None) -> list[str]:
    """The lines of `line`, each broken between words into lines of `width` columns (None: not broken).

    rich's Text.wrap cuts long words, and textwrap counts a wide character as one column.

    >>> _broken("a path: /home/somebody/here\\nb c", 8)
    ['a path:', '/home/somebody/here', 'b c']
    """
    lines = []
    for paragraph in line.split("\n"):
        first, *words = paragraph.split(" ")
        lines.append(first)
        for word in words:
            if width is None or cell_len(lines[-1]) + 1 + cell_len(word) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return lines


@contextmanager
def loading(what: str = "PyTorch and Transformers", quiet: bool = False) -> Iterator[None]:
    """Says on stderr that the next seconds load libraries: a spinner, which is gone when they are there.

    Says nothing where stderr is no terminal, since a file of errors would keep the line, and on processes other than
    the first.
    """
    console = PrintableConsole(stderr=True)
    if quiet or not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    with console.status(f"Loading {what} ..."):
        yield


class StepLog:
    """Prints one line a step, and progress bars, on a console. Processes other than the first get a quiet console."""

    def __init__(self, console: Console):
        self.console = console

    def line(self, step: str, line: str) -> None:
        print_line(self.console, line, f"{step:<8} ")

    @contextmanager
    def bar(self, step: str) -> Iterator[Callable[..., None]]:
        """Shows a progress bar while the context lasts; yields a function (done, total, *what) that moves it."""
        columns = (TextColumn(f"[bold]{step:<8}[/bold]"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(step, total=None)
            yield lambda done, total, *what: progress.update(task, completed=done, total=total)


@dataclass
class Clock:
    """Seconds spent in each step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
