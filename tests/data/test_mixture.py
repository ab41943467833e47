from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import LengthGroupedSampler, tokens_per_example
from sgm_finetune.data.mixture import SOURCE, Draw, divide, shares
from sgm_finetune.data.prepared import prepare_data
from sgm_finetune.data.questions import asked_indices
from sgm_finetune.data.splits import SPLITS, check_data, load_splits

CLASSIFICATION = "sequence-classification"


def write(path: str, *rows: dict) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(path: str, number: int, word: str = "film", **changed: str) -> str:
    """Rows with two classes, whose texts no other `word` has."""
    names = {"text": "text", "label": "label", **changed}
    rows = [{names["text"]: f"{word} number {i}", names["label"]: "bad" if i % 2 else "good"} for i in range(number)]
    return write(path, *rows)


def mixture(*entries: dict, **config: object) -> DataConfig:
    return DataConfig.model_validate({"mixture": list(entries), **config})


# shares and draws


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 2000))
def test_shares_add_up_and_are_the_exact_ones_rounded_up_or_down(weights, total):
    found = divide(weights, total)
    assert sum(found) == total
    assert np.abs(np.asarray(found) - np.asarray(weights) / sum(weights) * total).max() < 1 + 1e-6


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.lists(st.floats(0.1, 9), min_size=4, max_size=4),
    st.integers(1, 20), st.integers(0, 5),
)  # fmt: skip
def test_every_epoch_has_the_shares_and_examples_of_a_source_come_equally_often(sizes, weights, batch, seed):
    sources = np.repeat(np.arange(len(sizes)), sizes).tolist()
    draw = Draw(sources, weights[: len(sizes)], seed)
    sampler = LengthGroupedSampler([3] * len(sources), batch, seed, draw)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        counts = Counter(sources[index] for index in order)
        assert [counts[source] for source in range(len(sizes))] == divide(weights[: len(sizes)], len(order))
        seen.update(order)
        for numbers in (Counter(order), seen):
            of = [[numbers[i] for i, source in enumerate(sources) if source == one] for one in range(len(sizes))]
            assert all(max(part) - min(part) <= 1 for part in of)


def test_the_order_of_a_mixture_follows_from_the_seed_and_the_epoch_alone():
    draw = [Draw([0] * 50 + [1] * 30, [1, 3], seed) for seed in (0, 0, 1)]
    first, again, other = (list(LengthGroupedSampler([5] * 80, 16, 0, one)) for one in draw)
    assert first == again
    assert first != other


def test_a_source_that_an_epoch_would_leave_out_whole_is_refused():
    with pytest.raises(UserError, match=r"entry 2: b has none of the 16 training examples of an epoch; raise its weig"):
        shares(["a", "b"], [0] * 10 + [1] * 2, [1.0, 0.001], 16)


# rows


def test_a_mixture_of_one_source_is_that_source(in_tmp):
    reviews("a.jsonl", 60)
    alone = load_splits(DataConfig(train="a.jsonl", num_train=20), CLASSIFICATION)
    mixed = load_splits(mixture({"train": "a.jsonl"}, num_train=20), CLASSIFICATION)
    for split in SPLITS:
        assert getattr(alone, split).to_dict() == getattr(mixed, split).to_dict()


def test_each_source_has_its_columns_its_format_and_its_splits(in_tmp):
    def said(name: str) -> list[dict]:
        return [{"role": "user", "content": f"hi {name}"}, {"role": "assistant", "content": "yes"}]

    write("chat.jsonl", *({"messages": said(f"a{i}")} for i in range(20)))
    write("alpaca.jsonl", *({"instruction": f"do {i}", "output": "done"} for i in range(30)))
    answer = {"from": "gpt", "value": "good"}
    write("share.jsonl", *({"talk": [{"from": "human", "value": f"s {i}"}, answer]} for i in range(20)))
    write("test.jsonl", *({"instruction": f"try {i}", "output": "tried"} for i in range(7)))
    entries = [
        {"train": "chat.jsonl"},
        {"train": "alpaca.jsonl", "test": "test.jsonl"},
        {"train": "share.jsonl", "format": "sharegpt", "columns": {"messages": "talk"}},
    ]
    made = load_splits(mixture(*entries), "causal-lm")
    assert made.sources == ("chat.jsonl", "alpaca.jsonl", "share.jsonl")
    assert made.counts == {"train": [15, 27, 15], "validation": [2, 3, 2], "test": [3, 7, 3]}
    begins = [row[0]["content"].split()[0] for row in made.test["messages"][:]]
    assert begins == ["hi"] * 3 + ["try"] * 7 + ["s"] * 3
    assert {name for name, _ in made.origins["test"][3:10]} == {"test.jsonl"}


def test_num_train_is_divided_by_the_weights_and_num_test_by_the_sizes(in_tmp):
    entries = [
        {"train": reviews("a.jsonl", 400, "one"), "weight": 1},
        {"train": reviews("b.jsonl", 100, "two"), "weight": 3},
    ]
    made = load_splits(mixture(*entries, num_train=40, num_test=20), CLASSIFICATION)
    assert made.counts["train"] == [10, 30]
    assert made.counts["test"] == [16, 4]
    natural = load_splits(mixture(*({"train": one["train"]} for one in entries), num_train=40), CLASSIFICATION)
    assert natural.counts["train"] == [32, 8]


