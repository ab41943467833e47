"""`sgm generate`: the answers of a finished run to texts or to a file of prompts, and the base model's beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sgm_finetune.base.config import DECODER_TASKS, Config, Role, Task
from sgm_finetune.base.console import StepLog, print_line
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line
from sgm_finetune.commands.requests import NOTHING_TO_ANSWER, GenerateRequest
from sgm_finetune.data import columns
from sgm_finetune.data.conversations import is_json_list, read_messages, read_questions
from sgm_finetune.data.tables import read_file, type_of
from sgm_finetune.data.text_file import read_text
from sgm_finetune.results.answers import Prompt, When, answer, encode_prompts, generates_text
from sgm_finetune.results.load import LoadedResult, find_base, load_trained, read_stored

WIDE = 100
"""Columns of a terminal from which two answers stand side by side."""
ROLES: dict[Task, tuple[Role, ...]] = {
    "causal-lm": ("messages", "prompt", "instruction", "text"),
    "preference": ("messages", "prompt", "instruction", "text"),
    "reward": ("messages", "completion", "text"),
    "seq2seq-lm": ("source", "text"),
    "sequence-classification": ("text",),
    "token-classification": ("tokens", "text"),
}
"""Columns of a file of prompts; the first one that the file has is used."""


def generate(
    config: Config, overrides: Sequence[str], request: GenerateRequest, console: Console
) -> list[dict[str, Any]]:
    """Prints the answers of the result in output.dir; returns them as rows {prompt, answer, (scores), (before)}.

    Raises UserError, before the base model is looked for or loaded, for what can be known then.
    """
    request.check(config)
    log = StepLog(console)
    stored = read_stored(config, overrides, log)
    from_file = read_prompts(request.file, stored.config) if request.file is not None else []
    prompts: list[Prompt] = [*request.texts, *from_file]
    if not prompts:
        raise UserError(NOTHING_TO_ANSWER)
    if stored.config.model.task == "reward":
        prompts = [read_messages(one, "--prompt") if is_json_list(one) else one for one in prompts]  # type: ignore[arg-type]
    found = find_base(stored, log)
    if generates_text(found.config.model.task) or found.config.model.task == "reward":
        encode_prompts(found, prompts, request.raw)  # a template refuses a prompt before the model is loaded
    result = load_trained(found, log)
    is_one_text = len(prompts) == 1 and generates_text(result.config.model.task)
    if is_one_text and not request.compare and console.is_terminal:
        return [{"prompt": prompts[0], **_stream_answer(result, prompts[0], request, console)}]
    whens: tuple[When, ...] = ("before", "after") if request.compare else ("after",)
    answers: dict[When, list[dict[str, Any]]] = {}
    for when in whens:
        with log.bar(when) as progress:
            answers[when] = answer(result, prompts, request.sampling, when, request.raw, progress)
    rows = []
    for at, prompt in enumerate(prompts):
        row = {"prompt": prompt, **answers["after"][at]}
        if request.compare:
            row["before"] = answers["before"][at]
        rows.append(row)
        _print_row(console, row, with_prompt=len(prompts) > 1)
    return rows


def _stream_answer(result: LoadedResult, prompt: Prompt, request: GenerateRequest, console: Console) -> dict[str, Any]:
    """Prints the answer while it is generated."""

    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    (found,) = answer(result, [prompt], request.sampling, raw=request.raw, show=show)
    console.print()
    return found


def read_prompts(path: Path, config: Config) -> list[Prompt]:
    """Reads the prompts of a file ("-": of standard input).

    A text file has one prompt a line. Other files (CSV, JSON lines, Parquet ...) are read by the columns that the run
    was trained on, or by their roles' own names. If a conversation ends with an answer, that answer is left out, but
    not for a reward model, which scores it.
    """
    if str(path) == "-" or type_of(path, "--input") == "text":
        text = sys.stdin.read() if str(path) == "-" else _read_text(path)
        return [line for line in text.splitlines() if line.strip()]
    table = read_file(path, "--input")
    task, chosen = config.model.task, config.data.columns
    is_scored = task == "reward"
    if (task in DECODER_TASKS or is_scored) and (chats := read_questions(table, chosen, is_scored)) is not None:
        return list(chats)
    names = {role: chosen.get(role, role) for role in ROLES[task]}
    role = next((role for role, name in names.items() if name in table.columns), None)
    if role is None:
        raise UserError(
            f"{table.name} has none of the columns {', '.join(names.values())} (has: {', '.join(table.columns)}); "
            "rename the column to read"
        )
    name = names[role]
    if role == "tokens":
        return [[str(word) for word in words] for words in table.columns[name]]
    texts = columns.read_texts(table, name, may_be_empty=False)
    asked = chosen.get("prompt", "prompt")
    if role == "completion" and asked in table.columns:
        return list(zip(columns.read_texts(table, asked, may_be_empty=True), texts, strict=True))
    pair = chosen.get("text_pair", "text_pair")
    if task == "sequence-classification" and pair in table.columns:
        return list(zip(texts, columns.read_texts(table, pair, may_be_empty=False), strict=True))
    return list(texts)


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {one_line(error)}") from None


def _print_row(console: Console, row: dict[str, Any], with_prompt: bool) -> None:
    if with_prompt:
        console.print(Rule(escape(_shorten(row["prompt"])), align="left"))
    if "before" not in row:
        print_line(console, _describe_answer(row))
        return
    console.print(side_by_side(console, _describe_answer(row["before"]), _describe_answer(row)))


def side_by_side(console: Console, before: str, after: str) -> RenderableType:
    """Two answers: side by side on a wide terminal, one below the other on a narrow one."""
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


def _describe_answer(row: dict[str, Any]) -> str:
    """An answer as text: a class with its probabilities, or words with their tags other than O."""
    found = row["answer"]
    if "scores" in row:
        names = (", ".join(found) or "(none)") if isinstance(found, list) else found
        best = sorted(row["scores"].items(), key=lambda pair: -pair[1])[:5]
        return f"{names}  ({', '.join(f'{name} {score:.3f}' for name, score in best)})"
    if isinstance(found, list):
        return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in found)
    return f"{found:g}" if isinstance(found, float) else found


def _shorten(prompt: Prompt) -> str:
    """A prompt as one line of at most 72 characters.

    >>> _shorten([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}])
    '1 + 1?'
    """
    if isinstance(prompt, dict):
        return _shorten(prompt["messages"])
    if isinstance(prompt, tuple):
        text = " · ".join(prompt)
    elif isinstance(prompt, list):
        text = prompt[-1].get("content", "") if isinstance(prompt[-1], dict) else " ".join(map(str, prompt))
    else:
        text = prompt
    line = " ".join(text.split())
    return line if len(line) <= 72 else line[:71] + "…"
