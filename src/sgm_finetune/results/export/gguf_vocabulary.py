"""A tokenizer as GGUF stores it: tokens and their types, merges, and the name of the pre-tokenizer.

SGM finds that name from the rule in tokenizer.json. The export's check then compares llama.cpp's tokens with the
tokenizer's (`gguf_check.check_tokens`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.stops import Stops, stopping_tokenizer

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
"""Pre-tokenizer steps, which split text before the merges -> llama.cpp's name (`tokenizer.ggml.pre`)."""


@dataclass(frozen=True)
class Vocabulary:
    tokenizer: PreTrainedTokenizerBase
    model: str
    """gpt2: byte-level BPE. llama: BPE on characters with bytes as a fallback, as SentencePiece trains it. bert:
    WordPiece."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    """gguf.TokenType of each token."""
    scores: list[float] | None
    adds: dict[str, bool]
    """For bos and eos: whether the tokenizer adds it to a text."""
    ids: dict[str, int]
    """Ids of bos, unk and pad, where the tokenizer has them; and of the tokens that end an answer (`_end_ids`)."""
    ends: list[int]
    """Ids of all tokens that end an answer."""
    add_space: bool | None
    """For llama: whether the tokenizer puts a space before a text."""
    normalizer: dict[str, bool] = field(default_factory=dict)
    """For bert: whether texts are lowercased, and lose their accents."""

    def write(self, writer: Any) -> None:
        """Adds everything to a gguf.GGUFWriter. The gguf package reads merges and chat template from saved files."""
        import gguf

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.add_space is not None:
            writer.add_add_space_prefix(self.add_space)
        for key, value in self.normalizer.items():
            writer.add_bool(f"tokenizer.ggml.normalizer.{key}", value)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            special = gguf.SpecialVocab(Path(folder), load_merges=self.model == "gpt2")
        special.add_special_token = dict(self.adds)
        special.special_token_ids = dict(self.ids)
        special.add_to_gguf(writer, quiet=True)
        if len(self.ends) > 1:
            writer.add_array("tokenizer.ggml.eos_token_ids", self.ends)  # Ollama's own readers stop at each


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, stops: Stops) -> Vocabulary:
    """Returns the vocabulary, filled up with unused tokens to `size`, the number of rows of the embedding.

    Raises UserError for a tokenizer that SGM cannot write as GGUF.
    """
    from gguf import TokenType

    rule = _rule(tokenizer, size)
    kind = rule["model"].get("type")
    byte_fallback = kind == "BPE" and bool(rule["model"].get("byte_fallback"))
    tokens, types = _tokens_and_types(tokenizer, size, byte_fallback)
    ids = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    sample: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    adds = {
        "bos": bool(sample) and sample[0] == ids.get("bos"),
        "eos": bool(sample) and sample[-1] == ids.get("eos") and len(sample) > 1,
    }
    ends = [number for number in stops.tokens if number < size]
    ids |= _end_ids(tokenizer, stops, ends, adds["eos"])
    if not byte_fallback:
        pre = _pre_tokenizer_name(rule, kind)
        return Vocabulary(tokenizer, "gpt2", pre, tokens, types, None, adds, ids, ends, None)
    if "unk" in ids:
        types[ids["unk"]] = TokenType.UNKNOWN
    scores = _merge_scores(rule, tokens)
    return Vocabulary(tokenizer, "llama", "default", tokens, types, scores, adds, ids, ends, _adds_space(rule))


def _rule(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """Returns what tokenizer.json says. Raises UserError where there is none, or more tokens than `size`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"--to gguf needs a tokenizer.json; {type(tokenizer).__name__} has none, take --to merged")
    if len(tokenizer) > size:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, and the model's embedding {size} rows; take the model's own "
            "tokenizer"
        )
    return json.loads(backend.to_str())


