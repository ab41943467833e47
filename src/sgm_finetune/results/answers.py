"""What a result answers: texts, classes with probabilities, tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from sgm_finetune.base.config import Config, LabelKind, Task
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.encoding import asked_text, written_answers
from sgm_finetune.model.architecture import check_model, num_positions
from sgm_finetune.model.folder import announce_own_code, local_folder
from sgm_finetune.model.tokenizer import load_tokenizer
from sgm_finetune.results.files import PTH
from sgm_finetune.results.generation import continue_prompts
from sgm_finetune.results.load import attach_adapter, load_pth, stored_config
from sgm_finetune.train.base_model import _load_base
from sgm_finetune.train.launch import apply_launcher

When = Literal["before", "after"]


Message = dict[str, str]


Prompt = str | tuple[str, str] | list[Message] | list[str]
"""A text; two texts; a conversation; or the words of a sentence."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Of the likeliest tokens that hold this much probability together."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of Transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def answer(
    result: Result,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    when: When = "after",
    raw: bool = False,
    progress: Callable[..., None] = lambda done, total: None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """For each prompt {"answer": text, class, classes, number, or [[word, tag], ...]}, and for classes {"scores"}.

    when "before": of the base model, its new head untrained. show: called with each piece of the text of an answer as
    it comes; then one prompt is answered after the other.
    """
    config, model, tokenizer = result.config, result.model, result.tokenizer
    task = config.model.task
    model.eval()
    with torch.no_grad(), nullcontext() if when == "after" else model.disable_adapter():
        if task == "sequence-classification":
            return [_classified(result, prompt) for prompt in _counted(prompts, progress)]
        if task == "token-classification":
            return [_tagged(result, prompt) for prompt in _counted(prompts, progress)]
        encoded = [prompt_ids(result, prompt, raw) for prompt in prompts]
        limit = _limit(result, encoded, sampling.max_new_tokens)
        options: dict[str, Any] = sampling.options()
        if show is not None:
            options["streamer"] = _Pieces(tokenizer, show)
        set_seed(sampling.seed)
        size = 1 if show is not None else config.training.eval_batch_size
        written = continue_prompts(
            model, encoded, tokenizer, task, answer_ends(result), limit, size, progress, **options
        )
        return [{"answer": text} for text in written]


def prompt_ids(result: Result, prompt: Prompt, raw: bool = False) -> list[int]:
    """The prompt as the model was trained to read it: chats by the template (a text is then one question), all else as
    it is."""
    tokenizer: Any = result.tokenizer
    conversation: Any = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not raw and (isinstance(prompt, list) or speaks(result)):
        return tokenizer(asked_text(conversation, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(prompt, verbose=False)["input_ids"]


def speaks(result: Result) -> bool:
    """Whether the model was trained on conversations (an older file does not say: whether it has a template)."""
    if result.config.model.task != "causal-lm":
        return False
    return "messages" in result.roles if result.roles else result.tokenizer.chat_template is not None


def answer_ends(result: Result) -> list[int]:
    """Tokens that end an answer: the end of the sequence, and of the assistant's turn where there is a template."""
    tokenizer: Any = result.tokenizer
    ends: set[int] = set()
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for text, spans in written_answers(asked, tokenizer):
            begin, end = spans[-1]
            ids = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
            ends |= {ids[-1]} & set(tokenizer.all_special_ids)  # type: ignore[index]
    return sorted(ends | {tokenizer.eos_token_id} - {None})  # type: ignore[arg-type]


def _limit(result: Result, encoded: Sequence[Sequence[int]], wanted: int) -> int:
    """New tokens that may be written: what is wanted, and no more than the model has positions for."""
    positions = num_positions(result.model.config)
    if positions is None or result.config.model.task == "seq2seq-lm":
        return wanted
    longest = max(map(len, encoded))
    if longest >= positions:
        raise UserError(
            f"The longest prompt has {longest:,} tokens, and the model has {positions:,} positions; shorten it (in a "
            "chat, /clear begins anew)"
        )
    return min(wanted, positions - longest)


class _Pieces(TextStreamer):
    """Hands each piece of an answer on as it comes."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def _classified(result: Result, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, list):
        raise UserError("model.task=sequence-classification takes texts, not conversations")
    pair = prompt if isinstance(prompt, tuple) else (prompt,)
    tokenizer: Any = result.tokenizer
    logits = _logits(result, tokenizer(*pair, **_cut(result)))[0]
    if result.label_kind == "number":
        return {"answer": float(logits[0])}
    several = result.label_kind == "classes"
    scores = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
    named = dict(zip(result.labels, scores, strict=True))
    chosen = [name for name, score in named.items() if score > 0.5] if several else max(named, key=named.__getitem__)
    return {"answer": chosen, "scores": named}


def _tagged(result: Result, prompt: Prompt) -> dict[str, Any]:
    words = prompt.split() if isinstance(prompt, str) else [str(word) for word in prompt]
    tokenizer: Any = result.tokenizer
    encoded = tokenizer(words, is_split_into_words=True, **_cut(result))
    tags = _logits(result, encoded)[0].argmax(-1).tolist()
    first: dict[int, str] = {}
    for at, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, result.labels[tags[at]])
    return {"answer": [[word, first.get(at, "?")] for at, word in enumerate(words)]}


def _cut(result: Result) -> dict[str, Any]:
    return {"truncation": True, "max_length": result.config.data.max_length, "return_tensors": "pt"}


def _logits(result: Result, encoded: Any) -> torch.Tensor:
    return result.model(**{name: x.to(result.model.device) for name, x in encoded.items()}).logits.float()


def _writes(task: Task) -> bool:
    return task in ("causal-lm", "seq2seq-lm")


def _counted(items: Sequence[Any], progress: Callable[..., None]) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, len(items))


def _read_result(config: Config, overrides: Sequence[str]) -> tuple[Path, dict[str, Any], Config]:
    """Where `config` has its sgm_finetuned.pth, what is in it, and the configuration there, changed by `overrides`."""
    path = Path(config.output.dir) / PTH
    content = load_pth(path)
    return path, content, apply_launcher(stored_config(content, path, config, overrides))


def trained_config(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration that the result in output.dir was trained with, changed by `overrides`."""
    return _read_result(config, overrides)[2]


@dataclass(frozen=True)
class Result:
    """What a run left, ready to be asked: the base model with its adapter, and what it was trained for."""

    config: Config
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    label_kind: LabelKind | None
    roles: tuple[str, ...]
    """Of the columns it was trained on (text, label, messages ...); () where an older file does not say."""


def load_result(config: Config, overrides: Sequence[str], log: StepLog) -> Result:
    """The result in output.dir, from its .pth file and the base model alone; no data is read."""
    path, content, config = _read_result(config, overrides)
    folder = local_folder(config.model.name, config.model.revision, lambda line: log.line("model", line))
    announce_own_code(config.model, folder, log)
    check_model(config.model, folder)
    tokenizer = load_tokenizer(folder, config.model)
    labels, kind = tuple(content["labels"]), content.get("label_kind")
    base, _ = _load_base(config, folder, tokenizer, labels, kind, log)
    model = attach_adapter(base, content, path)
    return Result(config, model, tokenizer, labels, kind, tuple(content.get("roles", ())))
