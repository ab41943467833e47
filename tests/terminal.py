"""Runs a command in a terminal of a given width, and returns what a person sees there."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # not on Windows

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def sgm_in_terminal(
    arguments: Sequence[str], columns: int, environment: Mapping[str, str] | None = None, typed: str = ""
) -> tuple[list[str], int]:
    """The lines that `sgm` prints, and its exit status."""
    program = "import sys; sys.argv[0] = 'sgm'; from sgm_finetune.commands.cli import main; main()"
    return in_terminal([sys.executable, "-c", program, *arguments], columns, environment, typed)


def in_terminal(
    argv: Sequence[str], columns: int, environment: Mapping[str, str] | None = None, typed: str = ""
) -> tuple[list[str], int]:
    """The lines that the command prints, without colours, and its exit status. `typed` is typed before it asks."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    settings = {**inherited, "TERM": "xterm", **(environment or {})}
    running = subprocess.Popen(argv, stdin=its, stdout=its, stderr=its, env=settings, start_new_session=True)
    os.close(its)
    if typed:
        os.write(ours, typed.encode())
    output = b""
    while True:
        try:
            read = os.read(ours, 2**16)
        except OSError:  # Linux raises it when the command has closed its end
            break
        if not read:
            break
        output += read
    os.close(ours)
    text = CONTROL.sub("", output.decode(errors="replace")).replace("\r\n", "\n")
    return [line.rstrip() for line in text.splitlines()], running.wait()
