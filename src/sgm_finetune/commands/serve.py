"""The result in a browser: its report, and the model before and after, to be tried. Needs the extra `browser`."""

from __future__ import annotations

import html
import importlib.util
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.columns import Message
from sgm_finetune.results.answers import (
    Prompt,
    Sampling,
    When,
    answer,
    is_chat_model,
)
from sgm_finetune.results.load import LoadedResult, load_trained, read_result

HOST = "127.0.0.1"
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Of the person's machine: nothing is fetched from elsewhere."""
_WHENS: tuple[When, ...] = ("before", "after")
_MODEL = threading.Lock()
"""There is one model, whose adapter is off while it answers as before: two questions at a time would mix."""


def serve(config: Config, overrides: Sequence[str], console: Console, port: int = 7860) -> None:
    """Serves the page on this machine alone until it is interrupted. Raises UserError before the model is loaded where
    Gradio is missing, the port is taken, or there is no result."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--serve needs Gradio; pip install 'sgm-finetune[browser]'")
    _check_free(port)
    log = StepLog(console)
    result = load_trained(read_result(config, overrides, log), log)
    report = Path(config.output.dir) / "report.html"
    page = build(result, report.read_text(encoding="utf-8") if report.is_file() else None)
    import gradio

    console.print(f"[bold]{'open':<8}[/bold] http://{HOST}:{port}  (Ctrl-C ends)", highlight=False)
    launch(gradio, page, port)


def launch(gradio: Any, page: Any, port: int, **options: Any) -> Any:
    """As Gradio's `launch`, for this machine alone."""
    return page.launch(
        server_name=HOST, server_port=port, share=False, quiet=True, show_error=True, footer_links=[], ssr_mode=False,
        theme=gradio.themes.Default(**_FONTS), **options,
    )  # fmt: skip


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port} cannot be used ({error.strerror}); name another") from None


def build(result: LoadedResult, report: str | None = None) -> Any:
    """The page, a gradio.Blocks, with a tab for the report where there is one."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    with gradio.Blocks(title=f"SGM: {result.config.model.name}", fill_width=True) as page:
        with gradio.Tab("Try it"):
            _try(gradio, result)
        if report is not None:
            with gradio.Tab("Report"):
                size = "width: 100%; height: 85vh; border: 0"
                gradio.HTML(f'<iframe title="report" srcdoc="{html.escape(report)}" style="{size}"></iframe>')
    return page


def _try(gradio: Any, result: LoadedResult) -> None:
    if result.config.model.task in ("sequence-classification", "token-classification"):
        _labels(gradio, result)
    elif is_chat_model(result):
        _conversation(gradio, result)
    else:
        _continuation(gradio, result)


def _labels(gradio: Any, result: LoadedResult) -> None:
    """A text and its classes with their probabilities, a number, or words with their tags."""
    tagged, number = result.config.model.task == "token-classification", result.label_kind == "number"
    text = gradio.Textbox(label="Text", lines=3, autofocus=True)
    pair = gradio.Textbox(label="Second text", lines=3, visible="text_pair" in result.roles)
    ask = gradio.Button("Ask", variant="primary")
    with gradio.Row():
        kind = gradio.HighlightedText if tagged else gradio.Number if number else gradio.Label
        shown = [kind(label=f"{when}, head untrained" if when == "before" else when) for when in _WHENS]

    def asked(first: str, second: str) -> list[Any]:
        prompt: Prompt = (first, second) if second else first
        found = [_one(gradio, result, prompt, when) for when in _WHENS]
        if tagged:
            return [[(word, None if tag == "O" else tag) for word, tag in row["answer"]] for row in found]
        return [row.get("scores", row["answer"]) for row in found]

    for event in (ask.click, text.submit):
        event(asked, [text, pair], shown, api_name=False)


def _one(gradio: Any, result: LoadedResult, prompt: Prompt, when: When) -> dict[str, Any]:
    try:
        with _MODEL:
            return answer(result, [prompt], Sampling(), when)[0]
    except UserError as error:
        raise gradio.Error(str(error)) from None


def _sampling(gradio: Any) -> list[Any]:
    with gradio.Accordion("How the next word is chosen", open=False):
        longest = gradio.Slider(1, 1024, value=128, step=1, label="Longest answer, tokens")
        temperature = gradio.Slider(0, 2, value=0, step=0.1, label="Temperature (0: always the likeliest)")
    return [longest, temperature]


def _continuation(gradio: Any, result: LoadedResult) -> None:
    """A text and how it goes on, or what it is turned into."""
    text = gradio.Textbox(label="Text", lines=4, autofocus=True)
    chosen = _sampling(gradio)
    ask = gradio.Button("Ask", variant="primary")
    with gradio.Row():
        shown = [gradio.Textbox(label=when, lines=8) for when in _WHENS]

    def asked(prompt: str, longest: int, temperature: float) -> Iterator[list[str]]:
        texts = ["", ""]
        for at, when in enumerate(_WHENS):
            for texts[at] in _written(gradio, result, prompt, Sampling(int(longest), temperature), when):
                yield texts

    ask.click(asked, [text, *chosen], shown, api_name=False)


def _conversation(gradio: Any, result: LoadedResult) -> None:
    """Two conversations with the same questions, each with its own answers."""
    with gradio.Row():
        shown = [gradio.Chatbot(label=when, buttons=["copy"], height="55vh") for when in _WHENS]
    told = [gradio.State([]) for _ in _WHENS]
    question = gradio.Textbox(label="Question", autofocus=True, submit_btn=True)
    chosen = _sampling(gradio)
    clear = gradio.Button("Begin anew")

    def asked(
        text: str, before: list[Message], after: list[Message], longest: int, temperature: float
    ) -> Iterator[list[Any]]:
        turns = [[*turn, {"role": "user", "content": text}] for turn in (before, after)]
        answered = [[*turn, {"role": "assistant", "content": ""}] for turn in turns]
        for at, when in enumerate(_WHENS):
            for piece in _written(gradio, result, turns[at], Sampling(int(longest), temperature), when):
                answered[at] = [*turns[at], {"role": "assistant", "content": piece}]
                yield [*answered, *answered, ""]

    question.submit(asked, [question, *told, *chosen], [*told, *shown, question], api_name=False)
    clear.click(lambda: [[], [], [], []], None, [*told, *shown], api_name=False)


def _written(gradio: Any, result: LoadedResult, prompt: Prompt, sampling: Sampling, when: When) -> Iterator[str]:
    """The answer as far as it is written, again and again."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def write() -> None:
        try:
            with _MODEL:
                answer(result, [prompt], sampling, when, show=pieces.put)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=write, daemon=True).start()
    text = ""
    while (piece := pieces.get()) is not None:
        if isinstance(piece, UserError):
            raise gradio.Error(str(piece))
        if isinstance(piece, BaseException):
            raise piece
        text += piece
        yield text
    yield text.strip()
