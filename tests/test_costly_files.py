"""Small files that would cost much to read cost little (docs/untrusted.md). tests/costly_files.py makes them."""

from __future__ import annotations

import os
import sys
import time

import pytest
from conftest import make_tokenizer

from sgm_finetune.base.errors import UserError
from sgm_finetune.data.chat import asked_text, written_answers
from sgm_finetune.results.stops import turn_end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc and limits that Linux enforces")

LARGE = {  # seconds and MiB where a file above 1 MB takes more than 2 s or 200 MiB
    "safetensors, 100,000 tensors": (15, 200),
    ".pth, 24,000 storages": (8, 200),
    "one text of 100 MB": (15, 2500),
}


def slowness() -> float:
    """How many times as long plain Python takes here as on the processor of costly_files.jsonl; at least 1."""

    def loop() -> float:
        began, total = time.process_time(), 0
        for number in range(3_000_000):
            total += number
        return time.process_time() - began

    return max(1.0, min(loop() for _ in range(3)) / 0.1)


@pytest.mark.parametrize("name", [
    "JSON, the last of 13,000 keys twice", "JSON, the last of 26,000 keys twice", "YAML, the last of 20,000 keys twice",
    "YAML, a list of 450,000 numbers", "YAML, mappings that merge each other", "config.json, 10,000 layers",
    "config.json, hidden_size 10**9", "config.json, intermediate_size 10**8", "chat template, loops in loops",
    "chat template, a text of 3 GB", "safetensors, 15,000 tensors", "GGUF, a list of 500,000 texts",
    "GGUF, 40,000 keys", "data folder, 600 MiB in a .gz", "data folder, a card with an address",
    "a conversation of 16,000 messages", ".pth, 24,000 storages",
    pytest.param("safetensors, 100,000 tensors", marks=pytest.mark.slow),
    pytest.param("one text of 100 MB", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_costly_file_takes_two_seconds_and_200_mib_at_most(name):
    from costly_files import COSTLY, cost

    seconds, mib = LARGE.get(name, (2, 200))
    for _ in range(4):  # other work on the machine makes a reader slower, never quicker
        slow = slowness()
        found = cost(COSTLY[name])
        if found.seconds < seconds * slow:
            break
    assert found.seconds < seconds * slow, (found, slow)
    assert found.mib < mib, found
    assert found.outcome == "a result" or found.outcome.startswith("one line"), found


def test_every_costly_file_is_held_to_bounds():
    from costly_files import COSTLY

    [cases] = [mark.args[1] for mark in test_a_costly_file_takes_two_seconds_and_200_mib_at_most.pytestmark]
    assert {case if isinstance(case, str) else case.values[0] for case in cases} == set(COSTLY)


ASKED, ANSWERED = {"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}
USES = {
    "to ask": lambda tokenizer: asked_text([ASKED], tokenizer),
    "to learn": lambda tokenizer: written_answers([ASKED, ANSWERED], tokenizer),
    "to stop": turn_end,
}


@pytest.mark.parametrize("use", USES)
def test_a_chat_template_without_end_is_refused_before_it_is_used(use):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + use
    with pytest.raises(UserError, match="chat template takes more than 1 second"):
        USES[use](tokenizer)


def test_an_ordinary_chat_template_is_tried_once(monkeypatch):
    tokenizer, forks = make_tokenizer(), []
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %} once"
    real = os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or real())
    for _ in range(3):
        assert "film" in asked_text([{"role": "user", "content": "film"}], tokenizer)
    assert len(forks) == 1
