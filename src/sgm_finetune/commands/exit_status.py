"""How a command ends: the exit status, and one line on stderr for what a person can fix.

Exit status: 0 done; 2 something a person can fix (one line on stderr); 1 our fault (a traceback); 130 interrupted by
Ctrl-C, and 128 plus its number for another signal.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

import typer

from sgm_finetune.base.errors import UserError, in_one_line, is_out_of_memory
from sgm_finetune.base.text import printable


class Terminated(BaseException):
    """A signal other than Ctrl-C's. Only the end of the program answers it."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


def run_and_exit(command: Callable[[], object]) -> NoReturn:
    """Runs `command` and exits with its status. Unexpected exceptions pass through, with their traceback."""
    sys.excepthook = _print_traceback
    try:
        with _signals_as_exceptions():
            command()
    except UserError as error:
        fail(str(error), 2)
    except typer.TyperException as error:
        fail(f"{error.format_message()} (sgm --help lists what there is)", 2)
    except Terminated as error:
        fail(f"Ended by {error.signal.name}", 128 + error.signal)
    except (KeyboardInterrupt, typer.Abort):
        fail("Interrupted", 130)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if is_out_of_memory(error):
            fail(_describe_out_of_memory(error), 2)
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            fail(f"{str(error.filename)[:60]}... is no path: {error.strerror}", 2)
        if not isinstance(error, RuntimeError) or not _lost_a_process(error):
            raise
        line = (
            f"process {os.environ['RANK']}: another process of this run has ended (if it said nothing, the system may "
            "have ended it for want of memory); continue from the last checkpoint with training.resume=true\n"
        )
        os.write(2, line.encode())  # in one piece, beside the lines of the other processes
        os._exit(2)  # a collective shutdown would wait for the lost process
    sys.exit(0)


def fail(line: str, status: int) -> NoReturn:
    """Prints one line on stderr, from the first process only, and exits with `status`."""
    if os.environ.get("RANK", "0") == "0":
        _print_error(in_one_line(line))
    sys.exit(status)


def _print_error(line: str) -> None:
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    from sgm_finetune.base.console import PrintableConsole, print_line

    print_line(PrintableConsole(stderr=True), line)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints what Python prints, printable: the message may quote a file."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Raises Terminated for SIGTERM and SIGHUP, so that half-written files and locks are removed. Training has its own
    handlers."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    caught = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    caught = [number for number in caught if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    if threading.current_thread() is not threading.main_thread():
        caught = []
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _describe_out_of_memory(error: BaseException) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+|\d+ bytes)", str(error))
    what = f" ({asked[1]} more were asked for)" if asked else ""
    return (
        f"The memory is not enough{what}; take a smaller training.micro_batch_size or training.checkpointing=true (a "
        "run that saved a checkpoint resumes with them and training.resume=true), or memory.budget, which chooses "
        "settings that fit"
    )


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process no longer answers."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from torch.distributed import DistNetworkError

    phrases = (
        "connection closed by peer",
        "connection reset",
        "broken pipe",
        "connection refused",
        "remote process exited",
    )
    return isinstance(error, DistNetworkError) or any(phrase in str(error).lower() for phrase in phrases)
