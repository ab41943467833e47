"""The one exception for what a person can fix."""


class UserError(Exception):
    """What was wrong, the value, the remedy: one line, shown without a traceback, exit status 2."""


def in_one_line(text: str) -> str:
    """`text` as it is printed: white space as single spaces, characters that a terminal would obey as their codes, at
    most 1,000 characters.

    >>> in_one_line("a\\x1b[31m\\n  b")
    'a\\\\x1b[31m b'
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= 1000 else line[:997] + "..."
