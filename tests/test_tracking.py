"""Trackers in training.report_to receive every step, or are refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from sgm_finetune.base.config_file import parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import main
from sgm_finetune.train.arguments import check_machine


def test_one_name_is_a_list_of_one():
    assert parse_config({"training": {"report_to": "wandb"}}).training.report_to == ["wandb"]
    assert parse_config({"training": {"report_to": None}}).training.report_to == []
    with pytest.raises(UserError, match=r"training\.report_to"):
        parse_config({"training": {"report_to": ["a notebook"]}})


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(tracker, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=f"training.report_to={tracker} needs its package; pip install {tracker}"):
        check_machine(parse_config({"training": {"report_to": [tracker]}}))


@pytest.mark.slow
def test_tensorboard_receives_every_step(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "empty.yaml").write_text("")
    given = [*settings, "training.max_steps=4", "training.report_to=tensorboard"]
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *given])
    assert caught.value.code == 0
    (folder,) = (tmp_path / "out" / "checkpoints" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert "eval/loss" in events.Tags()["scalars"]
    assert "tensorboard" in sys.modules
