"""What a command prints while it works: one line a step, progress bars; and the seconds that each step takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def loading(what: str = "PyTorch and Transformers", quiet: bool = False) -> Iterator[None]:
    """Says on stderr that the next seconds load libraries: a spinner, which is gone when they are there.

    Says nothing where stderr is no terminal, since a file of errors would keep the line, and on processes other than
    the first.
    """
    console = Console(stderr=True)
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
        """Prints the line as it is: brackets in names and paths are not markup."""
        self.console.print(f"[bold]{step:<8}[/bold] {escape(line)}", highlight=False, soft_wrap=True)

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
