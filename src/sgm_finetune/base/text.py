"""Short texts that several rooms print: sizes, values and error messages, each on one line; and text made printable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # errors.py needs this file, and the end of a command needs that: neither may take long to import
    from pydantic import ValidationError

# Controls except tab and line feed, other ends of lines, changes of the writing direction, halves of surrogate pairs.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with an escape code for each character that a terminal obeys or cannot print; tabs and lines stay.

    Every text from outside goes through here on its way to a terminal: names, data, errors, a model's answers.

    >>> printable("a\\x1b[31m\\tb\\n")
    'a\\\\x1b[31m\\tb\\n'
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def gib(num_bytes: float) -> str:
    """A number of bytes in GiB, with two decimals.

    >>> gib(3 * 2**29)
    '1.50 GiB'
    """
    return f"{num_bytes / 2**30:,.2f} GiB"


def mib(num_bytes: float) -> str:
    """A number of bytes in whole MiB.

    >>> mib(3 * 2**29)
    '1,536 MiB'
    """
    return f"{num_bytes / 2**20:,.0f} MiB"


def about(seconds: float) -> str:
    """Seconds in one unit, for a duration that is not known exactly.

    >>> [about(seconds) for seconds in (7.4, 99, 130, 5900, 9000)]
    ['7 s', '99 s', '2 min', '98 min', '2.5 h']
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception's message, cut to `limit` characters; its type when it has no message.

    >>> first_line(ValueError("no number\\nin row 3")), first_line(KeyError())
    ('no number', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's whole message on one line of at most `limit` characters; its type when it has no message.

    >>> one_line(ValueError("no number\\n in row 3"))
    'no number in row 3'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short_repr(value: object, limit: int = 40) -> str:
    """`repr(value)`, cut to `limit` characters.

    >>> short_repr("much too long a value", limit=12)
    "'much too..."
    """
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names, each cut to 40 characters, and how many there are if these are not all.

    >>> listed(["a", "b"]), listed(["a", "b", "c"], limit=2)
    ('a, b', 'a, b, ... (3)')
    """
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names):,})"


def first_mistake(error: ValidationError) -> str:
    """The first mistake in a pydantic error: its place and what is wrong.

    >>> from pydantic import TypeAdapter, ValidationError
    >>> try:
    ...     TypeAdapter(dict[str, int]).validate_python({"rank": "many"})
    ... except ValidationError as error:
    ...     first_mistake(error)
    '`rank`: input should be a valid integer, unable to parse string as an integer'
    """
    first = error.errors()[0]
    return f"`{'.'.join(map(str, first['loc'])) or 'it'}`: {first['msg'].lower()}"


def num_common(left: Sequence[object], right: Sequence[object]) -> int:
    """The length of the common beginning of two sequences."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
