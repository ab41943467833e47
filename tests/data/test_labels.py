"""A label is read as it is meant: vectors of 0 and 1, lists in texts, and truth values in several spellings."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.splits import load_splits
from sgm_finetune.data.tables import Table

TASK = "sequence-classification"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, labels: list) -> str:
    texts = [f"{name} number {i}" for i in range(len(labels))]
    if name.endswith(".csv"):
        with open(name, "w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *zip(texts, labels, strict=True)])
    else:
        Path(name).write_text(
            "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in zip(texts, labels, strict=True))
        )
    return name


def read(labels: list, name: str = "r.jsonl", **settings):
    """The splits, and text -> label."""
    made = load_splits(DataConfig(train=write(name, labels), **settings), TASK)
    rows = [row for part in (made.train, made.validation, made.test) for row in part]
    return made, [row["label"] for row in sorted(rows, key=lambda row: int(row["text"].split()[-1]))]


VECTORS = [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]] * 6


@pytest.mark.parametrize(
    ("name", "written", "settings"),
    [
        ("r.jsonl", lambda v: v, {}),
        ("r.jsonl", lambda v: v, {"label_kind": "classes"}),
        ("r.jsonl", lambda v: [float(x) for x in v], {}),
        ("r.jsonl", lambda v: [bool(x) for x in v], {}),
        ("r.jsonl", lambda v: [str(x) for x in v], {}),
        ("r.jsonl", lambda v: json.dumps(v), {}),
        ("r.csv", lambda v: str(v), {}),
        ("r.csv", lambda v: str([float(x) for x in v]), {}),
        ("r.csv", lambda v: str([bool(x) for x in v]), {}),
        ("r.csv", lambda v: f"[{' '.join(map(str, v))}]", {}),
        ("r.csv", lambda v: f"[{'. '.join(map(str, v))}.]", {}),
        ("r.csv", lambda v: ",".join(map(str, v)), {"label_kind": "classes"}),
    ],
)
def test_a_list_with_a_0_or_1_for_every_class_is_a_vector(name, written, settings):
    made, labels = read([written(vector) for vector in VECTORS], name, **settings)
    assert (made.labels, made.label_kind) == (("0", "1", "2"), "classes")
    assert labels == VECTORS
    assert "`label` is a 0 or 1 for each of 3 classes" in made.description


def test_vectors_of_two_classes_that_exclude_each_other_are_vectors():
    made, labels = read([[1, 0], [0, 1]] * 12)
    assert made.labels == ("0", "1")
    assert labels == [[1, 0], [0, 1]] * 12


@pytest.mark.parametrize(
    ("rows", "names", "expected"),
    [
        ([[0, 2], [1], [2, 1], []], ("0", "1", "2"), [[1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]]),
        ([[0, 1], [1], [0], []], ("0", "1"), [[1, 1], [0, 1], [1, 0], [0, 0]]),
        ([[3, 7], [7, 3], [3, 9]], ("3", "7", "9"), [[1, 1, 0], [1, 1, 0], [1, 0, 1]]),
        (["['a', 'b']", '["b"]', "[]"], ("a", "b"), [[1, 1], [0, 1], [0, 0]]),
        ([[0], [1]], ("0", "1"), [[1, 0], [0, 1]]),
    ],
)
def test_lists_of_names_or_ids_stay_sets_of_classes(rows, names, expected):
    made, labels = read(rows * 8)
    assert made.labels == names
    assert labels == expected * 8
    assert ("of one 0 or 1 in `label` are read as class ids" in made.description) == (rows == [[0], [1]])


@pytest.mark.parametrize("name", ["[POS]", "[a b]", "[x", "[1, y]", "[--1]", "['a'", "[(1)]", "[007]"])
def test_a_name_in_brackets_is_a_name(name):
    made, _ = read([name, "[NEG]"] * 12)
    assert made.labels == tuple(sorted([name, "[NEG]"]))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 1, 0], [1, 0]], r"row 2: `label` is \[1, 0\] and has 2 numbers, row 1 has 3; write a 0 or 1 for every"),
        ([[1.0, 0.0], [1.0]], "row 2: .* has 1 numbers, row 1 has 2"),
        ([[1, 0, 0], None, [0, 0, 1]], "row 2: `label` is missing; write a 0 or 1 for each of 3 classes"),
        ([[1, 1, 0], [1, 1, 0]], r"every label in `label` is \[1, 1, 0\]; classification needs different labels"),
        ([[True], [False]], "`label` holds lists of one number; write the number alone"),
        ([[0.2, 0.8], [0.9, 0.1]], r"holds \[0.2, 0.8\]; write a list of names, or a 0 or 1 for every class"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_with_their_row(rows, words):
    with pytest.raises(UserError, match=words):
        read(rows * 6)


def test_vectors_of_the_test_data_have_a_number_for_every_class():
    test = write("t.jsonl", [[1, 0, 1], [1, 0]])
    with pytest.raises(UserError, match=r"t.jsonl, row 2: `label` is \[1, 0\]; write a 0 or 1 for each of 3 classes"):
        read(VECTORS, test=test)
    made = load_splits(DataConfig(train="r.jsonl", test=write("t.jsonl", [[0, 0, 1], [1, 1, 1]])), TASK)
    assert made.test["label"][:] == [[0, 0, 1], [1, 1, 1]]


def test_class_ids_with_declared_names_are_no_vectors():
    from sgm_finetune.data.labels import LabelReader

    table = Table("made", {"label": [[1, 1, 0], [0, 1, 1]]}, {"label": ["x", "y"]})
    reader = LabelReader()
    assert reader.read(table, "label", "train", "auto") == [[1, 1], [1, 1]]
    assert reader.names == ("x", "y")


@pytest.mark.parametrize(
    ("values", "names", "said"),
    [
        ([True, 0, False, 1], ("False", "True"), "True, 0, False, 1 in `label` are read as False and True"),
        (["true", "False", "TRUE", "false"], ("False", "True"), "are read as False and True"),
        (["1", False, True, 0], ("False", "True"), "are read as False and True"),
        ([True, 0], ("False", "True"), "are read as False and True"),
        ([True, False], ("False", "True"), None),
        (["true", "false"], ("false", "true"), None),
        ([1, 0, "1"], ("0", "1"), None),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_truth_values_have_two_classes_however_they_are_written(values, names, said, name):
    made, labels = read(values * 6, name)
    assert made.labels == names
    assert labels == [int(str(value).lower() in ("true", "1")) for value in values] * 6
    assert (said or "no duplicates") in made.description
    assert ("are read as" in made.description) == (said is not None)


@pytest.mark.parametrize("train", [[True, False], ["true", "false"], [0, 1], ["TRUE", "FALSE"]])
@pytest.mark.parametrize("test", [[True, False], ["true", "false"], [1, 0], ["TRUE", "0"]])
def test_held_out_data_may_write_truth_values_in_another_way(train, test):
    made = load_splits(DataConfig(train=write("r.jsonl", train * 12), test=write("t.jsonl", test)), TASK)
    assert made.test["label"][:] == [1, 0]
    assert len(made.labels) == 2


@pytest.mark.parametrize(
    ("values", "doubt"),
    [
        (["Pos", "pos", "neg"], "classes that differ only in case: Pos, pos"),
        (["0", "1", "pos", "neg"], "both numbers and words are classes: 0, 1, neg, pos"),
        ([True, 2, "no"], "both numbers and words are classes: 2, True, no"),
        (["pos", "neg"], None),
        ([1, 2, 3], None),
    ],
)
def test_classes_that_may_be_one_are_said(values, doubt):
    made, _ = read(values * 8)
    assert len(made.labels) == len(values)
    assert (doubt or "no duplicates") in made.description
    assert any(word in made.description for word in ("differ only", "both numbers")) == (doubt is not None)


@pytest.mark.parametrize("by", [";", "|", ",", "; "])
def test_names_with_separators_between_them_are_classes_when_asked_and_doubted_otherwise(by):
    labels = [f"a{by}b", "b", f"a{by}c", "c"] * 6
    made, _ = read(labels, "r.csv", label_kind="classes")
    assert made.labels == ("a", "b", "c")
    made, _ = read(labels, "r.csv")
    assert f"{labels[0]!r} is one class; for several classes a row, set data.label_kind=classes" in made.description


def test_a_comma_in_names_that_are_classes_is_no_doubt():
    made, _ = read(["Paris, France", "Rome, Italy"] * 6, "r.csv")
    assert made.labels == ("Paris, France", "Rome, Italy")
    assert "label_kind" not in made.description


def test_a_decimal_comma_is_refused_with_its_remedy():
    with pytest.raises(UserError, match=r"'0,5'.*write numbers with a decimal point"):
        read([f"{i},5" for i in range(12)], "r.csv", label_kind="number")
