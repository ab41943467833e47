"""General text: English technical prose that Python itself brings, the help on its topics, cut into windows."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from sgm_finetune.data.encoding import TOKEN_FEATURES, token_dataset
from sgm_finetune.data.token_lists import TokenLists
from sgm_finetune.data.tokens import single_ends

NUM_WINDOWS = 64
LONGEST = 256
"""Tokens of a window."""
_CHARACTERS = 8
"""Characters that are read for a token: no tokenizer takes as many on average. A window has _MORE of them, for rules
and tables."""
_MORE = 1000


def general_text() -> str:
    """The help on all topics, in the order of their names. It differs a little between versions of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def general_windows(tokenizer: Any, max_length: int) -> Dataset | None:
    """NUM_WINDOWS windows of LONGEST or `max_length` tokens, whichever is less, which begin at lines that lie evenly in
    the text. None where the tokenizer makes too few tokens of it."""
    text, width = general_text(), min(LONGEST, max_length)
    begins = [text.find("\n", number * len(text) // NUM_WINDOWS) + 1 for number in range(NUM_WINDOWS)]
    parts = [text[begin : begin + _CHARACTERS * width + _MORE] for begin in begins]
    windows = TokenLists()
    for ids in tokenizer(parts, verbose=False)["input_ids"]:
        window = single_ends(ids, tokenizer)[:width]
        if len(window) < width:
            return None
        windows.append(window)
    return token_dataset({"input_ids": windows}, windows, TOKEN_FEATURES)
