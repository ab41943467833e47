"""examples.json holds the examples whose prediction changed, with their text, in a fixed order."""

from __future__ import annotations

from datasets import Dataset

from sgm_finetune.data.splits import DataSplits
from sgm_finetune.results.examples import (
    KEPT_PREDICTIONS,
    MAX_TEXT,
    changed_examples,
    fingerprint_of_test,
    kept_predictions,
)


def splits(columns: dict, labels: tuple[str, ...] = ("bad", "good"), kind=None) -> DataSplits:
    test = Dataset.from_dict(columns)
    return DataSplits(test, test, test, labels, "made up", kind)


def changed(made: DataSplits, before: list, after: list, task="sequence-classification", metrics=({}, {})) -> dict:
    return changed_examples(made, task, made.test, (before, after), metrics)


def test_what_became_right_comes_first_then_what_became_wrong():
    made = splits({"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]})
    found = changed(made, [1, 0, 0, 0], [1, 1, 1, 0])
    assert found["num_compared"] == 4
    assert found["num_changed"] == {"mended": 1, "spoilt": 1, "other": 0}
    assert found["examples"] == [
        {"index": 2, "text": "c", "truth": "good", "before": "bad", "after": "good", "became": "mended"},
        {"index": 1, "text": "b", "truth": "bad", "before": "bad", "after": "good", "became": "spoilt"},
    ]


def test_only_some_of_many_are_shown_and_long_texts_lose_their_middle():
    number = 5 * KEPT_PREDICTIONS
    made = splits({"text": ["begin " + "x" * 5000 + " end"] * number, "label": [1] * number})
    before, after = kept_predictions([0] * number), kept_predictions([1] * number)
    found = changed(made, before, after)
    assert found["num_compared"] == found["num_changed"]["mended"] == KEPT_PREDICTIONS
    assert [e["index"] for e in found["examples"]] == list(range(10))
    text = found["examples"][0]["text"]
    assert len(text) <= MAX_TEXT
    assert text.startswith("begin")
    assert text.endswith("end")


def test_sets_of_classes_are_named():
    made = splits({"text": ["a"], "label": [[1.0, 0.0]]}, ("warm", "loud"), "classes")
    (example,) = changed(made, [[0, 0]], [[1, 0]])["examples"]
    assert (example["truth"], example["before"], example["after"]) == ("warm", "none", "warm")


def test_of_numbers_those_that_moved_most_come_first():
    made = splits({"text": ["a", "b"], "label": [1.0, 2.0]}, (), "number")
    found = changed(made, [0.5, 0.0], [0.75, 1.9])
    assert [e["text"] for e in found["examples"]] == ["b", "a"]
    assert found["num_changed"]["mended"] == 2


def test_tags_are_shown_with_their_words():
    made = splits({"tokens": [["Ann", "met", "Bob"]], "tags": [[1, 0, 1]]}, ("O", "PER"))
    (example,) = changed(made, [[0, 0, 1]], [[1, 0, 1]], "token-classification")["examples"]
    assert (example["text"], example["before"], example["after"]) == ("Ann met Bob", "Bob/PER", "Ann/PER Bob/PER")


def test_answers_of_a_language_model_are_compared_with_those_in_the_data():
    samples = [[{"prompt": "2+2", "reference": "4", "answer": answer}] for answer in ("5", "4")]
    made = splits({"text": ["unused"]})
    found = changed(made, [], [], "causal-lm", ({"samples": samples[0]}, {"samples": samples[1]}))
    assert found["examples"][0] | {"index": 0} == {
        "index": 0, "text": "2+2", "truth": "4", "before": "5", "after": "4", "became": "mended",
    }  # fmt: skip


def test_running_text_has_no_examples():
    assert kept_predictions([None, None]) == []
    assert changed(splits({"text": ["a"]}), [], [], "causal-lm")["examples"] == []


def test_the_fingerprint_is_that_of_the_test_examples_and_their_labels():
    one = splits({"text": ["a", "b"], "label": [0, 1]})
    assert fingerprint_of_test(one) == fingerprint_of_test(splits({"label": [0, 1], "text": ["a", "b"]}))
    others = [
        splits({"text": ["b", "a"], "label": [1, 0]}), splits({"text": ["a", "b"], "label": [1, 1]}),
        splits({"text": ["a", "b"], "label": [0, 1]}, ("good", "bad")), splits({"text": ["a"], "label": [0]}),
    ]  # fmt: skip
    assert len({fingerprint_of_test(made) for made in (one, *others)}) == 5
