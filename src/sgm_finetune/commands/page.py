"""`sgm report --serve`: the report, and the model before and after, in a browser. Needs the extra `browser`."""

from __future__ import annotations

import html
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.requests import HOST, check_page
from sgm_finetune.commands.server import ENDS, MAX_REQUEST, Application, guarded, refuse_strangers, run_server
from sgm_finetune.commands.turns import start, wait_for_last
from sgm_finetune.data.conversations import Message
from sgm_finetune.results.answers import Prompt, When, answer, is_chat_model
from sgm_finetune.results.load import LoadedResult, load_trained, read_result
from sgm_finetune.results.sampling import Sampling

_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Fonts of the user's machine, so that the page fetches nothing."""
MAX_CHARACTERS = 100_000
"""Longest text that is computed: more than any model here reads, and a second of a tokenizer's work."""
_WHENS: tuple[When, ...] = ("before", "after")


def serve_page(config: Config, overrides: Sequence[str], console: Console, port: int = 7860) -> None:
    """Serves the page to this machine only, until it is interrupted.

    Raises UserError, before it loads the model, if Gradio is missing, the port is taken, or there is no result.
    """
    check_page(config, port)
    log = StepLog(console)
    result = load_trained(read_result(config, overrides, log), log)
    report = Path(config.output.dir) / "report.html"
    page = mount(build(result, report.read_text(encoding="utf-8") if report.is_file() else None), port)
    console.print(f"[bold]{'open':<8}[/bold] http://{HOST}:{port}  (Ctrl-C stops it)", highlight=False)
    try:
        run_server(guarded(page, refuse_strangers), port)
    finally:
        wait_for_last()


def mount(page: Any, port: int) -> Application:
    """Returns the web application of `page`. Gradio's own server would answer any name for this machine."""
    import fastapi  # pyright: ignore[reportMissingImports]
    import gradio  # pyright: ignore[reportMissingImports]
    from gradio.themes import Default  # pyright: ignore[reportMissingImports]

    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), page, path="/", server_name=HOST, server_port=port, footer_links=[],
        ssr_mode=False, max_file_size=MAX_REQUEST, theme=Default(**_FONTS),
    )  # fmt: skip


def build(result: LoadedResult, report: str | None = None) -> Any:
    """Returns the page, a gradio.Blocks, with a second tab if there is a report."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio  # pyright: ignore[reportMissingImports]

    with gradio.Blocks(title=f"SGM: {result.config.model.name}", fill_width=True) as page:
        with gradio.Tab("Try it"):
            _add_inputs(gradio, result)
        if report is not None:
            with gradio.Tab("Report"):
                gradio.HTML(framed(report))
    return page


def framed(report: str) -> str:
    """Returns a frame with the report. Scripts in it run, but apart from this page: it may be somebody else's file."""
    size = "width: 100%; height: 85vh; border: 0"
    return f'<iframe title="report" sandbox="allow-scripts" srcdoc="{html.escape(report)}" style="{size}"></iframe>'


def _add_inputs(gradio: Any, result: LoadedResult) -> None:
    if result.config.model.task in ("sequence-classification", "token-classification"):
        _add_classifier(gradio, result)
    elif is_chat_model(result):
        _add_conversation(gradio, result)
    else:
        _add_continuation(gradio, result)


def _add_classifier(gradio: Any, result: LoadedResult) -> None:
    """Adds a text, and for it classes with probabilities, a number, or words with tags."""
    is_tagger = result.config.model.task == "token-classification"
    kind = gradio.Label
    if is_tagger:
        kind = gradio.HighlightedText
    elif result.label_kind == "number":
        kind = gradio.Number
    text = gradio.Textbox(label="Text", lines=3, autofocus=True)
    pair = gradio.Textbox(label="Second text", lines=3, visible="text_pair" in result.roles)
    ask = gradio.Button("Ask", variant="primary")
    with gradio.Row():
        outputs = [kind(label="before (head untrained)" if when == "before" else when) for when in _WHENS]

    def classify(first: str, second: str) -> list[Any]:
        prompt: Prompt = (first, second) if second else first
        found = [_answer_once(gradio, result, prompt, when) for when in _WHENS]
        if is_tagger:
            return [[(word, None if tag == "O" else tag) for word, tag in row["answer"]] for row in found]
        return [row.get("scores", row["answer"]) for row in found]

    for event in (ask.click, text.submit):
        event(classify, [text, pair], outputs, api_name=False)


