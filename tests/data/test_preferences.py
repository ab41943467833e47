"""Preferences: two answers behind the same prompt, in every form in which people have them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import collator, some_pairs
from sgm_finetune.data.encoding import IGNORED, Encoded, encode, num_tokens, sequence_lengths
from sgm_finetune.data.pair_encoding import _elsewhere
from sgm_finetune.data.splits import DataSplits, load_splits

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def asked(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def read(folder: Path, rows: list[dict], **config) -> DataSplits:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_splits(DataConfig(train=str(path), **config), "preference")


def encoded(folder: Path, rows: list[dict], tokenizer, max_length: int = 64, **config) -> Encoded:
    splits = read(folder, rows, **config)
    return encode(splits.train, tokenizer, "preference", max_length, splits.origins["train"])


TEXTS = [{"prompt": f"w{i} w20 ", "chosen": f"w{i} w31", "rejected": f"w{i} w41 w42"} for i in range(10)]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in TEXTS]
CHATS = [
    {
        "prompt": [asked(row["prompt"].strip())],
        "chosen": [said(row["chosen"])],
        "rejected": [said(row["rejected"])],
    }
    for row in TEXTS
]
WHOLE_CHATS = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHATS]
FORMS = {
    "texts": TEXTS,
    "messages": CHATS,
    "whole conversations": WHOLE_CHATS,
    "whole conversations and their prompt": [
        {**whole, "prompt": row["prompt"]} for whole, row in zip(WHOLE_CHATS, CHATS, strict=True)
    ],
    "texts behind messages": [{**row, "prompt": chat["prompt"]} for row, chat in zip(TEXTS, CHATS, strict=True)],
    "single messages of ShareGPT": [
        {"prompt": [{"from": "human", "value": row["prompt"].strip()}]}
        | {name: {"from": "gpt", "value": row[name]} for name in ("chosen", "rejected")}
        for row in TEXTS
    ],
    "a text before messages": [{**row, "prompt": row["prompt"][0]["content"]} for row in CHATS],
    "a text before whole conversations": [
        {**whole, "prompt": row["prompt"][0]["content"]} for whole, row in zip(WHOLE_CHATS, CHATS, strict=True)
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_both_answers_follow_the_same_prompt_and_are_learnt_to_their_ends(form, in_tmp, causal_tokenizer):
    causal_tokenizer.chat_template = TEMPLATE
    found = encoded(in_tmp, FORMS[form], causal_tokenizer)
    assert len(found.dataset) == 8
    for row in found.dataset:
        ids, labels, other, other_labels = (row[k] for k in ("input_ids", "labels", "other_ids", "other_labels"))
        begin = labels.count(IGNORED)
        assert other_labels.count(IGNORED) == begin
        assert ids[:begin] == other[:begin]
        assert labels == [IGNORED] * begin + ids[begin:]
        assert other_labels == [IGNORED] * begin + other[begin:]
        texts = causal_tokenizer.decode(ids[begin:]), causal_tokenizer.decode(other[begin:])
        assert [re.sub(r"^w\d ", "", text) for text in texts] == ["w31 <eos>", "w41 w42 <eos>"]
        assert "w20" in causal_tokenizer.decode(ids[:begin])


def test_a_common_beginning_is_the_prompt_where_there_is_no_other(in_tmp, causal_tokenizer):
    found = encoded(in_tmp, IMPLICIT, causal_tokenizer)
    for row in found.dataset:
        begin = row["labels"].count(IGNORED)
        assert begin == 3  # up to the word in which the answers differ
        assert row["input_ids"][:begin] == row["other_ids"][:begin]
        assert causal_tokenizer.decode(row["input_ids"][begin:]) == "w31 <eos>"
        assert causal_tokenizer.decode(row["other_ids"][begin:]) == "w41 w42 <eos>"


def test_earlier_answers_belong_to_the_prompt(in_tmp, causal_tokenizer):
    causal_tokenizer.chat_template = TEMPLATE
    before = [asked("w1"), said("w2")]
    rows = [
        {"chosen": [*before, asked(f"w{i}"), said("w31")], "rejected": [*before, asked(f"w{i}"), said("w32")]}
        for i in range(10)
    ]
    for row in encoded(in_tmp, rows, causal_tokenizer).dataset:
        assert [token for token in row["labels"] if token != IGNORED] == row["input_ids"][-2:]


@pytest.mark.parametrize(
    ("rows", "said_so"),
    [
        ([*TEXTS[:3], {**TEXTS[3], "rejected": TEXTS[3]["chosen"]}], "row 4: `chosen` and `rejected` are equal"),
        ([*CHATS[:1], {**CHATS[3], "rejected": CHATS[3]["chosen"]}], "row 2: `chosen` and `rejected` are equal"),
        ([{**CHATS[0], "rejected": [asked("w1")]}], "row 1: `rejected` has no answer by the assistant behind"),
        ([{"chosen": "w1 w2", "rejected": "w1"}], "row 1: one answer is the beginning of the other"),
        ([{**CHATS[0], "rejected": "w1"}], "row 1: `chosen` and `rejected` are not both lists of messages, nor both"),
        ([{"chosen": said("w1"), "rejected": said("w2")}], "row 1: `chosen` and `rejected` are not both lists"),
        ([{**TEXTS[0], "rejected": ""}], "row 1: `rejected` is empty"),
        ([{"prompt": "w1", "completion": "w2", "label": "maybe"}], "row 1: `label` is 'maybe'; write true for"),
        ([{"prompt": "w1", "completion": "w2", "label": None}], "row 1: `label` is missing; write true for"),
    ],
)
def test_what_is_no_preference_is_refused_with_its_row(rows, said_so, in_tmp):
    with pytest.raises(UserError, match=re.escape(said_so)):
        read(in_tmp, rows)


def test_columns_may_have_other_names(in_tmp):
    rows = [{"q": row["prompt"], "win": row["chosen"], "lose": row["rejected"]} for row in TEXTS]
    splits = read(in_tmp, rows, columns={"prompt": "q", "chosen": "win", "rejected": "lose"})
    assert splits.train.column_names == ["prompt", "completion", "rejected"]
    with pytest.raises(UserError, match=re.escape("name it with data.columns='{chosen: better, rejected: worse}'")):
        read(in_tmp, [{"prompt": "w1", "better": "w2", "worse": "w3"}])


def test_long_pairs_are_cut_and_those_that_the_cut_makes_equal_are_dropped(in_tmp, causal_tokenizer):
    rows = [{"prompt": f"w{i} ", "chosen": "w1 " * 9 + "w2", "rejected": "w1 " * 9 + "w3"} for i in range(6)]
    rows += [{"prompt": f"w{i} ", "chosen": "w4 " * 9, "rejected": "w5"} for i in range(6)]
    found = encoded(in_tmp, rows, causal_tokenizer, max_length=8, test_fraction=0.01, validation_fraction=0.01)
    assert found.num_dropped + len(found.dataset) == 10
    assert found.num_truncated == len(found.dataset)
    assert all(row["labels"][1] == causal_tokenizer.convert_tokens_to_ids("w4") for row in found.dataset)
    with pytest.raises(UserError, match="100 % of 8 examples lose every answer token"):
        encoded(in_tmp, [{**row, "prompt": "w1 " * 9 + row["prompt"]} for row in TEXTS], causal_tokenizer, 8)


@pytest.mark.parametrize("label", [(True, False), (1, 0), ("true", "False")])
def test_single_answers_have_a_verdict_and_the_answer_to_another_prompt(label, in_tmp, causal_tokenizer):
    rows = [{"prompt": f"w{i} ", "completion": f"w{30 + i} w{50 + i % 2}", "label": label[i % 2]} for i in range(20)]
    found = encoded(in_tmp, rows, causal_tokenizer)
    for row in found.dataset:
        prompt, answer, kind, _ = (causal_tokenizer.decode([token]) for token in row["input_ids"])
        same, other, *_ = (causal_tokenizer.decode([token]) for token in row["other_ids"])
        assert same == prompt
        assert other != answer
        assert bool(row["desirable"]) == (kind == "w50")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_every_answer_is_taken_once_and_by_another_prompt_where_that_is_possible(prompts):
    found = _elsewhere([(prompt,) for prompt in prompts])
    assert sorted(found) == list(range(len(prompts)))
    if max(map(prompts.count, prompts)) <= len(prompts) / 2:
        assert all(prompts[other] != prompt for prompt, other in zip(prompts, found, strict=True))


def test_a_batch_has_the_chosen_rows_first_and_its_lengths_are_those_of_the_longer(in_tmp, causal_tokenizer):
    dataset = encoded(in_tmp, TEXTS, causal_tokenizer).dataset
    assert sequence_lengths(dataset) == [len(row["other_ids"]) for row in dataset]
    assert num_tokens(dataset) == sum(len(row["input_ids"]) + len(row["other_ids"]) for row in dataset)
    rows = [dataset[i] for i in range(4)]
    batch = collator(causal_tokenizer, "preference")(rows)
    sides = [row["input_ids"] for row in rows] + [row["other_ids"] for row in rows]
    for ids, mask, expected in zip(batch["input_ids"].tolist(), batch["attention_mask"], sides, strict=True):
        assert ids[: int(mask.sum())] == expected
    part = some_pairs(batch, 1, 2)
    assert part["input_ids"].tolist() == [batch["input_ids"][i].tolist() for i in (1, 2, 5, 6)]
