from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.splits import load_splits


def test_a_folder_of_files_is_a_data_set(in_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = in_tmp / "films"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\n" + "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(40)))
    (folder / "test.csv").write_text("text,label\nanother,a\none more,b\n")
    made = load_splits(DataConfig(name="films"), "sequence-classification")
    assert (len(made.train), len(made.validation), made.test["text"][:]) == (36, 4, ["another", "one more"])
    assert [path.name for path in in_tmp.iterdir()] == ["films"]
    assert "Generating" not in capfd.readouterr().err


def test_a_folder_saved_by_datasets_keeps_its_class_names(in_tmp: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = {"text": [f"text {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    withheld = {"text": ["hidden", "too"], "label": [-1, -1]}
    made = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows, features=features),
        test=datasets.Dataset.from_dict(withheld, features=features),
    )
    made.save_to_disk("saved")
    split = load_splits(DataConfig(name="saved"), "sequence-classification")
    assert split.labels == ("z", "a")
    assert len(split.test) == 6
    assert "saved (test) has no labels and is not used" in split.description
    made["train"].save_to_disk("one")
    assert load_splits(DataConfig(name="one"), "sequence-classification").labels == ("z", "a")


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\n(try again)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=r"data\.name=a/b is not one of .*: \S+ does not answer; check the network.*FILE$"
    ):
        load_splits(DataConfig(name="a/b"), "causal-lm")


def test_a_subset_of_a_hub_data_set_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(*arguments: object) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(20)]}),
            dev=datasets.Dataset.from_dict({"text": ["held out"]}),
        )

    monkeypatch.setattr(datasets, "load_dataset", answer)
    made = load_splits(DataConfig(name="owner/many:one"), "causal-lm")
    assert asked == [("owner/many", "one")]
    assert made.validation["text"][:] == ["held out"]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:9/a.csv", "[{split: train, path: ['hf://datasets/a/b/a.csv']}]", "../a.csv", "/a.csv"]
)
def test_a_data_folder_whose_card_places_data_elsewhere_is_refused_without_a_request(
    tmp_path, monkeypatch, place, is_streamed
) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append(args))
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\nAbout\n")
    config = DataConfig(name=str(tmp_path), streaming=is_streamed, num_train=1, num_validation=1, num_test=1)
    with pytest.raises(UserError, match="places data outside its folder") as caught:
        load_splits(config, "sequence-classification")
    assert "\n" not in str(caught.value)
    assert not asked


def test_a_data_folder_with_a_card_of_its_own_files_is_read(tmp_path) -> None:
    rows = "".join(f"film {n},{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "part.csv").write_text("text,label\n" + rows)
    head = "license: mit\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: 'part*.csv'}"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n[about](https://example.org)\n")
    splits = load_splits(DataConfig(name=str(tmp_path)), "sequence-classification")
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 40


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "No data: give data.train=FILE or data.name, for example data.name=rotten-tomatoes"),
        ({"test": "t.csv"}, "data.test needs data.train too"),
        ({"name": "rotten_tomatos"}, "Unknown data.name=rotten_tomatos; did you mean `rotten-tomatoes`?"),
        ({"name": "reviews.jsonl"}, "data.name=reviews.jsonl is a file; give it as data.train=reviews.jsonl"),
        ({"name": "empty"}, "data.name=empty: this folder cannot be loaded as a data set"),
        ({"name": "broken"}, "data.name=broken: this folder cannot be loaded as a data set"),
        ({"name": "testonly"}, "data.name=testonly has no split `train` (has: test)"),
    ],
)
def test_an_invalid_source_is_refused_in_one_line(reviews: Path, config: dict, message: str) -> None:
    for folder in ("empty", "broken", "testonly"):
        (reviews.parent / folder).mkdir()
    (reviews.parent / "broken" / "train.csv").write_text("text,label\na,b\nc,d,e,f\n")
    (reviews.parent / "testonly" / "test.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError) as caught:
        load_splits(DataConfig(**config), "sequence-classification")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_test_file_may_stand_beside_named_data(in_tmp: Path) -> None:
    """Texts that it shares with the named training data are dropped there."""
    (in_tmp / "named").mkdir()
    rows = "".join(f"film {n},{'ab'[n % 2]}\n" for n in range(40))
    (in_tmp / "named" / "train.csv").write_text("text,label\n" + rows)
    (in_tmp / "mine.csv").write_text("text,label\nfilm 3,b\nplay 1,a\n")
    splits = load_splits(DataConfig(name="named", test="mine.csv"), "sequence-classification")
    assert splits.test["text"][:] == ["film 3", "play 1"]
    assert len(splits.train) + len(splits.validation) == 39
    for refused in ({"validation": "mine.csv"}, {"test": "mine.csv", "streaming": True}):
        with pytest.raises(ValueError, match=r"needs data\.train"):
            DataConfig(name="named", **refused)