def _answer_once(gradio: Any, result: LoadedResult, prompt: Prompt, when: When) -> dict[str, Any]:
    _check_length(gradio, prompt)
    found: list[dict[str, Any]] = []
    for _ in _computed(gradio, lambda show: found.extend(answer(result, [prompt], Sampling(), when))):
        pass
    return found[0]


def _check_length(gradio: Any, prompt: Prompt) -> None:
    """Raises gradio's Error for more text than the page computes."""
    texts = [turn["content"] if isinstance(turn, dict) else turn for turn in prompt]  # of a text: its characters
    if (length := sum(map(len, texts))) > MAX_CHARACTERS:
        raise _told(gradio, f"This is {length:,} characters; the page takes at most {MAX_CHARACTERS:,}")


def _told(gradio: Any, line: str) -> Exception:
    """Returns Gradio's exception that shows `line` on the page, as text, and nothing in the terminal."""
    return gradio.Error(html.escape(line), print_exception=False)


def _add_sampling(gradio: Any) -> list[Any]:
    with gradio.Accordion("How the next token is chosen", open=False):
        longest = gradio.Slider(1, 1024, value=128, step=1, label="Maximum length of an answer, in tokens")
        temperature = gradio.Slider(0, 2, value=0, step=0.1, label="Temperature (0: always the likeliest token)")
    return [longest, temperature]


def _add_continuation(gradio: Any, result: LoadedResult) -> None:
    """Adds a text, and its continuation or the text that the model makes of it."""
    text = gradio.Textbox(label="Text", lines=4, autofocus=True)
    sampling = _add_sampling(gradio)
    ask = gradio.Button("Ask", variant="primary")
    with gradio.Row():
        outputs = [gradio.Textbox(label=when, lines=8) for when in _WHENS]

    def stream(prompt: str, longest: int, temperature: float) -> Iterator[list[str]]:
        texts = ["", ""]
        for column, when in enumerate(_WHENS):
            for text_so_far in _stream_answer(gradio, result, prompt, Sampling(int(longest), float(temperature)), when):
                texts[column] = text_so_far
                yield texts

    ask.click(stream, [text, *sampling], outputs, api_name=False)


def _add_conversation(gradio: Any, result: LoadedResult) -> None:
    """Adds two conversations with the same questions, each with its own answers."""
    with gradio.Row():
        chats = [gradio.Chatbot(label=when, buttons=["copy"], height="55vh") for when in _WHENS]
    histories = [gradio.State([]) for _ in _WHENS]
    question = gradio.Textbox(label="Question", autofocus=True, submit_btn=True)
    sampling = _add_sampling(gradio)
    clear = gradio.Button("New conversation")

    def stream(
        text: str, before: list[Message], after: list[Message], longest: int, temperature: float
    ) -> Iterator[list[Any]]:
        turns = [[*turn, {"role": "user", "content": text}] for turn in (before, after)]
        answered = [[*turn, {"role": "assistant", "content": ""}] for turn in turns]
        for column, when in enumerate(_WHENS):
            for answer_so_far in _stream_answer(
                gradio, result, turns[column], Sampling(int(longest), float(temperature)), when
            ):
                answered[column] = [*turns[column], {"role": "assistant", "content": answer_so_far}]
                yield [*answered, *answered, ""]

    question.submit(stream, [question, *histories, *sampling], [*histories, *chats, question], api_name=False)
    clear.click(lambda: [[], [], [], []], None, [*histories, *chats], api_name=False)


def _stream_answer(gradio: Any, result: LoadedResult, prompt: Prompt, sampling: Sampling, when: When) -> Iterator[str]:
    """Yields the answer as far as the model has written it, again after each piece."""
    _check_length(gradio, prompt)
    text = ""
    for piece in _computed(gradio, lambda show: answer(result, [prompt], sampling, when, show=show)):
        text += piece
        yield text
    yield text.strip()


def _computed(gradio: Any, compute: Callable[[Callable[[str], None]], object]) -> Iterator[str]:
    """Yields the pieces that `compute(show)` shows while it computes, which ends when the caller asks for no more."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    left = start(compute, pieces.put)
    try:
        while (piece := _next_piece(gradio, pieces)) is not None:
            if isinstance(piece, UserError):
                raise _told(gradio, str(piece))
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        left.set()


def _next_piece(gradio: Any, pieces: queue.Queue[str | BaseException | None]) -> str | BaseException | None:
    while not ENDS.is_set():
        with suppress(queue.Empty):
            return pieces.get(timeout=0.2)
    raise _told(gradio, "The server has ended")
