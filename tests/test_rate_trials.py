"""training.learning_rate=auto: short trials choose the rate, and leave no other trace."""

from __future__ import annotations

import json
import math

import pytest
import torch
from processes import adapter, losses, torchrun

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.method.rate_search import lowest_point, next_rate
from sgm_finetune.train import rate_trials
from sgm_finetune.train.trial_size import trial_size


def test_the_lowest_point_is_that_of_the_parabola_through_three_points():
    """Losses of a parabola in log(rate) give its minimum, whatever the distances between the rates."""
    rates = (0.004, 0.01, 0.05)
    bottom = 0.013
    assert lowest_point({rate: 2.0 + 0.3 * math.log(rate / bottom) ** 2 for rate in rates}) == pytest.approx(bottom)
    assert lowest_point({0.01: 0.5, 0.02: 0.4, 0.04: math.inf}) == 0.02
    assert lowest_point({0.01: 0.4, 0.02: 0.5}) == 0.01
    assert lowest_point({0.01: 0.4, 0.02: 0.4, 0.04: 0.4}) in (0.01, 0.02)


def test_the_search_goes_on_beyond_an_edge_and_ends():
    asked = []
    for best in (0.001, 1.0):
        found: dict[float, float] = {}
        for rate in rate_trials._rates(0.01, found):
            found[rate] = abs(math.log(rate / best))
        asked.append(sorted(found))
    assert asked == [[0.00068, 0.0013, 0.0025, 0.005, 0.01, 0.02], [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]]
    assert next_rate({0.01: 1.0, 0.02: math.inf}, 6) == 0.005


@pytest.mark.parametrize(
    ("num_train", "overrides", "expected"),
    [
        (32, [], (1, 8)), (1000, [], (8, 100)), (32_000, [], (250, 256)), (32_000, ["training.epochs=3"], (750, 256)),
        (200, ["training.max_steps=6"], (6, 20)),
    ],
)  # fmt: skip
def test_a_trial_takes_a_quarter_of_the_steps(num_train, overrides, expected):
    size = trial_size(load_config(None, overrides), num_train)
    assert (size.steps, size.num_held_out) == expected


def test_too_few_examples_are_one_line():
    with pytest.raises(
        UserError, match="at least 32 training examples for its trials, and there are 31; give a number"
    ):
        trial_size(load_config(None, []), 31)


@pytest.mark.slow
def test_a_run_with_a_chosen_rate_is_the_run_with_that_rate(settings, tmp_path, command):
    """Bit for bit; the trials are in the metrics, the report and the words."""
    settings = [s for s in settings if "learning_rate" not in s] + ["data.num_train=80", "data.num_test=8"]
    auto = command("finetune", [*settings, "training.learning_rate=auto"])
    trials, said = auto["rate_trials"], command.said
    assert trials["steps"] == 8
    assert 3 <= len(trials["rates"]) <= 6
    assert trials["rates"][:3] == [0.0352, 0.0704, 0.0176]  # the default for 20 steps is 0.0177; 8 steps want more
    assert min(trials["rates"]) <= trials["best"] <= max(trials["rates"])
    assert auto["learning_rate"] == trials["chosen"] == pytest.approx(trials["best"] * 0.4**0.75, rel=0.01)
    assert f"training.learning_rate={trials['chosen']:g} for 20 steps, after" in said
    assert "3 to 6 trials of 8 steps, tested on 8 training examples left out: about" in said
    assert auto["seconds"]["rate_trials"] > 0 < auto["predicted"]["seconds"]["rate_trials"]
    out = tmp_path / "out"
    assert f"learning_rate: {trials['chosen']}" in (out / "config.yaml").read_text()
    page = (out / "report.html").read_text()
    assert "Loss of short trials by learning rate" in page

    given = command(
        "finetune", [*settings, f"training.learning_rate={trials['chosen']}", f"output.dir={tmp_path / 'b'}"]
    )
    assert given["rate_trials"] is None
    assert losses(out) == losses(tmp_path / "b")
    one, other = adapter(out), adapter(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rate_that_its_trials_chose(settings, tmp_path, command):
    settings = [s for s in settings if "learning_rate" not in s]
    settings += ["training.eval_steps=10", "training.learning_rate=auto"]
    whole = command("finetune", settings)
    for name in ("sgm_finetuned.pth", "metrics.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    again = command("finetune", [*settings, "training.resume=true"])
    assert again["rate_trials"] == whole["rate_trials"]
    assert again["after"] == whole["after"]


@pytest.mark.slow
def test_a_trial_that_fails_is_no_choice(settings, tmp_path, command, monkeypatch):
    """A rate that makes the loss infinite ends its trial and not the run."""
    real = rate_trials._loss_after_trial
    monkeypatch.setattr(
        rate_trials, "_loss_after_trial", lambda job, rate, *rest: math.inf if rate > 0.03 else real(job, rate, *rest)
    )
    found = command("finetune", [*settings, "training.learning_rate=auto", "training.max_steps=2", "data.num_train=40"])
    assert found["rate_trials"]["losses"][1] is None
    assert found["rate_trials"]["best"] <= 0.0177
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_two_processes_choose_the_same_rate(settings, tmp_path, command):
    settings = [*settings, "training.learning_rate=auto", "data.num_train=40", "training.max_steps=5"]
    (tmp_path / "empty.yaml").write_text("")
    two = tmp_path / "two"
    torchrun("src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings, f"output.dir={two}")
    one = command("finetune", settings)
    shared = json.loads((two / "metrics.json").read_text())
    assert shared["rate_trials"]["losses"] == pytest.approx(one["rate_trials"]["losses"], rel=1e-4)
    assert shared["learning_rate"] == pytest.approx(one["learning_rate"], rel=0.02)
