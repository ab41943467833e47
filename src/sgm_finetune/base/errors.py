"""The exceptions that end a command with one line: a problem that the user can fix, and a signal."""

from __future__ import annotations

import signal

from sgm_finetune.base.text import printable


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what is wrong, the value, the remedy.

    The command prints it without a traceback and exits with status 2.
    """


class NotFiniteError(UserError):
    """A loss or a gradient is not finite."""


class PeerLost(Exception):  # noqa: N818 - of several processes, any may be the one that can tell
    """Another process of this run has ended or never came. Every process prints the line: the first may be the lost
    one."""


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """A signal stopped the work, and what was done is kept. The message is one line: how far it came, and how to go on.

    The command prints it and exits with 128 plus the number of the signal.
    """

    def __init__(self, line: str, number: int = signal.SIGINT):
        super().__init__(line)
        self.signal = signal.Signals(number)


class Terminated(BaseException):
    """A signal other than Ctrl-C's, which Python raises as KeyboardInterrupt. It ends the command wherever it is."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, of the host, of a GPU or of the address space, in any library's words.

    A library may report it as an error of another kind, with the first one as its cause: a module that cannot be
    imported, a file that cannot be read.

    >>> is_out_of_memory(ImportError("lib.so: failed to map segment from shared object")), is_out_of_memory(KeyError())
    (True, False)
    """
    told = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or any(words in told for words in _OUT_OF_MEMORY):
        return True
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and is_out_of_memory(cause)


_OUT_OF_MEMORY = (
    "outofmemoryerror", "can't allocate memory", "cannot allocate memory", "failed to map segment", "std::bad_alloc",
)  # fmt: skip
"""What torch, the system, the dynamic linker and C++ say."""


def in_one_line(text: str) -> str:
    """`text` on one printable line of at most 1,000 characters.

    Single spaces replace white space; escape codes replace characters that a terminal would obey.

    >>> in_one_line("a\\x1b[31m\\n  b")
    'a\\\\x1b[31m b'
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= 1000 else line[:997] + "..."
