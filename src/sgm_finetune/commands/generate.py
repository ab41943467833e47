"""What a finished run answers: `sgm generate`, and turn by turn `sgm chat`; beside it, the base model's own answer."""

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

from sgm_finetune.base.config import Config, Role, Task
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line
from sgm_finetune.data import columns
from sgm_finetune.data.columns import Message
from sgm_finetune.data.tables import read_file
from sgm_finetune.results.answers import (
    Prompt,
    Result,
    Sampling,
    When,
    _writes,
    answer,
    load_result,
    trained_config,
)

WIDE = 100
"""Columns of a terminal from which two answers stand beside each other."""


ROLES: dict[Task, tuple[Role, ...]] = {
    "causal-lm": ("messages", "prompt", "instruction", "text"),
    "seq2seq-lm": ("source", "text"),
    "sequence-classification": ("text",),
    "token-classification": ("tokens", "text"),
}
"""Columns of a file of prompts, those looked for first before the others."""


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
    log = StepLog(console)
    asked = trained_config(config, overrides)
    prompts: list[Prompt] = [*texts, *(read_prompts(file, asked) if file is not None else ())]
    if not prompts:
        raise UserError("There is nothing to answer; give --prompt TEXT or --input FILE")
    result = load_result(config, overrides, log)
    if len(prompts) == 1 and not compare and console.is_terminal and _writes(result.config.model.task):
        return [{"prompt": prompts[0], **_streamed(result, prompts[0], sampling, raw, console)}]
    answers: dict[When, list[dict[str, Any]]] = {}
    for when in _WHENS if compare else _WHENS[1:]:
        with log.bar(when) as progress:
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
        return [_question(turns) for turns in columns.alpaca_conversations(texts, given, [""] * len(texts))]
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
