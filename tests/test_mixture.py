"""data.mixture: a whole run on two sources, its tests of each, and its repetition."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import BAD, GOOD, OTHER
from safetensors.torch import load_file

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError


@pytest.fixture
def two(settings, reviews, tmp_path) -> list[str]:
    """A run on two sources with a share each: the second is small and has a test file."""
    chance = random.Random(7)
    for name, number in (("more.csv", 60), ("held.csv", 20)):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["review", "stars"])
            for i in range(number):
                words = chance.choices(GOOD if i % 2 else BAD, k=4) + chance.choices(OTHER, k=12)
                writer.writerow([" ".join(words), "good" if i % 2 else "bad"])
    entries = [
        {"train": str(reviews), "weight": 0.6},
        {
            "train": str(tmp_path / "more.csv"), "test": str(tmp_path / "held.csv"), "weight": 0.4,
            "columns": {"text": "review", "label": "stars"},
        },
    ]  # fmt: skip
    kept = [setting for setting in settings if not setting.startswith("data.train=")]
    return [*kept, f"data.mixture={json.dumps(entries)}", "training.max_steps=24", "training.eval_steps=8"]


@pytest.mark.slow
def test_a_mixture_trains_tests_each_source_and_resumes_bit_for_bit(two, reviews, tmp_path, command):
    whole = command("finetune", two)
    first, second = reviews.name, "more.csv"
    shares = [(share["name"], share["examples"], share["per_epoch"]) for share in whole["mixture"]]
    assert shares == [(first, 180, 144), (second, 54, 96)]
    assert f"{second}: 96 training examples an epoch (40.0 %): its 54 come 1.78 times on average" in command.said
    for when in ("before", "after"):
        of = whole[when]["sources"]
        assert {name: numbers["num_examples"] for name, numbers in of.items()} == {first: 36, second: 20}
        both = (36 * of[first]["accuracy"] + 20 * of[second]["accuracy"]) / 56
        assert whole[when]["accuracy"] == pytest.approx(both)
    assert whole["after"]["accuracy"] > 0.9
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The sources of the data, before → after" in page
    assert f'<th scope="row">{second}</th><td>54</td><td>96</td><td>40.0 %</td><td>20</td>' in page

    again = command("evaluate", [f"output.dir={tmp_path / 'out'}"])
    assert again["sources"] == whole["after"]["sources"]

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    (other / "sgm_finetuned.pth").unlink()
    shutil.rmtree(other / "checkpoints" / "checkpoint-24", ignore_errors=True)
    resumed = [*two, f"output.dir={other}", "training.resume=true"]
    assert command("finetune", resumed)["after"] == whole["after"]
    name = "adapter/adapter_model.safetensors"
    left, right = load_file(tmp_path / "out" / name), load_file(other / name)
    assert all((left[key] == right[key]).all() for key in left)


def test_a_mixture_is_shown_source_by_source_and_predicted(two, tmp_path, command):
    shown = command("data", two, "--examples", "2")
    assert [example["source"] for example in shown["examples"]] == ["reviews.csv"] * 2 + ["more.csv"] * 2
    assert [share["part"] for share in shown["mixture"]] == [0.6, 0.4]
    assert command("estimate", two)["steps"] == 24


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[]", "data.mixture is empty; give it entries"),
        ("a.csv", "`data.mixture` is 'a.csv'; write a list of entries, such as"),
        ("[a.csv]", "data.mixture, entry 1 is 'a.csv'; write {train: chats.jsonl"),
        ("[{weight: 1}]", "data.mixture, entry 1: give each entry either train, a file, or name"),
        ("[{train: a, weight: 1}, {train: b, weight: 0}]", "entry 2: `weight` is '0'; input should be greater than 0"),
        ("[{train: a, weight: -1}]", "data.mixture, entry 1: `weight` is '-1'; input should be greater than 0"),
        ("[{train: a, wieght: 1}]", "data.mixture, entry 1: unknown key `wieght`; did you mean `weight`?"),
        ("[{train: a, weight: 1}, {train: b}]", "entry 2 has no weight and others have one"),
        (
            "[{name: imdb, validation: a.csv}]",
            "data.mixture, entry 1: validation needs train; it cannot be used with name",
        ),
    ],
)
def test_a_wrong_mixture_is_one_line(given, words):
    with pytest.raises(UserError) as caught:
        load_config(None, [f"data.mixture={given}"])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("data.train=b.csv", "give data.train or data.mixture, not both"),
        ("data.columns={text: a}", "data.columns does not go with data.mixture; write it into the entries"),
        ("data.streaming=true", "data.streaming=true does not go with data.mixture; set it to false"),
    ],
)
def test_a_mixture_stands_alone(other, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        load_config(None, ["data.mixture=[{train: a.csv}]", other])


def test_a_mixture_of_a_file_gives_way_to_another_source(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  mixture:\n    - {train: a.csv, test: null}\n    - {train: b.csv}\n")
    said: list[str] = []
    assert load_config(path, ["data.train=c.csv"], said.append).data.mixture is None
    assert said == [f"data.train=c.csv replaces data.mixture of {path}"]


def test_paths_of_a_mixture_are_found_from_the_moved_folder(tmp_path):
    from sgm_finetune.results.paths import found_from, with_absolute_paths

    (tmp_path / "a.csv").touch()
    entries = [{"train": str(tmp_path / "a.csv")}, {"name": "imdb"}]
    stored = load_config(None, [f"data.mixture={json.dumps(entries)}", f"output.dir={tmp_path / 'out'}"])
    values = with_absolute_paths(stored).model_dump(mode="json")
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    Path(tmp_path).rename(moved)
    found = found_from(values, moved / "out")["data"]["mixture"]
    assert [one["train"] or one["name"] for one in found] == [str(moved / "a.csv"), "imdb"]
    moved.rename(tmp_path)
