"""The real executable, stopped at a named moment of its work, so that a test can send it a signal there.

A moment is `import MODULE`, `begin MODULE:FUNCTION` or `end MODULE:FUNCTION`; ` #3` behind it: the third time. The
process makes the file `reached` and sleeps until it is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT, environment

_SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, importlib.util, os, sys, time

what, _, rest = os.environ["SGM_MOMENT"].partition(" ")
place, _, number = rest.partition(" #")
module, _, function = place.partition(":")
left = int(number or 1)

def pause():
    global left
    left -= 1
    if left == 0:
        reached = os.environ["SGM_MOMENT_FILE"]
        with open(reached, "w"):
            pass
        while os.path.exists(reached):
            time.sleep(0.02)

def stopping(inner):
    def wrapper(*arguments, **options):
        if what == "begin":
            pause()
        result = inner(*arguments, **options)
        if what == "end":
            pause()
        return result
    return wrapper

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(loaded):
            if what == "import":
                pause()
            execute(loaded)
            *owners, last = function.split(".")
            owner = loaded
            for each in owners:
                owner = getattr(owner, each)
            if last:
                setattr(owner, last, stopping(getattr(owner, last)))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def start_until(moment: str, arguments: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    """`python -m sgm_finetune ARGUMENTS`, which has come to `moment`; `folder` is the test's own."""
    hook, reached = folder / "hook", folder / "reached"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    reached.unlink(missing_ok=True)
    paths = [str(hook), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    named = {"SGM_MOMENT": moment, "SGM_MOMENT_FILE": str(reached), "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sgm_finetune", *arguments],
        cwd=folder, env=environment() | named | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=_listen,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not reached.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"never came to {moment}: {process.communicate()}")
        time.sleep(0.01)
    return process


def _listen() -> None:
    """A background job of a shell ignores SIGINT, and its children do; nohup does so with SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def ended_by(number: signal.Signals, process: subprocess.Popen) -> tuple[int, list[str]]:
    """The exit status and the lines on stderr after the signal."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()
