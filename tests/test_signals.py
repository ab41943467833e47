"""Ctrl-C, SIGTERM and a closed terminal end every command, at any moment of its work, with one line, its exit status
and no half-written file."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from moments import ended_by, start_until
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.train.checkpoints import last_whole_checkpoint

if os.name != "posix":
    pytest.skip("no signals between processes", allow_module_level=True)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LINES = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Ended by SIGTERM", signal.SIGHUP: "Ended by SIGHUP"}
WRITING = "begin sgm_finetune.base.files:sync"
"""Any file is complete under its scratch name, and not yet under its own."""

# command -> its arguments, and a moment before its work, in it, and after it
MOMENTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "init": (["init", "new.yaml", "--yes", "--data", "REVIEWS"], {
        "before": "import sgm_finetune.commands.init", "during": "begin sgm_finetune.base.reference:commented_yaml",
        "after": WRITING,
    }),
    "doctor": (["doctor", "--json"], {
        "before": "import sgm_finetune.commands.doctor", "during": "import sgm_finetune.commands.doctor_machine",
        "after": "begin sgm_finetune.commands.doctor:to_dict",
    }),
    "data": (["data", "CONFIG"], {
        "before": "import sgm_finetune.commands.data", "during": "begin sgm_finetune.data.prepared:prepare_data",
        "after": "end sgm_finetune.data.prepared:prepare_data",
    }),
    "scan": (["scan", "MODEL", "-o", "scan.json"], {
        "before": "import sgm_finetune.commands.scan", "during": "begin sgm_finetune.measure.scan:scan",
        "after": "begin sgm_finetune.measure.scan_formats:json_format",
    }),
    "estimate": (["estimate", "CONFIG"], {
        "before": "import sgm_finetune.commands.estimate",
        "during": "begin sgm_finetune.train.budget.estimate:estimate",
        "after": "end sgm_finetune.train.budget.estimate:estimate",
    }),
    "plan": (["plan", "CONFIG", "-o", "plan.json"], {
        "before": "import sgm_finetune.commands.plan", "during": "begin sgm_finetune.measure.probe:probe",
        "after": "begin sgm_finetune.measure.plan_file:save_plan",
    }),
    "finetune": (["finetune", "CONFIG"], {
        "import": "import sgm_finetune.commands.cli", "before": "import sgm_finetune.commands.finetune",
        "test": "begin sgm_finetune.results.evaluation:evaluate_model",
        "test after": "begin sgm_finetune.results.evaluation:evaluate_model #2",
        "file": "begin sgm_finetune.results.pth:plan_document",
        "after": "begin sgm_finetune.results.report.page:render_report",
    }),
    "evaluate": (["evaluate", "RESULT"], {
        "before": "import sgm_finetune.commands.evaluate",
        "during": "begin sgm_finetune.results.evaluation:evaluate_model",
        "after": "end sgm_finetune.results.evaluation:evaluate_model",
    }),
    "report": (["report", "OUTPUT"], {
        "before": "import sgm_finetune.results.report.page",
        "during": "begin sgm_finetune.results.report.page:render_report", "after": WRITING,
    }),
    "compare": (["compare", "OUTPUT", "SECOND", "--html", "page.html"], {
        "before": "import sgm_finetune.results.report.comparison",
        "during": "begin sgm_finetune.results.report.comparison:compare_runs", "after": WRITING,
    }),
    "generate": (["generate", "RESULT", "--prompt", "a good film"], {
        "before": "import sgm_finetune.commands.generate", "during": "begin sgm_finetune.results.answers:answer",
        "after": "end sgm_finetune.results.answers:answer",
    }),
    "chat": (["chat", "RESULT"], {
        "before": "import sgm_finetune.commands.chat", "during": "begin sgm_finetune.results.load:read_stored",
    }),
    "export": (["export", "--to", "merged", "RESULT"], {
        "before": "import sgm_finetune.commands.export",
        "during": "end sgm_finetune.results.export.shards:write_shards",
        "check": "begin sgm_finetune.results.export.check:check_merged", "after": WRITING,
    }),
}  # fmt: skip
QUICK = {("init", "after", signal.SIGTERM), ("finetune", "import", signal.SIGINT)}  # fmt: skip


def cases() -> list:
    return [
        pytest.param(name, moment, number, id=f"{name}-{moment}-{number.name}",
                     marks=() if (name, moment, number) in QUICK else pytest.mark.slow)
        for name, (_, moments) in MOMENTS.items() for moment in moments for number in SIGNALS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(llama_folder, reviews, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("finished") / "out"
    finetune(load_config(None, [*pico(llama_folder, reviews), f"output.dir={output}"]), Console(quiet=True))
    return output


def pico(model: Path, reviews: Path) -> list[str]:
    return [
        f"model.name={model}", "model.dtype=float32", f"data.train={reviews}", "data.max_length=32",
        "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=4",
        "training.batch_size=16", "snr.estimator=mp",
    ]  # fmt: skip


def filled(arguments: list[str], model: Path, reviews: Path, output: Path | None) -> list[str]:
    """The arguments with the names of real files."""
    found: list[str] = []
    for argument in arguments:
        match argument:
            case "CONFIG":
                found += ["--config", "empty.yaml", *pico(model, reviews), "output.dir=out"]
            case "RESULT":
                found += [f"output.dir={output}"]
            case _:
                found.append(
                    {"REVIEWS": str(reviews), "MODEL": str(model), "OUTPUT": str(output), "SECOND": "second"}.get(
                        argument, argument
                    )
                )
    return found


def files_of(*folders: Path) -> set[Path]:
    """All files and folders but those of the test's own hook."""
    return {path for folder in folders for path in folder.rglob("*") if "hook" not in path.parts}


@pytest.mark.parametrize(("name", "moment", "number"), cases())
def test_a_signal_ends_a_command_with_one_line(name, moment, number, llama_folder, reviews, tmp_path, request):
    arguments, moments = MOMENTS[name]
    output = None
    if {"RESULT", "OUTPUT"} & set(arguments):
        output = tmp_path / "result"
        for copy in (output, tmp_path / "second"):
            shutil.copytree(request.getfixturevalue("finished"), copy)
    (tmp_path / "empty.yaml").write_text("")
    process = start_until(moments[moment], filled(arguments, llama_folder, reviews, output), tmp_path)
    status, said = ended_by(number, process)
    assert status == 128 + number
    assert [line.partition(" after ")[0] for line in said] == [LINES[number]]
    left = [path for path in files_of(tmp_path) if path.name.endswith((".partial", ".old", ".lock"))]
    assert left == []
    for unfinished in ("new.yaml", "scan.json", "plan.json", "page.html", "out/report.html", "result/export/merged"):
        assert not (tmp_path / unfinished).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_training_saves_a_checkpoint(number, llama_folder, reviews, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    arguments = filled(["finetune", "CONFIG"], llama_folder, reviews, None)
    process = start_until("begin sgm_finetune.train.trainer:SGMTrainer.training_step #2", arguments, tmp_path)
    process.send_signal(number)
    (tmp_path / "reached").unlink()
    _, said = process.communicate(timeout=180)
    assert process.returncode == 128 + number
    first, last = said.splitlines()
    assert first == f"{number.name}: finishing this step and saving a checkpoint"
    assert last == f"Stopped by {number.name} after step 2 of 4; continue with training.resume=true"
    assert last_whole_checkpoint(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / "checkpoint-2"
