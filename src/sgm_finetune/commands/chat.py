"""`sgm chat`: turns with what a run left, as it writes them; with the base model's answers beside them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.generate import side_by_side
from sgm_finetune.data.columns import Message
from sgm_finetune.results.answers import Result, Sampling, When, answer, load_result, trained_config

HELP = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    config: Config,
    overrides: Sequence[str],
    console: Console,
    sampling: Sampling,
    compare: bool = False,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Reads questions from the terminal (or lines of standard input) and prints the answers of the result in output.dir
    as they are written; returns the turns, {question, answer, (before)}. compare: the base model answers first, in a
    conversation of its own."""
    trained = trained_config(config, overrides)
    if trained.model.task != "causal-lm":
        raise UserError(
            f"sgm chat is for causal-lm, and this run's model.task is {trained.model.task}; take sgm generate"
        )
    result = load_result(config, overrides, StepLog(console))
    if not result.tokenizer.chat_template:
        raise UserError(
            f"model.name={result.config.model.name} has no chat template, so no turns; take sgm generate --prompt ..."
        )
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    whens: tuple[When, ...] = ("before", "after") if compare else ("after",)
    conversations: dict[When, list[Message]] = {when: list(begin) for when in whens}
    turns: list[dict[str, Any]] = []
    interactive = console.is_terminal and sys.stdin.isatty()
    if interactive:
        console.print(HELP, style="dim", highlight=False)
    while (question := _next_question(console, interactive)) is not None:
        if question == "/clear":
            conversations = {when: list(begin) for when in whens}
            continue
        asked: dict[When, list[Message]] = {
            when: [*turn, {"role": "user", "content": question}] for when, turn in conversations.items()
        }
        try:
            answers = _answered(result, asked, sampling, console)
        except UserError as error:  # too long, or the template refuses it: what was said before stays
            console.print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)
            continue
        for when, text in answers.items():
            conversations[when] = [*asked[when], {"role": "assistant", "content": text}]
        turn = {"question": question, "answer": answers["after"]}
        turns.append(turn | ({"before": answers["before"]} if compare else {}))
    return turns


def _answered(
    result: Result, asked: Mapping[When, list[Message]], sampling: Sampling, console: Console
) -> dict[When, str]:
    """The answers, shown as they are written: one as text, two side by side. Ctrl-C stops them where they are."""
    pieces: dict[When, str] = dict.fromkeys(asked, "")
    beside = len(asked) > 1 and console.is_terminal
    live = Live(console=console, transient=True, refresh_per_second=8) if beside else nullcontext()

    def show(when: When, text: str) -> None:
        pieces[when] += text
        if isinstance(live, Live):
            live.update(side_by_side(console, pieces["before"], pieces["after"]))
        else:
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    try:
        with live:
            for when, conversation in asked.items():
                if len(asked) > 1 and not beside:
                    console.print(f"[bold]{when}[/bold] ", end="")
                pieces[when] = answer(result, [conversation], sampling, when, show=partial(show, when))[0]["answer"]
                if not beside:
                    console.print()
    except KeyboardInterrupt:
        console.print()
    if beside:
        console.print(side_by_side(console, pieces["before"], pieces["after"]))
    return {when: text.strip() for when, text in pieces.items()}


def _next_question(console: Console, interactive: bool) -> str | None:
    """None: the end."""
    while True:
        try:
            line = console.input("[bold cyan]> [/bold cyan]") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None
        if not interactive and not line:
            return None
        line = line.strip()
        if line in ("/exit", "/quit"):
            return None
        if line == "/help":
            console.print(HELP, style="dim", highlight=False)
        elif line.startswith("/") and line != "/clear":
            console.print(f"{line}? {HELP}", style="dim", markup=False, highlight=False)
        elif line:
            return line
