"""A tokenizer as GGUF has it: tokens and their types, merges, and the name of the rule that cuts text beforehand.

That name is found by the rule itself, as tokenizer.json writes it down, and the export's check compares llama.cpp's
tokens with the tokenizer's (`check.check_tokens`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.errors import UserError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)): "qwen2",
}
"""What cuts text before the merges -> llama.cpp's name (`tokenizer.ggml.pre`)."""


@dataclass(frozen=True)
class Vocabulary:
    model: str
    """gpt2: byte-level BPE. llama: BPE on characters with bytes to fall back on, as SentencePiece makes."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    adds: dict[str, bool]
    """bos, eos: whether the tokenizer puts it around a text."""
    ids: dict[str, int]
    """bos, eos, unk, pad -> id."""
    add_space: bool | None
    """llama: whether a text gets a space in front."""

    def write(self, writer: Any, folder: Path) -> None:
        """`folder` holds the tokenizer's files, of which the merges and the chat template are read."""
        import gguf

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.add_space is not None:
            writer.add_add_space_prefix(self.add_space)
        special = gguf.SpecialVocab(folder, load_merges=self.model == "gpt2")
        special.add_special_token = dict(self.adds)
        special.special_token_ids = dict(self.ids)
        special.add_to_gguf(writer, quiet=True)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """`size`: rows of the embedding; those without a token are unused ones. Raises UserError for a tokenizer of another
    kind."""
    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"--to gguf needs a tokenizer.json; {type(tokenizer).__name__} has none, take --to merged")
    rule = json.loads(backend.to_str())
    kind = rule["model"].get("type")
    if len(tokenizer) > size:
        raise UserError(f"The tokenizer has {len(tokenizer)} tokens, the model {size} rows for them; take its own")
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    byte_fallback = kind == "BPE" and bool(rule["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if number in special:
            types.append(TokenType.CONTROL if special[number] else TokenType.USER_DEFINED)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    ids = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    around: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    adds = {
        "bos": bool(around) and around[0] == ids.get("bos"),
        "eos": bool(around) and around[-1] == ids.get("eos") and len(around) > 1,
    }
    if byte_fallback:
        if "unk" in ids:
            types[ids["unk"]] = TokenType.UNKNOWN
        return Vocabulary(
            "llama", "default", tokens, types, _scores(rule, tokens), adds, ids, _adds_space(rule)
        )  # fmt: skip
    return Vocabulary("gpt2", _rule_name(rule, kind), tokens, types, None, adds, ids, None)


def _rule_name(rule: dict[str, Any], kind: str) -> str:
    """llama.cpp's name of what cuts text before the merges."""
    steps = rule.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    described = tuple(_described(step) for step in steps)
    name = _RULES.get(described) if kind == "BPE" else None
    ignores = bool(rule["model"].get("ignore_merges"))
    if name is None or ignores != (name == "llama-bpe"):
        known = ", ".join([*_RULES.values(), "SentencePiece's BPE"])
        what = " + ".join(str(step) for step, _ in described)
        raise UserError(
            f"--to gguf does not know this tokenizer ({kind}, {what}); it knows those of the kinds {known}; take "
            "--to merged"
        )
    return name


def _described(step: dict[str, Any]) -> tuple[str, Any]:
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "ByteLevel", step.get("use_regex", True)
        case "Digits":
            return "Digits", step.get("individual_digits")
        case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
            return "Split", step["pattern"].get("Regex")
    return str(step.get("type")), None


def _scores(rule: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece joins what has the highest score first: the order of the merges."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(rule["model"]["merges"]):
        order.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(order.get(token, len(order))) for token in tokens]


def _adds_space(rule: dict[str, Any]) -> bool:
    """Whether a space is put before a text, by a normalizer or by the pre-tokenizer."""
    text = json.dumps([rule.get("normalizer"), rule.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
