from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgm_finetune.data import collator, encode, encoding_summary
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.errors import UserError

EOS = 1


def texts(*lengths: int) -> list[str]:
    return [" ".join(f"w{n % 60}" for n in range(length)) for length in lengths]


def pairs(*rows: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})


def test_classification_is_truncated_to_max_length_and_keeps_its_closing_token(encoder_tokenizer) -> None:
    split = datasets.Dataset.from_dict({"text": texts(3, 40, 6), "label": [1, 0, 2]})
    encoded = encode(split, encoder_tokenizer, "sequence-classification", max_length=8)
    assert [len(ids) for ids in encoded.dataset["input_ids"]] == [5, 8, 8]
    assert all((ids[0], ids[-1]) == (2, 3) for ids in encoded.dataset["input_ids"])
    assert encoded.dataset["labels"][:] == [1, 0, 2]
    assert (encoded.num_truncated, encoded.num_dropped) == (1, 0)
    assert encoding_summary(encoded) == "3 sequences, 21 tokens, 1 examples cut, 0 dropped"


def test_a_classification_batch_is_padded_to_its_longest_sequence(encoder_tokenizer) -> None:
    split = datasets.Dataset.from_dict({"text": texts(1, 4), "label": [1, 0]})
    rows = list(encode(split, encoder_tokenizer, "sequence-classification", max_length=16).dataset)
    batch = collator(encoder_tokenizer, "sequence-classification")(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["input_ids"][0, 3:].tolist() == [encoder_tokenizer.pad_token_id] * 3
    assert batch["labels"].tolist() == [1, 0]
    wide = collator(encoder_tokenizer, "sequence-classification", pad_to_multiple_of=8)(rows)
    assert wide["input_ids"].shape == (2, 8)
    assert all(values.dtype == torch.long for values in wide.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8), max_length=st.integers(8, 40))
def test_packing_keeps_every_token_in_order(causal_tokenizer, lengths: list[int], max_length: int) -> None:
    split = datasets.Dataset.from_dict({"text": texts(*lengths)})
    blocks = encode(split, causal_tokenizer, "causal-lm", max_length).dataset["input_ids"][:]
    stream = [token for text in split["text"] for token in [*causal_tokenizer(text)["input_ids"], EOS]]
    if len(stream) % max_length == 1:
        stream.pop()
    assert [token for block in blocks for token in block] == stream
    assert all(len(block) == max_length for block in blocks[:-1])


def test_a_packed_batch_counts_every_token_and_no_padding(causal_tokenizer) -> None:
    encoded = encode(datasets.Dataset.from_dict({"text": texts(12)}), causal_tokenizer, "causal-lm", max_length=8)
    batch = collator(causal_tokenizer, "causal-lm")(list(encoded.dataset))
    assert batch["input_ids"][1, 5:].tolist() == [EOS] * 3  # no padding token: any will do
    assert batch["labels"].tolist()[0] == batch["input_ids"].tolist()[0]
    assert batch["labels"].tolist()[1] == [*batch["input_ids"].tolist()[1][:5], *[IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]


def test_only_the_completion_and_the_end_count_in_the_loss(causal_tokenizer) -> None:
    encoded = encode(pairs(("w1 w2 w3", " w4 w5")), causal_tokenizer, "causal-lm", max_length=16)
    ids = causal_tokenizer("w1 w2 w3 w4 w5")["input_ids"]
    assert encoded.dataset[0]["input_ids"] == [*ids, EOS]
    assert encoded.dataset[0]["labels"] == [*[IGNORED] * 3, *ids[3:], EOS]


def test_a_token_that_straddles_the_border_belongs_to_the_answer(causal_tokenizer) -> None:
    encoded = encode(pairs(("w1 w", "2 w3")), causal_tokenizer, "causal-lm", max_length=16)
    assert encoded.dataset[0]["input_ids"] == [*causal_tokenizer("w1 w2 w3")["input_ids"], EOS]
    assert [label == IGNORED for label in encoded.dataset[0]["labels"]] == [True, False, False, False]


def test_long_examples_lose_their_end_and_hopeless_ones_are_dropped(causal_tokenizer) -> None:
    prompt = texts(7)[0]
    split = pairs(("w1", " w2"), (prompt, " w8 w9 w10"), (prompt + " w7", " w8"), ("", "w1 w2"))
    encoded = encode(split, causal_tokenizer, "causal-lm", max_length=8)
    assert (len(encoded.dataset), encoded.num_truncated, encoded.num_dropped) == (3, 1, 1)
    whole = causal_tokenizer(prompt + " w8")["input_ids"]
    assert encoded.dataset[1]["input_ids"] == whole
    assert encoded.dataset[1]["labels"] == [*[IGNORED] * 7, whole[-1]]


def test_losing_every_answer_is_an_error(causal_tokenizer) -> None:
    split = pairs(*((prompt, " w1") for prompt in texts(8, 20, 34)))
    with pytest.raises(UserError) as caught:
        encode(split, causal_tokenizer, "causal-lm", max_length=8)
    assert str(caught.value) == (
        "100 % of 3 examples lose every answer token at data.max_length=8; the longest prompt has 34 tokens. "
        "Raise data.max_length"
    )


def test_special_tokens_of_the_tokenizer_are_kept_and_the_end_is_not_doubled(encoder_tokenizer) -> None:
    encoder_tokenizer.eos_token = "[SEP]"
    encoded = encode(pairs(("w1", " w2")), encoder_tokenizer, "causal-lm", max_length=16)
    assert encoded.dataset[0]["input_ids"] == encoder_tokenizer("w1 w2")["input_ids"]
    assert encoded.dataset[0]["labels"][:2] == [IGNORED] * 2
    packed = encode(datasets.Dataset.from_dict({"text": ["w1", "w2"]}), encoder_tokenizer, "causal-lm", max_length=16)
    assert packed.dataset["input_ids"][:] == [[2, 6, 3, 2, 7, 3]]


def test_language_modelling_needs_an_end_of_sequence_token_and_two_tokens(encoder_tokenizer, causal_tokenizer) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(datasets.Dataset.from_dict({"text": ["w1"]}), encoder_tokenizer, "causal-lm", max_length=8)
    with pytest.raises(UserError, match=r"1 text\(s\) make 1 token\(s\)"):
        encode(datasets.Dataset.from_dict({"text": [""]}), causal_tokenizer, "causal-lm", max_length=8)


def test_encoding_is_deterministic_and_leaves_no_files(causal_tokenizer, in_tmp: Path) -> None:
    split = datasets.Dataset.from_dict({"text": texts(30, 50)})
    first = encode(split, causal_tokenizer, "causal-lm", max_length=16)
    again = encode(split, causal_tokenizer, "causal-lm", max_length=16)
    assert first.dataset.to_dict() == again.dataset.to_dict()
    assert first.dataset.cache_files == []
    assert list(in_tmp.iterdir()) == []


def test_a_collator_can_be_sent_to_another_process(causal_tokenizer) -> None:
    collate = pickle.loads(pickle.dumps(collator(causal_tokenizer, "causal-lm")))
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}]
    assert collate(rows)["labels"].tolist() == [[5, 6]]
