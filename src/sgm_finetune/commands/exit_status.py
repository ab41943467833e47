"""How a command ends: the exit status, and one line on stderr for what a person can fix.

Exit status: 0 done; 2 something a person can fix (one line on stderr); 3 done, and `sgm ship` says not to ship; 1 our
fault (a traceback); 128 plus its number for a signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that closed.
Nothing here takes long to import, so
that a signal ends a command in one line also while its libraries are imported.
"""

from __future__ import annotations

import errno
import io
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

from sgm_finetune.base.errors import Interrupted, PeerLost, Terminated, UserError, in_one_line, is_out_of_memory
from sgm_finetune.base.text import printable

NOT_SHIPPED = 3
"""The exit status of `sgm ship` for a model that is not to be shipped."""


def run_and_exit(command: Callable[[], int]) -> NoReturn:
    """Runs `command` and exits with the status that it returns. Unexpected exceptions pass through, with their
    traceback."""
    sys.excepthook = _print_traceback
    _print_anything()
    status = 0
    try:
        with _signals_as_exceptions():
            status = command()
    except Interrupted as stop:
        fail(str(stop), 128 + stop.signal)
    except UserError as error:
        fail(str(error), 2)
    except Terminated as stop:
        fail(f"Ended by {stop.signal.name}", 128 + stop.signal)
    except KeyboardInterrupt:
        fail("Interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        os._exit(1)
    except PeerLost as error:
        _end_without_peer(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            fail(_describe_out_of_memory(error), 2)
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            fail(f"{str(error.filename)[:60]}... is no path: {error.strerror}", 2)
        if not isinstance(error, RuntimeError) or not _lost_a_process(error):
            raise
        _end_without_peer(
            "another process of this run has ended (if it said nothing, the system may have ended it for want of "
            "memory); continue from the last checkpoint with training.resume=true"
        )
    sys.exit(status)


def _print_anything() -> None:
    """Makes a character that the encoding of the output lacks an escape code, not an exception. Windows writes files
    and pipes in an encoding of the country, which has no arrows."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end_without_peer(line: str) -> NoReturn:
    """Prints one line from this process and ends it: a collective shutdown would wait for the lost process."""
    text = f"process {os.environ['RANK']}: {line}\n"
    os.write(2, text.encode())  # in one piece, beside the lines of the other processes
    os._exit(2)


def fail(line: str, status: int) -> NoReturn:
    """Prints one line on stderr, from the first process only, and exits with `status`."""
    if os.environ.get("RANK", "0") == "0":
        with ctrl_c_kills():
            _print_error(in_one_line(line))
    sys.exit(status)


@contextmanager
def ctrl_c_kills() -> Iterator[None]:
    """A further Ctrl-C ends the process at once, without a traceback: the work has ended, and its end is being told."""
    changes = signal.getsignal(signal.SIGINT) is signal.default_int_handler and _may_handle_signals()
    if changes:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if changes:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _may_handle_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


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
    """Raises Terminated for SIGTERM, SIGHUP and Windows' Ctrl-Break, so that half-written files and locks are removed.
    Training has its own handlers."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    caught = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    caught = [number for number in caught if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    if not _may_handle_signals():
        caught = []
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:  # native code may make another exception of the signal's
        if (stop := _signal_behind(error)) is None or isinstance(error, Interrupted):
            raise
        raise stop from None
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _signal_behind(error: BaseException | None) -> BaseException | None:
    """The exception of a signal that `error` came from, or None."""
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__cause__ or error.__context__
    return error


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
