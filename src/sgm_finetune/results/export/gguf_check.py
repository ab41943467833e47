"""Checks GGUF files: llama.cpp computes logits, answers and losses from them, and splits texts into tokens."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sgm_finetune.base.device import device_for
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.template_trial import try_template
from sgm_finetune.results.export.check import (
    TEXTS,
    Computed,
    LogitCheck,
    ReferenceLogits,
    compare,
    computed_by,
    free_models,
    silent,
)
from sgm_finetune.results.export.llama_process import run_apart
from sgm_finetune.results.export.validation import Scores, Validation, score
from sgm_finetune.results.load import Result
from sgm_finetune.train.losses import Progress

_TOKENS = (
    "It's 1,234.5 km",
    "  two  spaces\n\n\tand a tab",
    "Où est l'œuvre? 東京 🙂",
    "def f(x):\n    return x**2",
    "HTTP2023",
)
"""Texts on which tokenizers are compared, besides `TEXTS`."""


def check_gguf(
    result: Result, file: Path, stored_in: str, expected: ReferenceLogits, progress: Progress = silent
) -> LogitCheck:
    """Checks a GGUF file, which llama.cpp loads, or Transformers where llama-cpp-python is not installed.

    llama.cpp must also split texts into the tokens that the tokenizer does; else this raises UserError.
    """
    if importlib.util.find_spec("llama_cpp") is not None:
        return compare(result, _ask_llama_cpp(result, file, expected), expected, stored_in)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, device_map={"": device_for()}
    )
    # Transformers reads the first of the file's ends alone, and llama.cpp all of them
    held = GenerationConfig(eos_token_id=_ends_in(file), pad_token_id=result.tokenizer.pad_token_id)
    found = computed_by(model, expected, "Transformers", held, progress)
    del model
    free_models()
    return compare(result, found, expected, stored_in)


def _ends_in(file: Path) -> list[int]:
    """The ids of the tokens at which llama.cpp stops, as the GGUF file names them."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = (reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return [int(field.contents()) for field in fields if field is not None]


def check_gguf_adapter(result: Result, base: Path, file: Path, stored_in: str, expected: ReferenceLogits) -> LogitCheck:
    """Checks a LoRA adapter's GGUF file, which llama.cpp loads over the base's file."""
    return compare(result, _ask_llama_cpp(result, base, expected, file), expected, stored_in)


def _ask_llama_cpp(result: Result, file: Path, expected: ReferenceLogits, adapter: Path | None = None) -> Computed:
    """Runs llama.cpp in a process of its own, compares its tokens with the tokenizer's; returns what it computes."""
    chat = chat_text(result)
    texts = [*TEXTS, *_TOKENS, *([chat] if chat else [])]
    asked: dict[str, Any] = {
        "model": str(file), "ids": expected.ids.tolist(), "texts": texts, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if adapter is not None:
        asked["adapter"] = str(adapter)
    if expected.own is not None:
        asked |= {"prompts": expected.own.prompts, "max_new_tokens": expected.own.limit}
    is_classifier = result.config.model.task == "sequence-classification"
    if is_classifier:
        asked["classes"] = expected.trained.shape[-1]
    if expected.validation is not None:
        asked["scored"] = _sequences(expected.validation)
    with tempfile.TemporaryDirectory() as folder:
        request, results = Path(folder) / "request.json", Path(folder) / "results.npz"
        request.write_text(json.dumps(asked), encoding="utf-8")
        program = str(Path(__file__).with_name("ask_llama_cpp.py"))
        if (reason := run_apart(program, str(request), str(results))) is not None:
            raise UserError(f"llama.cpp failed on the GGUF file: {reason}; nothing was kept. Take --to merged")
        with np.load(results) as found:
            for number, text in enumerate(texts):
                check_tokens(result, text, [found[f"{number}.0"].tolist(), found[f"{number}.1"].tolist()])
            own, scores = expected.own, None
            if expected.validation is not None and is_classifier:
                scores = _class_scores(expected.validation, torch.from_numpy(found["scored"]))
            elif expected.validation is not None:
                scores = Scores(found["losses"], found["counts"])
            return Computed(
                torch.from_numpy(found["logits"]),
                None if own is None else [found[f"answer.{n}"].tolist() for n in range(len(own.prompts))],
                scores,
                "llama.cpp",
            )


class _Answered(nn.Module):
    """A classifier that has answered: it returns the logits of the examples in their order."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.rest = iter(logits)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        return SimpleNamespace(logits=torch.stack([next(self.rest) for _ in input_ids]).to(input_ids.device))


def _class_scores(validation: Validation, logits: Tensor) -> Scores:
    return score(_Answered(logits), validation)  # type: ignore[arg-type]


def _sequences(validation: Validation) -> list[list[list[int]]]:
    """The tokens of each example, and the labels of a language model's."""
    encoded = validation.examples.encoded
    labels = ([] if np.ndim(label) == 0 else list(label) for label in encoded["labels"][:])
    return [[list(ids), label] for ids, label in zip(encoded["input_ids"][:], labels, strict=True)]


def check_tokens(result: Result, text: str, found: Sequence[list[int]]) -> None:
    """Raises UserError unless llama.cpp splits the text into the same tokens as the tokenizer does.

    `found` holds llama.cpp's tokens without and with special tokens around the text, in this order.
    """
    for add_special, tokens in zip((False, True), found, strict=True):
        expected = list(result.tokenizer(text, add_special_tokens=add_special)["input_ids"])  # type: ignore[arg-type]
        if tokens != expected:
            raise UserError(
                f"llama.cpp splits {text!r} into the tokens {tokens[:8]}, and the tokenizer into {expected[:8]}, so "
                "SGM cannot write this tokenizer as GGUF; take --to merged"
            )


def chat_text(result: Result) -> str | None:
    """Returns a conversation as the tokenizer's chat template writes it; None if there is no template."""
    if not result.tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Where is 東京?"}, {"role": "assistant", "content": "In Japan."}]
    try_template(result.tokenizer)
    text = str(result.tokenizer.apply_chat_template(messages, tokenize=False))
    bos = str(result.tokenizer.bos_token or "")
    return text.removeprefix(bos) if _adds_bos(result) else text


def _adds_bos(result: Result) -> bool:
    ids: Sequence[int] = result.tokenizer("a")["input_ids"]  # type: ignore[assignment]
    return bool(ids) and ids[0] == result.tokenizer.bos_token_id
