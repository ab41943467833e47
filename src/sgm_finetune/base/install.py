"""The command that installs an extra, for every message that names one."""

from __future__ import annotations


def install_line(extra: str) -> str:
    """What installs SGM with one of its extras. There is no release yet, so it names the clone of the repository.

    >>> install_line("demo")
    'in the clone of SGM: pip install -e ".[demo]"'
    """
    return f'in the clone of SGM: pip install -e ".[{extra}]"'
