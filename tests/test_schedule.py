"""training.schedule: the learning rate of each step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from sgm_finetune.base.config_file import load_config
from sgm_finetune.train.arguments import training_arguments


def rates(tmp_path: Path, schedule: str, steps: int = 10, warmup: float = 0.2) -> list[float]:
    """The learning rate of each step, as Trainer sets it from our arguments, over the peak."""
    config = load_config(
        None,
        [
            f"training.schedule={schedule}", f"training.max_steps={steps}", f"training.warmup_fraction={warmup}",
            "training.learning_rate=0.5",
        ],
    )  # fmt: skip
    arguments = training_arguments(config, tmp_path, num_train=320, world_size=1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule_of = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(steps):
        found.append(round(optimizer.param_groups[0]["lr"] / 0.5, 3))
        optimizer.step()
        schedule_of.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0, 0.5, 1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    ],
)
def test_the_rate_follows_the_schedule(tmp_path, schedule, expected):
    assert rates(tmp_path, schedule) == expected


def test_a_long_warm_up_shortens_the_fall_of_wsd(tmp_path):
    found = rates(tmp_path, "wsd", warmup=0.9)
    assert found[:9] == [pytest.approx(step / 9, abs=1e-3) for step in range(9)]
    assert found[9] == 1.0
