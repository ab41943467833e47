"""Runs a program that uses llama.cpp in a process of its own, so that a crash in native code ends only that."""

from __future__ import annotations

import subprocess
import sys


def run_apart(program: str, *arguments: str) -> str | None:
    """Runs the Python file `program` to its end. Returns why it failed, in one line; None if it did not."""
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, errors="replace")
    if not done.returncode:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
