"""Tokenizers of base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line


def load_tokenizer(folder: Path, config: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; without a padding token it pads with its end-of-text token.

    Raises UserError when the folder has no tokenizer that works.
    """
    config = config or ModelConfig()
    # in token classification the words of a sentence come as a list; all but the first follow a space
    words: dict[str, Any] = {"add_prefix_space": True} if config.task == "token-classification" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **words)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer(["a", "b"] if words else "a b", is_split_into_words=bool(words))  # fail now rather than in the run
    except Exception as error:  # tokenizers and Transformers raise many types here
        raise UserError(
            f"{folder} has no usable tokenizer; put tokenizer.json and tokenizer_config.json there "
            f"({first_line(error).rstrip(':')})"
        ) from None
    tokenizer.padding_side = "right"
    return tokenizer
