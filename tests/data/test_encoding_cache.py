from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.data import encoding_cache
from sgm_finetune.data.encoding import COUNTS, Encoded, encode, fingerprint, pack
from sgm_finetune.data.encoding_cache import content_key, encode_or_recall
from sgm_finetune.data.splits import DataSplits, load_splits

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def cached(in_tmp, monkeypatch):
    """A cache of its own, for splits of any size."""
    monkeypatch.setenv("SGM_CACHE", str(in_tmp / "cache"))
    monkeypatch.setattr(encoding_cache, "FEWEST", 1)
    return in_tmp / "cache" / "encoded"


@pytest.fixture
def chats(in_tmp) -> DataSplits:
    rows = [
        [{"role": "user", "content": f"w{i % 60} w1"}, {"role": "assistant", "content": f"w{i % 7} " * (1 + i % 5)}]
        for i in range(60)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return load_splits(DataConfig(train="chats.jsonl"), "causal-lm")


@pytest.fixture
def tokenizer(causal_tokenizer):
    causal_tokenizer.chat_template = TEMPLATE
    return causal_tokenizer


def equal(left: Encoded, right: Encoded) -> bool:
    counts = [[getattr(one, name) for name in COUNTS] for one in (left, right)]
    return left.dataset.to_dict() == right.dataset.to_dict() and (
        left.dataset.features == right.dataset.features and counts[0] == counts[1]
    )


@pytest.mark.parametrize("packs", [False, True])
def test_what_is_recalled_is_what_was_encoded(cached, chats, tokenizer, monkeypatch, packs):
    first = encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, packs)
    encoded = encode(chats.train, tokenizer, "causal-lm", 32)
    assert equal(first, pack(encoded, 32) if packs else encoded)
    assert not first.is_recalled

    monkeypatch.setattr(encoding_cache, "encode_in_parts", None)
    again = encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, packs)
    assert equal(again, first)
    assert fingerprint(again.dataset) == fingerprint(first.dataset)
    assert again.is_recalled


def test_whatever_changes_the_tokens_changes_the_key(chats, tokenizer):
    keys = [content_key(chats.train, tokenizer, "causal-lm", 32, False)]
    tokenizer("w1 w2", truncation=True, max_length=1)
    assert content_key(chats.train, tokenizer, "causal-lm", 32, False) == keys[0], "how a call truncates is no part"
    keys.append(content_key(chats.train, tokenizer, "causal-lm", 33, False))
    keys.append(content_key(chats.train, tokenizer, "causal-lm", 32, True))
    keys.append(content_key(chats.test, tokenizer, "causal-lm", 32, False))
    keys.append(content_key(chats.train.select(range(44)), tokenizer, "causal-lm", 32, False))
    tokenizer.chat_template = TEMPLATE.replace(": ", "> ")
    keys.append(content_key(chats.train, tokenizer, "causal-lm", 32, False))
    tokenizer.add_tokens(["w1 w2"])
    keys.append(content_key(chats.train, tokenizer, "causal-lm", 32, False))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", [b"", b"ARROW1", None])
def test_a_damaged_file_of_the_cache_is_encoded_anew(cached, chats, tokenizer, damage):
    first = encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, False)
    (file,) = cached.glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(damage if damage is not None else whole[: len(whole) // 2])
    again = encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, False)
    assert equal(again, first)
    assert not again.is_recalled
    assert file.read_bytes() == whole


def test_the_cache_keeps_what_was_used_last_and_needs_no_place(cached, chats, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding_cache, "KEPT", 2)
    for length in (30, 31, 32):
        encode_or_recall(chats.train, tokenizer, "causal-lm", length, None, False)
    assert len(list(cached.iterdir())) == 2
    assert encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, False).is_recalled
    monkeypatch.setenv("SGM_CACHE", "/dev/null/nowhere")
    assert not encode_or_recall(chats.train, tokenizer, "causal-lm", 32, None, False).is_recalled