def test_repeats_between_sources_are_dropped_and_no_source_trains_on_the_test_of_another(in_tmp):
    reviews("a.jsonl", 50, "same")
    rows = [{"text": f"Same NUMBER {i}", "label": "good"} for i in range(5)]
    other = [{"text": f"other {i}", "label": "bad" if i % 2 else "good"} for i in range(40)]
    write("b.jsonl", *rows, *other)
    write("t.jsonl", {"text": "same number 30", "label": "good"}, {"text": "other 3", "label": "bad"})
    made = load_splits(mixture({"train": "a.jsonl"}, {"train": "b.jsonl", "test": "t.jsonl"}), CLASSIFICATION)
    assert "5 duplicates dropped" in made.description
    assert "2 texts that held-out data repeats dropped" in made.description
    texts = [set(map(str.casefold, getattr(made, split)["text"][:])) for split in SPLITS]
    assert len(texts[0] | texts[1] | texts[2]) == sum(map(len, texts)) == 50 + 40


def test_the_first_source_defines_the_classes(in_tmp):
    reviews("a.jsonl", 40, "one")
    write("b.jsonl", *({"text": f"two {i}", "label": "good"} for i in range(40)))
    made = load_splits(mixture({"train": "a.jsonl"}, {"train": "b.jsonl"}), CLASSIFICATION)
    assert made.labels == ("bad", "good")
    write("c.jsonl", *({"text": f"three {i}", "label": "positive"} for i in range(40)))
    with pytest.raises(UserError) as caught:
        check_data(mixture({"train": "a.jsonl"}, {"train": "c.jsonl"}), CLASSIFICATION)
    assert str(caught.value) == (
        "data.mixture, entry 2: c.jsonl, row 1 (train): label 'positive' is not in the first source of data.mixture, "
        "which defines the classes (known: bad, good)"
    )


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"train": "none.jsonl"}, "data.mixture, entry 2: train=none.jsonl does not exist"),
        ({"train": "a.jsonl"}, "data.mixture, entry 2: all rows of a.jsonl are also in the held-out data or in an ear"),
        ({"train": "t.jsonl"}, "entry 2: the examples of t.jsonl consist of text, those of the first source of mes"),
        ({"train": "a.jsonl", "columns": {"messages": "chats"}}, "data.mixture, entry 2: columns: a.jsonl has no colu"),
        ({"name": "imdbb"}, "data.mixture, entry 2: Unknown name=imdbb; did you mean `imdb`?"),
        ({"train": "few.jsonl"}, "data.mixture, entry 2: few.jsonl has 1 example(s) once duplicates are dropped"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_its_number(in_tmp, second, words):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    write("a.jsonl", *({"messages": [{"role": "system", "content": str(i)}, *turns]} for i in range(30)))
    write("few.jsonl", {"messages": turns})
    write("t.jsonl", *({"text": f"a text {i}"} for i in range(30)))
    with pytest.raises(UserError) as caught:
        check_data(mixture({"train": "a.jsonl"}, second), "causal-lm")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_sources_of_one_name_have_two_names(in_tmp):
    for folder in ("x", "y"):
        Path(folder).mkdir()
        reviews(f"{folder}/train.jsonl", 40, folder)
    made = load_splits(mixture({"train": "x/train.jsonl"}, {"train": "y/train.jsonl"}), CLASSIFICATION)
    assert made.sources == ("train.jsonl", "train.jsonl (entry 2)")


# encoded


def test_encoded_sources_stand_one_after_another_and_say_where_they_come_from(in_tmp, llama_folder):
    short = [{"prompt": f"film {'very ' * i}", "completion": " good"} for i in range(20)]
    long = [{"ask": f"plot {'very ' * i}", "say": " bad and" * 4} for i in range(10)]
    entries = [
        {"train": write("a.jsonl", *short), "weight": 1},
        {"train": write("b.jsonl", *long), "columns": {"prompt": "ask", "completion": "say"}, "weight": 1},
    ]
    settings = [f"model.name={llama_folder}", "model.task=causal-lm", "training.batch_size=4", "data.max_length=64"]
    config = load_config(None, [*settings, f"data.mixture={json.dumps(entries)}"])
    made = prepare_data(config, StepLog(Console(quiet=True)))
    assert made.train.dataset[SOURCE][:] == [0] * 15 + [1] * 8
    assert [(share.name, share.examples, share.per_epoch) for share in made.mixture] == [
        ("a.jsonl", 15, 12), ("b.jsonl", 8, 12)
    ]  # fmt: skip
    lengths = [np.mean([len(ids) for ids in made.train.dataset["input_ids"][a:b]]) for a, b in ((0, 15), (15, 23))]
    assert tokens_per_example(config, made.train.dataset) == pytest.approx(np.mean(lengths))
    assert asked_indices(made.test.dataset, 3) == [0, 1, 3]
    packed = prepare_data(load_config(None, [*settings, f"data.mixture={json.dumps(entries)}", "data.packing=true"]),
                          StepLog(Console(quiet=True)))  # fmt: skip
    assert "position_ids" in packed.train.dataset.column_names
    assert sorted(set(packed.train.dataset[SOURCE][:])) == [0, 1]


def test_sources_of_pairs_keep_their_sources_and_targets(in_tmp):
    """`source` is also a role of seq2seq-lm."""
    for name in ("a", "b"):
        write(f"{name}.jsonl", *({"source": f"{name} {i}", "target": f"t {i}"} for i in range(20)))
    made = load_splits(mixture({"train": "a.jsonl"}, {"train": "b.jsonl"}), "seq2seq-lm")
    assert made.counts == {"train": [15, 15], "validation": [2, 2], "test": [3, 3]}
    assert made.train.column_names == ["source", "target"]
    assert {text.split()[0] for text in made.train["source"][:15]} == {"a"}
