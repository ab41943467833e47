"""An output folder belongs to one run: a second run that began beside it, and a folder that is deleted meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import LOCK, lock_folder
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.train.trainer import SGMTrainer


@pytest.fixture
def short(settings) -> list[str]:
    return [*settings, "training.max_steps=4", "training.eval_steps=2", "training.learning_rate=1e-2"]


def finetune(settings: list[str]) -> dict:
    return pipeline.finetune(load_config(None, settings), Console(quiet=True))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ends", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["ended", "killed"])
def test_a_run_does_not_train_over_one_that_was_quicker(ends, short, tmp_path, monkeypatch):
    """Both begin on a new folder; the second saves a result, or a checkpoint, before the first takes its first step."""
    begin, output = pipeline.measure_start, tmp_path / "out"
    before: dict[Path, bytes] = {}

    def overtaken(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "measure_start", begin)
            finetune(short)
        if not ends:
            for name in ("sgm_finetuned.pth", "metrics.json"):
                (output / name).unlink()
        before.update(contents(output))
        return begin(*arguments)

    monkeypatch.setattr(pipeline, "measure_start", overtaken)
    with pytest.raises(UserError, match=r"out holds an earlier run \("):
        finetune(short)
    assert contents(output) == before != {}


def test_a_run_whose_folder_is_deleted_leaves_the_folder_to_the_next(short, tmp_path, monkeypatch):
    output, step = tmp_path / "out", SGMTrainer.training_step

    def deleted(self, *arguments, **options):
        if self.state.global_step == 1:
            shutil.rmtree(output)
            next_run.enter_context(lock_folder(output))
        return step(self, *arguments, **options)

    from contextlib import ExitStack

    monkeypatch.setattr(SGMTrainer, "training_step", deleted)
    with ExitStack() as next_run:
        with pytest.raises(UserError, match="out was removed or replaced while this run used it"):
            finetune(short)
        assert [path.name for path in output.iterdir()] == [LOCK]
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"), lock_folder(output):
            pass
    assert list(output.iterdir()) == []


def test_a_folder_that_is_deleted_after_the_training_gets_no_result(short, tmp_path, monkeypatch):
    train = pipeline.train_adapters

    def deleted(*arguments):
        trained = train(*arguments)
        shutil.rmtree(tmp_path / "out")
        return trained

    monkeypatch.setattr(pipeline, "train_adapters", deleted)
    with pytest.raises(UserError, match="was removed or replaced"):
        finetune(short)
    assert not (tmp_path / "out").exists()
