"""examples.json holds a sample of the examples whose prediction changed or stayed wrong, and counts of all of them."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset

from sgm_finetune.data.splits import DataSplits
from sgm_finetune.results.examples import (
    KEPT_PREDICTIONS,
    LEAST_SHOWN,
    MAX_CLASSES,
    MAX_TEXT,
    NUM_SHOWN,
    changed_examples,
    fingerprint_of_test,
    kept_predictions,
    sample_of,
)


def splits(columns: dict, labels: tuple[str, ...] = ("bad", "good"), kind=None) -> DataSplits:
    test = Dataset.from_dict(columns)
    return DataSplits(test, test, test, labels, "made up", kind)


def changed(made: DataSplits, before: list, after: list, task="sequence-classification", metrics=({}, {})) -> dict:
    return changed_examples(made, task, made.test, (before, after), metrics)


def test_what_became_right_and_what_became_wrong_is_kept_and_all_is_counted():
    made = splits({"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]})
    found = changed(made, [1, 0, 0, 0], [1, 1, 1, 0])
    assert found["num_compared"] == 4
    assert found["num_changed"] == {"mended": 1, "spoilt": 1, "other": 0}
    assert sorted(found["examples"], key=lambda one: -one["index"]) == [
        {
            "index": 2,
            "text": "c",
            "truth": "good",
            "before": "bad",
            "after": "good",
            "became": "mended",
            "class": "good",
        },
        {"index": 1, "text": "b", "truth": "bad", "before": "bad", "after": "good", "became": "spoilt", "class": "bad"},
    ]
    assert found["counts"] == {"mended": 1, "spoilt": 1, "other": 0, "right": 2}
    assert found["by_class"]["good"] == {"mended": 1, "spoilt": 0, "other": 0, "right": 1}
    assert found["by_class"]["bad"] == {"mended": 0, "spoilt": 1, "other": 0, "right": 1}


def population(sizes: dict[tuple[str, str], int]) -> list[dict]:
    """Returns examples in the order of their (became, class), as in a file that is sorted by class."""
    pairs = [pair for pair, size in sizes.items() for _ in range(size)]
    return [{"index": at, "became": became, "class": label} for at, (became, label) in enumerate(pairs)]


def test_the_sample_is_in_proportion_to_sorts_and_classes():
    sizes = {("mended", "good"): 300, ("mended", "bad"): 100, ("spoilt", "good"): 50, ("spoilt", "bad"): 50,
             ("other", "bad"): 100, ("right", "bad"): 400}  # fmt: skip
    found = Counter((one["became"], one["class"]) for one in sample_of(population(sizes)))
    assert found == {("mended", "good"): 12, ("mended", "bad"): 4, ("spoilt", "good"): 2, ("spoilt", "bad"): 2,
                     ("other", "bad"): 4}  # fmt: skip


def test_the_sample_is_drawn_from_the_whole_file_and_the_same_every_time():
    many = population({("mended", "good"): 1000})
    sample = sample_of(many)
    indices = [one["index"] for one in sample]
    assert len(set(indices)) == NUM_SHOWN
    assert max(indices) > 800
    assert 0 < min(indices) < 200
    assert sample_of(many) == sample
    assert sample_of(many, seed=1) != sample


@pytest.mark.parametrize(("rare", "shown"), [(0, 0), (2, 2), (5, LEAST_SHOWN)])
def test_a_rare_sort_is_shown_too(rare, shown):
    sample = sample_of(population({("mended", "good"): 1000, ("spoilt", "bad"): rare}))
    assert sum(one["became"] == "spoilt" for one in sample) == shown
    assert len(sample) == NUM_SHOWN


def test_what_stays_wrong_in_the_same_way_is_shown_but_did_not_change():
    found = changed(splits({"text": ["a"], "label": [1]}), [0], [0])
    assert found["num_changed"] == {"mended": 0, "spoilt": 0, "other": 0}
    assert [one["became"] for one in found["examples"]] == ["other"]


def test_of_many_classes_the_most_frequent_are_counted():
    names = tuple(f"class {i}" for i in range(1000))
    labels = [*range(1000), *[7] * 50]
    found = changed(splits({"text": ["a"] * 1050, "label": labels}, names), [0] * 1050, labels)
    assert len(found["by_class"]) == MAX_CLASSES
    assert found["by_class"]["class 7"] == {"mended": 51, "spoilt": 0, "other": 0, "right": 0}


def test_only_some_of_many_are_shown_and_long_texts_lose_their_middle():
    number = 5 * KEPT_PREDICTIONS
    made = splits({"text": ["begin " + "x" * 5000 + " end"] * number, "label": [1] * number})
    before, after = kept_predictions([0] * number), kept_predictions([1] * number)
    found = changed(made, before, after)
    assert found["num_compared"] == found["num_changed"]["mended"] == KEPT_PREDICTIONS
    assert len(found["examples"]) == NUM_SHOWN
    text = found["examples"][0]["text"]
    assert len(text) <= MAX_TEXT
    assert text.startswith("begin")
    assert text.endswith("end")


def test_of_a_long_file_that_is_sorted_by_class_every_class_is_compared():
    labels = [0] * 2 * KEPT_PREDICTIONS + [1] * 2 * KEPT_PREDICTIONS
    texts = [f"{label} {at}" for at, label in enumerate(labels)]
    found = changed(
        splits({"text": texts, "label": labels}),
        kept_predictions([1 - label for label in labels]),
        kept_predictions(labels),
    )
    assert found["counts"]["mended"] == KEPT_PREDICTIONS
    assert all(sum(counts.values()) > 0.45 * KEPT_PREDICTIONS for counts in found["by_class"].values())
    assert all(one["text"] == texts[one["index"]] for one in found["examples"])


def test_sets_of_classes_are_named():
    made = splits({"text": ["a"], "label": [[1.0, 0.0]]}, ("warm", "loud"), "classes")
    (example,) = changed(made, [[0, 0]], [[1, 0]])["examples"]
    assert (example["truth"], example["before"], example["after"]) == ("warm", "none", "warm")


def test_numbers_come_closer_or_move_away():
    made = splits({"text": ["a", "b", "c"], "label": [1.0, 2.0, 3.0]}, (), "number")
    found = changed(made, [0.5, 0.0, 3.0], [0.75, 1.9, 2.0])
    became = {e["text"]: e["became"] for e in found["examples"]}
    assert became == {"a": "mended", "b": "mended", "c": "spoilt"}
    assert found["by_class"] == {}


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
