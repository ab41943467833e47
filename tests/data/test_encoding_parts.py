"""Large splits are encoded in parts, by several processes."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data import encoding_parts
from sgm_finetune.data.encoding import encode
from sgm_finetune.data.encoding_parts import encode_in_parts
from sgm_finetune.data.splits import DataSplits, load_splits

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.written }}{{ eos_token }}{% endfor %}"
PART = 16


@pytest.fixture
def processes(request, monkeypatch):
    number = getattr(request, "param", 1)
    monkeypatch.setattr(encoding_parts, "PART", PART)
    monkeypatch.setattr(encoding_parts, "num_processes", lambda num_parts: number)
    return number


by_processes = pytest.mark.parametrize("processes", [1, 2], indirect=True)


@pytest.fixture
def tokenizer(causal_tokenizer):
    causal_tokenizer.chat_template = TEMPLATE
    return causal_tokenizer


def chat(number: int, question: str = "w1") -> list[dict]:
    answer = {"role": "assistant", "content": f"w{number % 60} w{number // 60}"}
    more = {"written": "w7"} if number % 3 else {"unheard": "w8"}
    return [{"role": "user", "content": question}, {**answer, **more}]


def splits_of(rows: list[dict], task="causal-lm") -> DataSplits:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_splits(DataConfig(train="rows.jsonl", validation_fraction=0.1, test_fraction=0.1), task)


@by_processes
def test_parts_give_what_one_piece_gives(processes, in_tmp, tokenizer):
    splits = splits_of([{"messages": chat(number)} for number in range(80)])
    parts = encode_in_parts(splits.train, tokenizer, "causal-lm", 64, splits.origins["train"])
    whole = encode(splits.train, tokenizer, "causal-lm", 64, splits.origins["train"])
    assert len(splits.train) > 3 * PART
    assert parts.dataset.to_dict() == whole.dataset.to_dict()
    assert parts.dataset.features == whole.dataset.features
    for field in fields(whole)[1:]:
        assert getattr(parts, field.name) == getattr(whole, field.name), field.name
    assert (parts.unread, parts.written) == (("unheard",), ("written",))


def test_pairs_in_parts_give_what_one_piece_gives(processes, in_tmp, tokenizer):
    rows = [{"chosen": chat(number), "rejected": chat(number + 100)} for number in range(50)]
    splits = splits_of(rows, "preference")
    parts = encode_in_parts(splits.train, tokenizer, "preference", 64, splits.origins["train"])
    whole = encode(splits.train, tokenizer, "preference", 64, splits.origins["train"])
    assert parts.dataset.to_dict() == whole.dataset.to_dict()


@by_processes
def test_a_refused_conversation_is_named(processes, in_tmp, tokenizer):
    splits = splits_of([{"messages": chat(number)} for number in range(80)])
    table, row = splits.origins["train"][3 * PART]
    refused = chat(row - 1)[1]["content"]
    test = f"{{% if messages[-1].content == '{refused}' %}}{{{{ raise_exception('not this') }}}}{{% endif %}}"
    tokenizer.chat_template = test + TEMPLATE
    with pytest.raises(UserError, match=re.escape(f"{table}, row {row}: ") + ".*not this"):
        encode_in_parts(splits.train, tokenizer, "causal-lm", 64, splits.origins["train"])


def test_a_part_with_nothing_to_learn_is_dropped_and_all_of_them_are_refused(processes, in_tmp, tokenizer):
    splits = splits_of([{"messages": chat(number, "w1 " * (30 if number < 40 else 1))} for number in range(80)])
    order = sorted(range(len(splits.train)), key=splits.origins["train"].__getitem__)
    split, origins = splits.train.select(order), [splits.origins["train"][row] for row in order]
    parts = encode_in_parts(split, tokenizer, "causal-lm", 16, origins)
    whole = encode(split, tokenizer, "causal-lm", 16, origins)
    assert parts.num_dropped == whole.num_dropped > PART
    assert parts.dataset.to_dict() == whole.dataset.to_dict()
    with pytest.raises(UserError) as of_parts:
        encode_in_parts(split, tokenizer, "causal-lm", 3, origins)
    with pytest.raises(UserError) as of_all:
        encode(split, tokenizer, "causal-lm", 3, origins)
    assert str(of_parts.value) == str(of_all.value)


def test_parts_of_a_process_that_ends_are_encoded_all_the_same(in_tmp, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding_parts, "PART", PART)
    monkeypatch.setattr(encoding_parts, "num_processes", lambda number: 2)
    begun: list[subprocess.Popen] = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            begun.append(self)
            if len(begun) == 1:
                self.kill()

    monkeypatch.setattr(encoding_parts.subprocess, "Popen", Watched)
    splits = splits_of([{"messages": chat(number)} for number in range(80)])
    parts = encode_in_parts(splits.train, tokenizer, "causal-lm", 64, splits.origins["train"])
    assert parts.dataset.to_dict() == encode(splits.train, tokenizer, "causal-lm", 64).dataset.to_dict()
    assert len(begun) == 2
    assert all(process.poll() is not None for process in begun), "no process outlives the call"
