"""SIGKILL while a command replaces what an earlier one wrote leaves the earlier one or the new one, whole, under its
name: an export as a folder or as GGUF, the file of a scan, the report. The next call ends as if there was no kill."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forkserver, run_command
from rich.console import Console
from systems import needs_posix
from test_exporting import TEXT, save_decoder, train

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.files import whole_folder
from sgm_finetune.commands.finetune import finetune

pytestmark = needs_posix

KILLS = 24


def is_whole_export(folder: Path) -> bool:
    """Whether the folder holds as many bytes as its export.json says, which is written last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("export.json", "README.md")]
    if not (folder / "export.json").is_file() or not (folder / "README.md").is_file():
        return False
    return json.loads((folder / "export.json").read_text())["bytes"] == sum(path.stat().st_size for path in files)


def is_whole_scan(path: Path) -> bool:
    return len(json.loads(path.read_text())["matrices"]) >= 14


def is_whole_page(path: Path) -> bool:
    return path.read_text(encoding="utf-8").rstrip().endswith("</html>")


# what is written -> its name, the arguments, the moments at which it is written, and whether it is whole
Writer = tuple[str, list[str], list[str], Callable[[Path], bool]]
WRITERS: dict[str, Writer] = {
    "merged": ("merged", ["export", "--to", "merged", "RESULT", "--output", "TARGET", "output.overwrite=true"],
               [".merged.partial", ".merged.partial/model.safetensors", ".merged.partial/export.json", ".merged.old"],
               is_whole_export),
    "gguf": ("gguf", ["export", "--to", "gguf", "RESULT", "--output", "TARGET", "output.overwrite=true"],
             [".gguf.partial", ".gguf.partial/model-f16.gguf", ".gguf.partial/export.json", ".gguf.old"],
             is_whole_export),
    "scan": ("scan.json", ["scan", "MODEL", "--output", "TARGET"], [".scan.json.partial"], is_whole_scan),
    "report": ("report.html", ["report", "FOLDER"], [".report.html.partial"], is_whole_page),
}  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    return forkserver()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("decoder") / "model")


def finish(processes: Any, arguments: list[str]) -> float:
    """The seconds of a run that nobody disturbs."""
    started = time.monotonic()
    process = processes.Process(target=run_command, args=(arguments,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return time.monotonic() - started


def kill_while_writing(
    process: Any, folder: Path, moments: list[str], chooser: random.Random, seconds: float
) -> str | None:
    """Kills the process at a random moment of its life, or when something appears that it writes; says when."""
    wanted = chooser.choice(["any", *moments])
    if wanted == "any":
        process.join(chooser.uniform(0, seconds))
    else:
        before = {path: path.stat().st_ino for path in folder.glob(wanted)}
        while process.is_alive():
            if any(path.lstat().st_ino != before.get(path) for path in folder.glob(wanted)):
                time.sleep(chooser.uniform(0, 0.01))
                break
            time.sleep(0.0002)
    if not process.is_alive():
        return None
    process.kill()
    process.join()
    return wanted


def kill_writer(
    name: str, kills: int, processes: Any, model: Path, pico: list[str], folder: Path, seed: int
) -> dict[str, Any]:
    title, arguments, moments, is_whole = WRITERS[name]
    text, output, target = folder / "text.txt", folder / "out", folder / title
    text.write_text(TEXT)
    if name == "report":
        target = output / title
        run = [*pico, f"output.dir={output}", "probe.num_batches=2", "training.max_steps=2"]
        finetune(load_config(None, run), Console(quiet=True))
    elif name != "scan":
        train(model, "causal-lm", text, output)
    given = {"RESULT": f"output.dir={output}", "TARGET": str(target), "MODEL": str(model), "FOLDER": str(output)}
    command = [given.get(argument, argument) for argument in arguments]
    seconds = finish(processes, command)
    assert is_whole(target)
    chooser, counts, aside = random.Random(seed), {}, 0
    while sum(counts.values()) < kills:
        if name == "scan":
            target.unlink(missing_ok=True)  # it replaces no file
        process = processes.Process(target=run_command, args=(command,))
        process.start()
        when = kill_while_writing(process, target.parent, moments, chooser, seconds)
        if when is None:
            assert process.exitcode == 0
        else:
            counts[when] = counts.get(when, 0) + 1
        earlier = target.with_name(f".{title}.old")
        if target.exists():
            assert is_whole(target), when
        elif name != "scan":
            assert is_whole(earlier), when
            aside += 1
    if name == "scan":
        target.unlink(missing_ok=True)
    finish(processes, command)
    assert is_whole(target)
    assert not [path.name for path in target.parent.iterdir() if path.name.startswith(".")]
    return {"writer": name, "kills": sum(counts.values()), "while": counts, "kept_aside": aside}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_a_whole_result(name, processes, model, settings, tmp_path):
    """SGM_RECORD=FILE appends the counts to a file."""
    found = kill_writer(name, KILLS, processes, model, settings, tmp_path, seed=int(os.environ.get("SGM_SEED", "0")))
    assert found["kills"] >= KILLS
    if file := os.environ.get("SGM_RECORD"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"test": "kill writers", "torch": torch.__version__, **found}) + "\n")


@pytest.mark.slow
def test_four_kills_of_a_scan_leave_a_whole_file(processes, model, settings, tmp_path):
    assert kill_writer("scan", 4, processes, model, settings, tmp_path, seed=1)["kills"] == 4


def test_an_export_that_was_kept_aside_is_back_before_the_next(tmp_path):
    """A kill came between two renames; then the next export fails."""
    (tmp_path / ".merged.old").mkdir()
    (tmp_path / ".merged.old" / "export.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "merged"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (tmp_path / "merged" / "export.json").read_text() == "{}"


def test_an_interruption_between_two_renames_brings_the_earlier_folder_back(tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "earlier").write_text("")
    replace = os.replace

    def interrupted(path, target):
        if Path(path).name == ".merged.partial":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "merged") as scratch:
        (scratch / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["earlier"]
