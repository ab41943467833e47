"""The exception for every problem that the user can fix."""

from sgm_finetune.base.text import printable


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what is wrong, the value, the remedy.

    The command prints it without a traceback and exits with status 2.
    """


def in_one_line(text: str) -> str:
    """`text` on one printable line of at most 1,000 characters.

    Single spaces replace white space; escape codes replace characters that a terminal would obey.

    >>> in_one_line("a\\x1b[31m\\n  b")
    'a\\\\x1b[31m b'
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= 1000 else line[:997] + "..."
