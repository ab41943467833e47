"""A checkpoint from somebody else is read without running code, and what no run writes is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.train.checkpoints import seal


@pytest.fixture(scope="module")
def begun(llama_folder, reviews, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of four steps that can be resumed after its second, and its settings."""
    output = tmp_path_factory.mktemp("begun") / "out"
    settings = [
        f"model.name={llama_folder}", "model.dtype=float32", f"data.train={reviews}", "data.max_length=32",
        "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=4",
        "training.eval_steps=2", "training.learning_rate=1e-2",
    ]  # fmt: skip
    finetune(load_config(None, [*settings, f"output.dir={output}"]), Console(quiet=True))
    shutil.rmtree(output / "checkpoints" / "checkpoint-4")
    return output, [*settings, "training.resume=true"]


class Harmful:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


STATES = {
    "an unknown key": {"surprise": 1}, "a best checkpoint that is a number": {"best_model_checkpoint": 5},
    "a step that is a text": {"global_step": "two"}, "no history": {"log_history": 3},
    "callbacks that are none": {"stateful_callbacks": {"EarlyStoppingCallback": {"args": {"surprise": 1}}}},
}  # fmt: skip


def resumed(begun: tuple[Path, list[str]], tmp_path: Path, harm) -> str:
    """What a resumed run says after `harm(checkpoint)`."""
    output, settings = tmp_path / "out", begun[1]
    shutil.copytree(begun[0], output)
    checkpoint = output / "checkpoints" / "checkpoint-2"
    harm(checkpoint)
    seal(checkpoint)
    with pytest.raises(UserError) as caught:
        finetune(load_config(None, [*settings, f"output.dir={output}"]), Console(quiet=True))
    return str(caught.value)


def changed(state: dict):
    def change(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | state))

    return change


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i > 1 else ()) for i, name in enumerate(STATES)]
)
def test_a_state_that_no_run_writes_is_one_line(name, begun, tmp_path):
    said = resumed(begun, tmp_path, changed(STATES[name]))
    assert "checkpoint-2" in said
    assert " is not a usable " in said


@pytest.mark.parametrize("protocol", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_pickled_optimizer_is_refused_and_not_run(protocol, begun, tmp_path):
    mark = tmp_path / "ran"

    def harm(checkpoint: Path) -> None:
        (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Harmful(mark), protocol))

    assert "checkpoint-2 is not a usable checkpoint" in resumed(begun, tmp_path, harm)
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [[], {"state": {}, "param_groups": []}, {"state": 5}], ids=str)
def test_an_optimizer_of_another_kind_is_one_line(content, begun, tmp_path):
    said = resumed(begun, tmp_path, lambda checkpoint: torch.save(content, checkpoint / "optimizer.pt"))
    assert "checkpoint-2 is not a usable checkpoint" in said
