"""The web application of `sgm serve`: OpenAI's endpoints over one loaded result. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from pydantic_core import from_json

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.base.errors import UserError, is_out_of_memory
from sgm_finetune.base.text import printable
from sgm_finetune.commands.openai.asked import MODELS, Asked, RefusedError
from sgm_finetune.commands.openai.written import CHAT, COMPLETION, Envelope, Form, event, model, models
from sgm_finetune.commands.server import Application
from sgm_finetune.commands.turns import Left, start
from sgm_finetune.results.answer_stream import Piece
from sgm_finetune.results.answers import PromptTooLongError, Streamed, is_chat_model, stream_answer
from sgm_finetune.results.load import LoadedResult


def build(result: LoadedResult) -> Application:
    """Returns the application. It answers one request at a time, with the base model or the trained one."""
    from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
    from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
    from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]
    from starlette.routing import Route  # pyright: ignore[reportMissingImports]

    async def list_models(request: Any) -> Any:
        return JSONResponse(models())

    async def show_model(request: Any) -> Any:
        name = request.path_params["name"]
        if name not in MODELS:
            raise RefusedError(404, f"There is no model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(model(name))

    async def chat(request: Any) -> Any:
        _check_chat(result)
        return await _respond(result, request, CHAT)

    async def completion(request: Any) -> Any:
        return await _respond(result, request, COMPLETION)

    async def refuse(request: Any, error: Any) -> Any:
        return JSONResponse(error.to_dict(), error.status)

    async def refuse_path(request: Any, error: Any) -> Any:
        line = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return JSONResponse(RefusedError(error.status_code, line).to_dict(), error.status_code)

    return Starlette(
        routes=[
            Route("/v1/models", list_models),
            Route("/v1/models/{name}", show_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        exception_handlers={RefusedError: refuse, HTTPException: refuse_path},
    )


def _check_chat(result: LoadedResult) -> None:
    """Raises RefusedError for a model that reads no conversations."""
    if result.config.model.task in DECODER_TASKS and (result.tokenizer.chat_template or is_chat_model(result)):
        return
    raise RefusedError(400, "This model has no chat template, which a conversation needs; take /v1/completions")


async def _respond(result: LoadedResult, request: Any, form: Form) -> Any:
    from starlette.responses import JSONResponse, StreamingResponse  # pyright: ignore[reportMissingImports]

    asked = form.read(await _json(request))
    envelope, answer = Envelope(form, asked), _answer(result, asked)
    if asked.stream:
        first = await anext(answer)  # an error before it has a status of its own
        return StreamingResponse(_events(envelope, first, answer), media_type="text/event-stream")
    pieces: list[Piece] = []
    async with aclosing(answer):
        async for item in answer:
            if isinstance(item, Streamed):
                return JSONResponse(envelope.whole(pieces, item))
            pieces.append(item)
            if await request.is_disconnected():
                break
    raise RefusedError(499, "The client has left")


async def _json(request: Any) -> Any:
    try:
        return from_json(await request.body())  # it refuses halves of surrogate pairs, which no tokenizer reads
    except ValueError:
        raise RefusedError(400, "The body of the request is not JSON") from None


async def _events(
    envelope: Envelope, first: Piece | Streamed, rest: AsyncIterator[Piece | Streamed]
) -> AsyncIterator[str]:
    yield envelope.begin() + envelope.next(first)
    try:
        async for item in rest:
            yield envelope.next(item)
    except RefusedError as error:
        yield event(error.to_dict())


async def _answer(result: LoadedResult, asked: Asked) -> AsyncGenerator[Piece | Streamed]:
    """The pieces of the answer, and at last its numbers. The computation ends when the iteration does."""
    loop, items = asyncio.get_running_loop(), asyncio.Queue()

    def put(item: Piece | Streamed | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(items.put_nowait, item)

    def compute(show: Any) -> None:
        show(
            stream_answer(
                result, asked.prompt, asked.sampling, asked.when, asked.raw, asked.texts, asked.num_likeliest, show
            )
        )

    left = start(compute, put)
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, BaseException):
                raise _refusal(item)
            yield item
    finally:
        left.set()


def _refusal(error: BaseException) -> RefusedError:
    """What a client is told of an exception. The terminal gets the traceback of what is our fault."""
    match error:
        case PromptTooLongError():
            return RefusedError(400, str(error), code="context_length_exceeded")
        case UserError():
            return RefusedError(400, str(error))
        case Left():
            return RefusedError(503, "The server has ended")
        case _ if is_out_of_memory(error):
            return RefusedError(503, "The memory is not enough for this request; send a shorter one")
        case _:
            print(printable("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
            return RefusedError(500, f"The server failed ({type(error).__name__}); its terminal says where")
