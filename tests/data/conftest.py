"""Small sources and a word-level tokenizer for the data tests."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word. `causal`: no added or padding token. `encoder`: adds [CLS] and [SEP]."""
    special = ["<unk>", "<eos>", "[CLS]", "[SEP]", "[PAD]"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special + WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "causal":
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


@pytest.fixture
def causal_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer("causal")


@pytest.fixture
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer("encoder")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reviews(in_tmp: Path) -> Path:
    """100 reviews, a fifth of them good."""
    rows = [{"text": f"Review number {i}", "label": "good" if i % 5 == 0 else "bad"} for i in range(100)]
    path = in_tmp / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def r_library(tmp_path: Path) -> Path:
    """An R library with the package janeaustenr: six novels of 60 paragraphs in a lazy-load database."""
    rdata = pytest.importorskip("rdata")
    folder = tmp_path / "R" / "janeaustenr" / "data"
    folder.mkdir(parents=True)

    def serialised(value: object) -> bytes:
        rdata.write_rds(tmp_path / "object.rds", value, compression=None)
        return (tmp_path / "object.rds").read_bytes()

    content, places = b"", {}
    for name in ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"):
        lines = [line for n in range(60) for line in (f"In {name}, paragraph {n},", "it was “agreed”.", "")]
        data = serialised(np.array(lines))
        packed = struct.pack(">I", len(data)) + zlib.compress(data)
        places[name] = np.array([len(content), len(packed)], dtype=np.int32)
        content += packed
    (folder / "Rdata.rdb").write_bytes(content)
    index = {"variables": places, "references": {}, "compressed": True}
    (folder / "Rdata.rdx").write_bytes(zlib.compress(serialised(index)))
    return tmp_path / "R"
