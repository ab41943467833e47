"""A mistake that needs no model is one line and exit status 2, before PyTorch or any other large library is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up_runs import leave_run

pty = pytest.importorskip("pty")  # not on Windows

LARGE = ("torch", "transformers", "datasets", "peft", "accelerate", "sklearn", "scipy", "bitsandbytes", "matplotlib")
"""Libraries that take seconds to load."""
COUNTED = f"""
import json, sys
from sgm_finetune.commands.cli import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps([name for name in {LARGE} if name in sys.modules]), file=open("loaded.json", "w"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data file, an occupied output folder and two finished runs."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"review {i},{i % 2}\n" for i in range(40)))
    (folder / "gap.csv").write_text("text,label\n" + "".join(f"review {i},{i % 2 or ''}\n" for i in range(40)))
    (folder / "config.yaml").write_text("training: {seed: 1}\n")
    (folder / "taken").mkdir()
    (folder / "taken" / "metrics.json").write_text("{}")
    for name in ("one", "two"):
        leave_run(folder / name, 0.8)
    return folder


def run(place: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """The exit status, stderr, and the large libraries that were loaded."""
    code = [sys.executable, "-c", COUNTED, *arguments]
    done = subprocess.run(code, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stderr, json.loads((place / "loaded.json").read_text())


GIVEN = ("data.train=reviews.csv", "model.task=sequence-classification")
MISTAKES = {
    "finetune: a missing file": (["finetune", "data.train=none.csv"], "none.csv does not exist"),
    "finetune: no data": (["finetune"], "No data: give data.train=FILE"),
    "finetune: an occupied folder": (["finetune", *GIVEN, "output.dir=taken"], "taken holds an earlier run"),
    "finetune: nothing to resume": (["finetune", *GIVEN, "training.resume=true"], "finds no checkpoint"),
    "finetune: a wrong column": (["finetune", *GIVEN, "data.columns={text: txt}"], "did you mean `text`?"),
    "finetune: a wrong task": (["finetune", GIVEN[0], "model.task=token-classification"], "has no column `tokens`"),
    "finetune: a missing label": (["finetune", "data.train=gap.csv", GIVEN[1]], "row 1 has no label in `label`"),
    "finetune: a missing model": (["finetune", *GIVEN, "model.name=./none"], "No model folder ./none"),
    "finetune: a missing plan": (["finetune", *GIVEN, "plan=none.json"], "No plan file none.json"),
    "finetune: a mistyped key": (["finetune", "training.epoch=2"], "unknown key"),
    "plan: a wrong column": (["plan", *GIVEN, "data.columns={text: txt}"], "did you mean `text`?"),
    "plan: an occupied file": (["plan", *GIVEN, "--output", "reviews.csv"], "reviews.csv exists"),
    "data: a missing file": (["data", "data.train=none.csv"], "none.csv does not exist"),
    "data: a misspelt name": (["data", "data.name=roten-tomatoes"], "did you mean `rotten-tomatoes`?"),
    "estimate: a missing plan": (["estimate", *GIVEN, "plan=none.json"], "No plan file none.json"),
    "estimate: a missing model": (["estimate", *GIVEN, "model.name=./none"], "No model folder ./none"),
    "scan: a missing model": (["scan", "./none"], "No model folder ./none"),
    "scan: an occupied file": (["scan", "./none", "--output", "reviews.csv"], "reviews.csv exists"),
    "evaluate: no run": (["evaluate", "output.dir=none"], "train first with `sgm finetune`"),
    "generate: no run": (["generate", "--prompt", "a", "output.dir=none"], "train first with `sgm finetune`"),
    "chat: no run": (["chat", "output.dir=none"], "train first with `sgm finetune`"),
    "ship: no run": (["ship", "none"], "No folder none"),
    "ship: no folder": (["ship", "training.eval_batch_size=8"], "write sgm ship OUTPUT training.eval_batch_size=8"),
    "ship: a run without a result": (["ship", "one"], "No one/sgm_finetuned.pth"),
    "ship: no task": (["ship", "one", "--keep", ","], "--keep ',' names no task"),
    "export: no run": (["export", "--to", "merged", "output.dir=none"], "train first with `sgm finetune`"),
    "report: no run": (["report", "none"], "No folder none"),
    "compare: one run": (["compare", "one"], "two runs or more"),
    "compare: a missing run": (["compare", "one", "none"], "No folder none"),
    "init: an occupied file": (["init", "reviews.csv", "--yes"], "reviews.csv exists"),
    "init: a missing file": (["init", "new.yaml", "--yes", "--data", "none.csv"], "No data file none.csv"),
}


@pytest.mark.parametrize(("arguments", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_a_large_library_is_loaded(arguments, line, place):
    status, said, loaded = run(place, *arguments)
    assert status == 2
    assert line in said
    assert said.count("\n") == 1
    assert loaded == []


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--version"], []),
        (["--help"], []),
        (["finetune", "--help"], []),
        (["compare", "one", "two"], []),
        (["compare", "one", "two", "--html", "comparison.html"], ["matplotlib"]),
        (["report", "one"], ["matplotlib"]),
    ],
)
def test_a_command_that_only_reads_files_loads_no_model_library(arguments, needed, place):
    status, said, loaded = run(place, *arguments)
    assert (status, said, loaded) == (0, "", needed)


def test_a_look_at_the_data_loads_no_model(place, llama_folder):
    """Modules of models, of distributed training and of SciPy took half of its time."""
    code = COUNTED.replace(str(LARGE), repr(["transformers.modeling_utils", "scipy.optimize", "peft"]))
    arguments = ["data", *GIVEN, f"model.name={llama_folder}", "data.max_length=16"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "loaded.json").read_text()) == []


def test_the_package_lists_its_names_and_loads_none_of_them():
    code = (
        "import sys, sgm_finetune; print(set(sgm_finetune.__all__) <= set(dir(sgm_finetune)), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said == "True False\n"


def test_a_terminal_sees_what_is_being_loaded(place):
    main, terminal = pty.openpty()
    code = [sys.executable, "-m", "sgm_finetune", "scan", str(place / "one")]
    (place / "one" / "config.json").write_text("{}")
    child = subprocess.Popen(
        code, cwd=place, stderr=terminal, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}
    )
    os.close(terminal)
    said, limit = b"", time.monotonic() + 120
    while b"Loading" not in said and time.monotonic() < limit:
        try:
            said += os.read(main, 1024)
        except OSError:
            break
    child.wait()
    assert b"Loading PyTorch ..." in said
