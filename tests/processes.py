"""What several tests of whole runs ask: runs by several processes, and whether two runs are one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
ANOTHER_ORDER = 1e-4
"""Tolerance for float32 sums in another order, over 20 steps."""


def forkserver() -> Any:
    """Starts processes that have already imported what commands import. A test process has one such server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    modules = ("commands.finetune", "commands.export", "commands.scan", "results.report.page")
    context.set_forkserver_preload([f"sgm_finetune.{module}" for module in modules])
    return context


def run_command(arguments: list[str]) -> None:
    """The command in a process of `forkserver`, which prints nothing."""
    from sgm_finetune.commands.cli import main

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    main(arguments)


def training_log(output: Path) -> list[dict]:
    newest = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def losses(output: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in training_log(output) if name in entry]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running_server(*arguments: str) -> Iterator[subprocess.Popen]:
    """A command that serves at a port, in a process of its own, once it has opened. Its last line must be that it was
    interrupted."""
    command = [sys.executable, "-m", "sgm_finetune", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert running.stdout is not None
    try:
        assert any(line.startswith("open") for line in running.stdout)
        yield running
    finally:
        running.kill()
    assert running.communicate()[1].splitlines()[-1:] == ["Interrupted"]


def assert_ctrl_c_ends(running: subprocess.Popen) -> None:
    """Within half a minute, with the status of an interrupt."""
    running.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert running.wait(timeout=60) == 130
    assert time.monotonic() - sent < 30


def torchrun(*arguments: str, processes: int = 2) -> str:
    """What it said."""
    return run_processes(torchrun_command(processes, *arguments))


def run_processes(arguments: list[str]) -> str:
    """What they said; all have to succeed."""
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun_command(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, *arguments]


def assert_one_run(one: Path, two: Path) -> None:
    """The same losses at every step, and the same adapter, up to the order of float32 sums."""
    for name in ("loss", "eval_loss", "grad_norm"):
        left, right = torch.tensor(losses(one, name)), torch.tensor(losses(two, name))
        torch.testing.assert_close(left, right, atol=ANOTHER_ORDER, rtol=ANOTHER_ORDER)
    left, right = adapter(one), adapter(two)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=ANOTHER_ORDER, rtol=ANOTHER_ORDER)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
