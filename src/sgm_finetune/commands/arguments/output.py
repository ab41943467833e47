"""Where a command prints: results, what it does meanwhile, and what `sgm --quiet` keeps back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_OPTIONS = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """From now on, commands print nothing but their results and errors if `quiet`."""
    _OPTIONS["quiet"] = quiet


def loading(what: str = "PyTorch and Transformers") -> AbstractContextManager[None]:
    """Says what the seconds before the first step are for."""
    from sgm_finetune.base import console

    return console.loading(what, _OPTIONS["quiet"])


def console_for(to_stderr: bool, result: bool = False) -> Any:
    """The console on which a command prints what it does, or its result, which --quiet lets through."""
    from sgm_finetune.base.console import PrintableConsole

    return PrintableConsole(stderr=to_stderr, quiet=_OPTIONS["quiet"] and not result)


def announce(to_stderr: bool) -> Callable[[str], None]:
    """Prints what the command line replaces in the configuration; the first process does it for all of them."""
    from sgm_finetune.base.console import StepLog

    first = os.environ.get("RANK", "0") == "0"
    return lambda line: StepLog(console_for(to_stderr)).line("config", line) if first else None


def print_saved(console: Any, what: object) -> None:
    from sgm_finetune.base.console import StepLog

    StepLog(console).line("saved", str(what))
