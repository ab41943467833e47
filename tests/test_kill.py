"""A run that SIGKILL ends, at any moment and any number of times, loses at most the steps since its last checkpoint
and ends with the same bits as an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forkserver, run_command
from safetensors.torch import load_file
from systems import needs_posix

from sgm_finetune.train.checkpoints import CONTENTS, is_whole, last_whole_checkpoint, seal

pytestmark = needs_posix

STEPS, EVERY = 18, 3


@pytest.fixture(scope="module")
def processes():
    return forkserver()


@pytest.fixture
def arguments(settings, tmp_path) -> list[str]:
    (tmp_path / "empty.yaml").write_text("")
    return [
        "finetune", "--config", str(tmp_path / "empty.yaml"), *settings, f"training.max_steps={STEPS}",
        f"training.eval_steps={EVERY}", "training.learning_rate=1e-2", "training.early_stopping_patience=0",
        "adapter.dropout=0.1",
    ]  # fmt: skip


def finished(process: Any) -> None:
    process.join(120)
    assert process.exitcode == 0


def tensors(value: Any) -> list[torch.Tensor]:
    match value:
        case torch.Tensor():
            return [value]
        case dict():
            return [found for key in sorted(value, key=str) for found in tensors(value[key])]
        case list() | tuple():
            return [found for inner in value for found in tensors(inner)]
    return []


def end_of(output: Path) -> tuple[list[torch.Tensor], Any]:
    """Every tensor and number of a finished run that must be the same: the adapter, the .pth, the last checkpoint's
    optimizer, scheduler and random states, all losses, and the test before and after."""
    last = last_whole_checkpoint(output / "checkpoints")
    assert last is not None
    found = tensors(dict(load_file(output / "adapter" / "adapter_model.safetensors")))
    found += tensors(torch.load(output / "sgm_finetuned.pth", weights_only=True)["adapter"])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found += tensors(torch.load(last / name, weights_only=False))
    state = json.loads((last / "trainer_state.json").read_text())
    metrics = json.loads((output / "metrics.json").read_text())
    return found, (
        [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in state["log_history"]],  # no times
        state["best_metric"], state["global_step"], metrics["before"], metrics["after"],
        metrics["best_step"], (output / "plan.json").read_text(),
    )  # fmt: skip


def assert_same(one: Path, two: Path) -> None:
    (left, facts), (right, others) = end_of(one), end_of(two)
    assert facts == others
    assert len(left) == len(right) > 50
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


WRITES = (
    "checkpoints/checkpoint-*", "checkpoints/.progress.json.partial", ".adapter.partial", ".sgm_finetuned.pth.partial",
    "metrics.json",
)  # fmt: skip


def wait(process: Any, output: Path, chooser: random.Random, seconds: float) -> str:
    """Waits until the moment to kill: any moment in the life of a run, or one at which something is written."""
    if chooser.random() < 0.5:
        process.join(chooser.uniform(0, seconds))
        return "any"
    wanted = chooser.choice(WRITES)
    before = set(output.glob(wanted))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive():
        if set(output.glob(wanted)) - before:
            time.sleep(chooser.uniform(0, 0.03))
            return wanted
        time.sleep(0.0005)
    return "any"


def kill_until(kills: int, processes: Any, arguments: list[str], tmp_path: Path, seed: int) -> dict[str, Any]:
    """Kills runs, each of which resumes the one before, `kills` times in all; compares each run that ends."""
    chooser = random.Random(seed)
    whole = tmp_path / "whole"
    started = time.monotonic()
    process = processes.Process(target=run_command, args=([*arguments, f"output.dir={whole}"],))
    process.start()
    finished(process)
    seconds = time.monotonic() - started
    counts: dict[str, int] = {}
    ends, done, resumed = 0, 0, 0
    while done < kills:
        output = tmp_path / f"killed-{ends}"
        while not (output / "metrics.json").exists():
            last = last_whole_checkpoint(output / "checkpoints")
            again = ["training.resume=true"] if last is not None else []
            resumed += bool(again)
            process = processes.Process(target=run_command, args=([*arguments, f"output.dir={output}", *again],))
            process.start()
            where = wait(process, output, chooser, seconds) if done < kills else ""
            if done < kills and process.is_alive():
                process.kill()
                done += 1
                counts[where] = counts.get(where, 0) + 1
                process.join()
            else:
                finished(process)
            now = last_whole_checkpoint(output / "checkpoints")
            assert last is None or (now is not None and step(now) >= step(last)), "an earlier checkpoint was lost"
        if (output / "metrics.json").exists():  # the kill may come between the last file and the end
            assert_same(whole, output)
        ends += 1
    return {
        "kills": done,
        "while": counts,
        "resumed": resumed,
        "ends_compared": ends,
        "seconds_of_a_run": round(seconds, 1),
    }


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@pytest.mark.slow
def test_fifty_kills_lose_no_checkpoint_and_change_no_bit(processes, arguments, tmp_path):
    """SGM_RECORD=FILE appends the counts to a file."""
    found = kill_until(60, processes, arguments, tmp_path, seed=int(os.environ.get("SGM_SEED", "0")))
    assert found["kills"] >= 50
    assert found["ends_compared"] >= 3
    if file := os.environ.get("SGM_RECORD"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"test": "kill", "torch": torch.__version__, **found}) + "\n")


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "unlisted", "no list"])
def test_a_checkpoint_with_a_harmed_file_is_not_whole(harm, tmp_path):
    for number in (5, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(range(100)))
        seal(folder)
    victim = tmp_path / "checkpoint-10" / "optimizer.pt"
    assert last_whole_checkpoint(tmp_path) == victim.parent
    match harm:
        case "cut":
            victim.write_bytes(victim.read_bytes()[:50])
        case "changed":
            victim.write_bytes(bytes(100))
        case "gone":
            victim.unlink()
        case "unlisted":
            (victim.parent / CONTENTS).write_text("{}")
        case "no list":
            (victim.parent / CONTENTS).write_text('{"optimizer.pt": {"byt')
    assert not is_whole(victim.parent)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(processes, arguments, tmp_path):
    output = tmp_path / "out"
    process = processes.Process(target=run_command, args=([*arguments, f"output.dir={output}"],))
    process.start()
    while not (output / "checkpoints" / "progress.json").exists():
        assert process.is_alive()
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert last_whole_checkpoint(output / "checkpoints") is None
    process = processes.Process(target=run_command, args=([*arguments, f"output.dir={output}"],))
    process.start()
    finished(process)
    assert (output / "metrics.json").exists()
