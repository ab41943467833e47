"""How a command ends: signals, memory, lost processes, one line on stderr and an exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sgm_finetune.base.errors import in_one_line


class Terminated(BaseException):
    """A signal other than Ctrl-C's, which nothing but the end of the program answers."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and a closed terminal as exceptions, so that half-written files and locks go; training has its own."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    caught = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    caught = [number for number in caught if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores one of them
    if threading.current_thread() is not threading.main_thread():
        caught = []
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's exception of a GPU's memory, and what its allocator of the host's says."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _out_of_memory(error: BaseException) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+|\d+ bytes)", str(error))
    what = f" ({asked[1]} more were asked for)" if asked else ""
    return (
        f"The memory is not enough{what}; take a smaller training.micro_batch_size, training.checkpointing=true or "
        "memory.budget, which chooses; a run that saved a checkpoint goes on with these and training.resume=true"
    )


def _peer_is_gone(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process no longer answers."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from torch.distributed import DistNetworkError

    words = (
        "connection closed by peer",
        "connection reset",
        "broken pipe",
        "connection refused",
        "remote process exited",
    )
    return isinstance(error, DistNetworkError) or any(word in str(error).lower() for word in words)


def _fail(line: str, status: int) -> None:
    """One line on stderr, from the first process only, and the exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(in_one_line(line), file=sys.stderr, flush=True)
    sys.exit(status)
