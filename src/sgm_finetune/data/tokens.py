"""Token ids of a text: those that are learnt, and special tokens that stand there twice."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from sgm_finetune.base.text import num_common
from sgm_finetune.data.arrow import column_parts
from sgm_finetune.data.chat import Span


def learnt_tokens(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and for each whether it has a character of the spans, which follow one another.

    A tokenizer without tokenizer.json does not say which characters a token has. There, a span has the tokens between
    those that the text before it and the text up to its end have in common with the whole text.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
        begins.append(len(text) + 1)
        nearest = ((bisect.bisect_right(ends, left), right) for left, right in encoded["offset_mapping"])
        return encoded["input_ids"], [begins[at] < right for at, right in nearest]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    learnt = [False] * len(ids)
    for span in spans:
        begin, end = (
            num_common(tokenizer(text[:at], add_special_tokens=False, verbose=False)["input_ids"], ids) for at in span
        )
        learnt[begin:end] = [True] * (end - begin)
    return ids, learnt


def single_ends(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with one special token at its beginning and one at its end, where it has several of the same."""
    if len(ids) < 2 or (ids[0] != ids[1] and ids[-1] != ids[-2]):  # a tokenizer takes microseconds to name a token
        return ids
    begins, ends = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
    first, last = 0, len(ids)
    while last - first > 1 and ids[first] == ids[first + 1] and ids[first] in begins:
        first += 1
    while last - first > 1 and ids[last - 1] == ids[last - 2] and ids[last - 1] in ends:
        last -= 1
    return ids[first:last]


def doubled_tokens(encoded: datasets.Dataset, tokenizer: Any) -> dict[str, int]:
    """Special token -> the number of sequences of an encoded data set in which it stands twice in a row."""
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    special = {tokenizer.convert_tokens_to_ids(name): name for name in names if name}
    found: dict[str, int] = {}
    for lists in column_parts(encoded, "input_ids"):
        ids, lengths = lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy()
        rows = np.repeat(np.arange(len(lengths)), lengths)
        twice = (ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])
        for token, name in special.items():
            count = len(np.unique(rows[1:][twice & (ids[1:] == token)]))
            if count:
                found[name] = found.get(name, 0) + count
    return found
