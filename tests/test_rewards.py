"""Reward models: they learn from pairs to score answers, and every way to ask for a score gives the same one."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import BAD, GOOD, OTHER, make_batches, make_bert, make_model, make_tokenizer
from processes import adapter, assert_one_run, losses, torchrun

from sgm_finetune.base.config_file import parse_config
from sgm_finetune.base.errors import UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """120 pairs of answers: a chosen one has good words, a rejected one has bad words."""
    chooser = random.Random(0)

    def answer(words: list[str]) -> str:
        return " ".join(chooser.choice([*words, *OTHER]) for _ in range(chooser.randint(2, 6))) + f" {words[0]}"

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": " ".join(chooser.choices(OTHER, k=3)), "chosen": f" {answer(GOOD)}", "rejected": f" {answer(BAD)}"}
        for _ in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(settings, pairs) -> list[str]:
    given = [line for line in settings if not line.startswith("data.train")]
    return [
        *given, f"data.train={pairs}", "model.task=reward", "training.batch_size=8", "training.eval_steps=10",
        "training.learning_rate=0.03",
    ]  # fmt: skip


def test_a_run(run, command, tmp_path, pairs):
    whole = command("finetune", run)
    print(command.said)
    print(whole["before"], whole["after"])
