"""What a finished run answers: `sgm generate`, and turn by turn `sgm chat`; beside it, the base model's own answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer, set_seed

from sgm_finetune.config import Config, Role, Task
from sgm_finetune.data import columns
from sgm_finetune.data.encoding import asked_text, written_answers
from sgm_finetune.data.tables import one_line, read_file
from sgm_finetune.errors import UserError
from sgm_finetune.generation import continue_prompts
from sgm_finetune.models import num_positions
from sgm_finetune.pipeline import Result, load_result, trained_config
from sgm_finetune.voice import Voice

When = Literal["before", "after"]
Message = dict[str, str]
Prompt = str | tuple[str, str] | list[Message] | list[str]
"""A text; two texts; a conversation; or the words of a sentence."""

WIDE = 100
"""Columns of a terminal from which two answers stand beside each other."""
ROLES: dict[Task, tuple[Role, ...]] = {
    "causal-lm": ("messages", "prompt", "instruction", "text"),
    "seq2seq-lm": ("source", "text"),
    "sequence-classification": ("text",),
    "token-classification": ("tokens", "text"),
}
"""Columns of a file of prompts, those looked for first before the others."""


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


def generate(
    config: Config,
    overrides: Sequence[str],
    texts: Sequence[str],
    file: Path | None,
    console: Console,
    sampling: Sampling,
    compare: bool = False,
    raw: bool = False,
) -> list[dict[str, Any]]:
    """The answers of the result in output.dir to `texts` and to the rows of `file`; printed, and returned as rows
    {prompt, answer, (scores), (before)}. `raw`: without chat template. Raises UserError before the model is loaded for
    what can be known then."""
    voice = Voice(console)
    asked = trained_config(config, overrides)
    prompts: list[Prompt] = [*texts, *(read_prompts(file, asked) if file is not None else ())]
    if not prompts:
        raise UserError("There is nothing to answer; give --prompt TEXT or --input FILE")
    result = load_result(config, overrides, voice)
    if len(prompts) == 1 and not compare and console.is_terminal and _writes(result.config.model.task):
        return [{"prompt": prompts[0], **_streamed(result, prompts[0], sampling, raw, console)}]
    answers: dict[When, list[dict[str, Any]]] = {}
    for when in _WHENS if compare else _WHENS[1:]:
        with voice.bar(when) as progress:
            answers[when] = answer(result, prompts, sampling, when, raw, progress)
    rows = []
    for at, (prompt, found) in enumerate(zip(prompts, answers["after"], strict=True)):
        rows.append({"prompt": prompt, **found, **({"before": answers["before"][at]} if compare else {})})
        _print_row(console, rows[-1], len(prompts) > 1)
    return rows


_WHENS: tuple[When, ...] = ("before", "after")


def _streamed(result: Result, prompt: Prompt, sampling: Sampling, raw: bool, console: Console) -> dict[str, Any]:
    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    (found,) = answer(result, [prompt], sampling, raw=raw, show=show)
    console.print()
    return found


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


def read_prompts(path: Path, config: Config) -> list[Prompt]:
    """Prompts of a file ("-": of standard input): the lines of a text, else rows (CSV, JSON lines, Parquet ...) by the
    columns that the run was trained on, or their roles' own names. Of a conversation that ends with an answer, that
    answer is left out."""
    if str(path) == "-" or path.suffix == ".txt":
        text = sys.stdin.read() if str(path) == "-" else _read_text(path)
        return [line for line in text.splitlines() if line.strip()]
    table = read_file(path, "--input")
    task, chosen = config.model.task, config.data.columns
    looked = {role: chosen.get(role, role) for role in ROLES[task]}
    role = next((role for role, name in looked.items() if name in table.columns), None)
    if role is None:
        raise UserError(
            f"{table.name} has none of the columns {', '.join(looked.values())}; it has {', '.join(table.columns)}"
        )
    name = looked[role]
    if role == "messages":
        return [_question(turns) for turns in columns.read_conversations(table, name, answered=False)]
    if role == "instruction":
        inputs = table.columns.get(chosen.get("input", "input"))
        texts = columns.read_texts(table, name, may_be_empty=False)
        given = [""] * len(texts) if inputs is None else columns.read_inputs(table, chosen.get("input", "input"))
        return [_question(turns) for turns in columns.instructions(texts, given, [""] * len(texts))]
    if role == "tokens":
        return [[str(word) for word in words] for words in table.columns[name]]
    texts = columns.read_texts(table, name, may_be_empty=False)
    pair = chosen.get("text_pair", "text_pair")
    if task == "sequence-classification" and pair in table.columns:
        return list(zip(texts, columns.read_texts(table, pair, may_be_empty=False), strict=True))
    return list(texts)


def _question(turns: list[Message]) -> list[Message]:
    """
    >>> _question([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    [{'role': 'user', 'content': '1 + 1?'}]
    """
    end = next((at + 1 for at in range(len(turns) - 1, -1, -1) if turns[at]["role"] != "assistant"), len(turns))
    return turns[:end]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path} cannot be read: {one_line(error)}") from None


def _counted(items: Sequence[Any], progress: Callable[..., None]) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, len(items))


def _print_row(console: Console, row: dict[str, Any], several: bool) -> None:
    if several:
        console.print(Rule(escape(_shortened(row["prompt"])), align="left"))
    if "before" not in row:
        console.print(_shown(row), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(side_by_side(console, _shown(row["before"]), _shown(row)))


def side_by_side(console: Console, before: str, after: str) -> RenderableType:
    """Two answers, beside each other on a wide terminal and below each other on a narrow one."""
    panels = [
        Panel(Text(text), title=title, title_align="left", expand=True)
        for title, text in (("before", before), ("after", after))
    ]
    if console.width < WIDE:
        return Group(*panels)
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table


def _shown(row: dict[str, Any]) -> str:
    """An answer as text: its class with the probabilities, words with tags other than O."""
    found = row["answer"]
    if "scores" in row:
        named = ", ".join(found) or "(none)" if isinstance(found, list) else found
        best = sorted(row["scores"].items(), key=lambda pair: -pair[1])[:5]
        return f"{named}  ({', '.join(f'{name} {score:.3f}' for name, score in best)})"
    if isinstance(found, list):
        return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in found)
    return f"{found:g}" if isinstance(found, float) else found


def _shortened(prompt: Prompt) -> str:
    """
    >>> _shortened([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}])
    '1 + 1?'
    """
    if isinstance(prompt, tuple):
        text = " · ".join(prompt)
    elif isinstance(prompt, list):
        text = prompt[-1]["content"] if isinstance(prompt[-1], dict) else " ".join(map(str, prompt))
    else:
        text = prompt
    line = " ".join(text.split())
    return line if len(line) <= 72 else line[:71] + "…"
