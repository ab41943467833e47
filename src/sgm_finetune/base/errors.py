"""The exceptions that end a command with one line: a problem that the user can fix, and a signal."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what is wrong, the value, the remedy.

    The command prints it without a traceback and exits with status 2.
    """


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


def in_one_line(text: str) -> str:
    """`text` on one printable line of at most 1,000 characters.

    Single spaces replace white space; escape codes replace control characters, which a terminal would obey.

    >>> in_one_line("a\\x1b[31m\\n  b")
    'a\\\\x1b[31m b'
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= 1000 else line[:997] + "..."
