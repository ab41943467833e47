"""`sgm chat`: a conversation with the trained model in the terminal, with the base model's answers beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live

from sgm_finetune.base.config import DECODER_TASKS, Config
from sgm_finetune.base.console import StepLog, print_line
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.generate import side_by_side
from sgm_finetune.data.conversations import Message
from sgm_finetune.results.answers import When, answer
from sgm_finetune.results.load import LoadedResult, find_base, load_trained, read_stored
from sgm_finetune.results.sampling import Sampling

COMMANDS = {
    "/help": "lists these commands",
    "/clear": "begins a new conversation",
    "/exit": "ends (so does /quit or Ctrl-D)",
    "Ctrl-C": "stops an answer",
}
WELCOME = "/help lists the commands, /exit ends"


def chat(
    config: Config,
    overrides: Sequence[str],
    console: Console,
    sampling: Sampling,
    compare: bool = False,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Reads questions from the terminal, or lines of standard input, and prints the answers as they are generated.

    Returns the turns, {question, answer, (before)}. With `compare` the base model answers first, in a conversation of
    its own. Raises UserError, before the model is loaded, for a result that holds no conversations.
    """
    log = StepLog(console)
    stored = read_stored(config, overrides, log)
    if stored.config.model.task not in DECODER_TASKS:
        raise UserError(
            f"sgm chat is for causal-lm, and this run's model.task is {stored.config.model.task}; take sgm generate"
        )
    found = find_base(stored, log)
    if not found.tokenizer.chat_template:
        raise UserError(
            f"model.name={stored.config.model.name} has no chat template, which a conversation needs; take sgm generate"
        )
    result = load_trained(found, log)
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    whens: tuple[When, ...] = ("before", "after") if compare else ("after",)
    conversations: dict[When, list[Message]] = {when: list(begin) for when in whens}
    turns: list[dict[str, Any]] = []
    interactive = console.is_terminal and sys.stdin.isatty()
    if interactive:
        print_line(console, WELCOME, style="dim")
    while (question := _next_question(console, interactive)) is not None:
        if question == "/clear":
            conversations = {when: list(begin) for when in whens}
            continue
        asked: dict[When, list[Message]] = {
            when: [*turn, {"role": "user", "content": question}] for when, turn in conversations.items()
        }
        try:
            answers = _answer_turn(result, asked, sampling, console)
        except UserError as error:  # too long, or refused by the template: the conversation before it stays
            print_line(console, str(error), style="yellow")
            continue
        for when, text in answers.items():
            conversations[when] = [*asked[when], {"role": "assistant", "content": text}]
        turn = {"question": question, "answer": answers["after"]}
        turns.append(turn | ({"before": answers["before"]} if compare else {}))
    return turns


def _answer_turn(
    result: LoadedResult, asked: Mapping[When, list[Message]], sampling: Sampling, console: Console
) -> dict[When, str]:
    """Shows the answers as they are generated: one as text, two side by side. Ctrl-C stops them where they are."""
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
    """The next question; None at the end of the conversation."""
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
            _print_commands(console)
        elif line.startswith("/") and line != "/clear":
            print_line(console, f"{line.split()[0]} is no command", style="yellow")
            _print_commands(console)
        elif line:
            return line


def _print_commands(console: Console) -> None:
    for command, effect in COMMANDS.items():
        print_line(console, effect, f"{command:<8} ", "dim")
