"""One model answers several people: one at a time, and nobody waits for an answer that nobody wants any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from sgm_finetune.commands.server import ENDS

MODEL_LOCK = threading.Lock()
"""One model answers as before and after, with its adapter off and on, so it answers one question at a time."""

T = TypeVar("T")


class Left(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for the answer any more, or the server ends."""


def start(
    compute: Callable[[Callable[[T], None]], object], put: Callable[[T | BaseException | None], object]
) -> threading.Event:
    """Calls `compute(show)` when the model is free, in a thread that does not outlive the server.

    `put` gets each piece that is shown, and at the end None or the exception that ended it. The computation ends at its
    next piece when the returned event is set or the server ends.
    """
    left = threading.Event()

    def show(piece: T) -> None:
        if left.is_set() or ENDS.is_set():
            raise Left
        put(piece)

    def work() -> None:
        try:
            with MODEL_LOCK:
                if left.is_set() or ENDS.is_set():
                    raise Left
                compute(show)
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, daemon=True).start()
    return left


def wait_for_last() -> None:
    """Waits a moment until the model answers nobody: an answer ends at its next token when the server ends."""
    MODEL_LOCK.acquire(timeout=3)