def read_word_pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Returns the vocabulary of a BERT, filled up as `read_vocabulary` does. llama.cpp marks the pieces that begin a
    word, and WordPiece those that go on.

    Raises UserError for a tokenizer of another kind.
    """
    from gguf import TokenType

    rule = _rule(tokenizer, size)
    kind = rule["model"].get("type")
    steps = tuple((rule.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer"))
    prefix = rule["model"].get("continuing_subword_prefix")
    if (kind, *steps, prefix) != ("WordPiece", "BertNormalizer", "BertPreTokenizer", "##"):
        raise UserError(
            f"--to gguf does not support this tokenizer ({kind}, {' + '.join(map(str, steps))}) with a bert; it "
            "supports WordPiece as in BERT; take --to merged"
        )
    tokens, types = _tokens_and_types(tokenizer, size, False)
    marked = [
        token if kind != TokenType.NORMAL else token[2:] if token.startswith(prefix) else f"▁{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    names = {"bos": "cls", "eos": "sep", "unk": "unk", "sep": "sep", "pad": "pad", "mask": "mask"}
    found = {key: getattr(tokenizer, f"{name}_token_id") for key, name in names.items()}
    lowercase = bool(rule["normalizer"].get("lowercase"))
    strips = rule["normalizer"].get("strip_accents")
    normalizer = {"lowercase": lowercase, "strip_accents": lowercase if strips is None else strips}
    ids = {key: number for key, number in found.items() if number is not None}
    return Vocabulary(
        tokenizer, "bert", "default", marked, types, None, {"bos": True, "eos": True}, ids, [], None, normalizer
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase, stops: Stops, ends: Sequence[int], adds_eos: bool) -> dict[str, int]:
    """Returns the ids under eos, eot (end of turn) and eom (end of message): llama.cpp stops at each of the three.

    The end of a sequence is the token that ends the answers that were learnt, except where the tokenizer puts its own
    behind every text or the chat template writes it.
    """
    known = tokenizer if adds_eos else stopping_tokenizer(tokenizer, stops)
    first: list[Any] = [] if known.eos_token_id is None else [known.eos_token_id]
    names: tuple[str, ...] = ("eos", "eot", "eom")
    return dict(zip(names, dict.fromkeys([*first, *ends]), strict=False))


def _tokens_and_types(
    tokenizer: PreTrainedTokenizerBase, size: int, byte_fallback: bool
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    is_special = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if number in is_special:
            types.append(TokenType.CONTROL if is_special[number] else TokenType.USER_DEFINED)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _pre_tokenizer_name(rule: dict[str, Any], kind: str) -> str:
    """Returns llama.cpp's name for the pre-tokenizer. Raises UserError when it has none that SGM knows."""
    steps = rule.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    identified = tuple(_identify_step(step) for step in steps)
    name = _RULES.get(identified) if kind == "BPE" else None
    ignores = bool(rule["model"].get("ignore_merges"))
    if name is None or ignores != (name == "llama-bpe"):
        known = ", ".join([*_RULES.values(), "SentencePiece's BPE"])
        what = " + ".join(str(step) for step, _ in identified)
        raise UserError(
            f"--to gguf does not support this tokenizer ({kind}, {what}); it supports {known}; take --to merged"
        )
    return name


def _identify_step(step: dict[str, Any]) -> tuple[str, Any]:
    """Returns a pre-tokenizer step as `_RULES` lists it."""
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "ByteLevel", step.get("use_regex", True)
        case "Digits":
            return "Digits", step.get("individual_digits")
        case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
            return "Split", step["pattern"].get("Regex")
    return str(step.get("type")), None


def _merge_scores(rule: dict[str, Any], tokens: list[str]) -> list[float]:
    """Returns minus the rank of each token's merge: SentencePiece merges the highest score first."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(rule["model"]["merges"]):
        order.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(order.get(token, len(order))) for token in tokens]


def _adds_space(rule: dict[str, Any]) -> bool:
    """Returns whether the normalizer or the pre-tokenizer puts a space before a text."""
    text = json.dumps([rule.get("normalizer"), rule.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
