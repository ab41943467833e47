"""The server of `sgm report --serve` and `sgm serve`: whom it answers, and how a signal ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from types import FrameType
from typing import Any

from sgm_finetune.commands.requests import HOST

MAX_REQUEST = 2**20
"""Bytes of a request. The page sends texts, and no files."""
_NAMES = {HOST, "localhost", "[::1]"}
"""What a browser on this machine calls it. Any port may follow: a tunnel from another machine has its own."""
_SECONDS_TO_END = 2
"""How long a request may go on after the signal that ends the server."""

ENDS = threading.Event()
"""Set when the server ends: whoever waits for the model stops."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def run_server(application: Application, port: int, host: str = HOST) -> None:
    """Serves `application` at `host` until SIGINT or SIGTERM, which is raised again afterwards."""
    ended_by: list[int] = []
    ENDS.clear()
    try:
        make_server(application, port, host, ended_by.append).run()
    finally:
        ENDS.set()
    if ended_by:  # uvicorn raises it inside asyncio, which answers Ctrl-C itself
        signal.raise_signal(ended_by[0])


def make_server(application: Application, port: int, host: str, on_signal: Callable[[int], None]) -> Any:
    """Returns a uvicorn.Server, which ends when its `should_exit` is set or a signal comes, which it passes on."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            on_signal(sig)
            ENDS.set()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        application, host=host, port=port, log_level="critical", proxy_headers=False,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )  # fmt: skip
    return Server(settings)


Refusal = tuple[int, str]
"""The status and the line for a request that is not answered."""
Written = tuple[bytes, bytes]
"""A content type and a body."""


def plain_text(status: int, line: str) -> Written:
    """A refusal as text."""
    return b"text/plain; charset=utf-8", line.encode()


def guarded(
    application: Application,
    refuse: Callable[[Scope], Refusal | None],
    written: Callable[[int, str], Written] = plain_text,
) -> Application:
    """Returns `application` for requests that `refuse` lets through; the others get its answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        problem = refuse(scope) if scope["type"] != "lifespan" else None
        if problem is None:
            await application(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem[1]})
            return
        kind, body = written(*problem)
        headers = [(b"content-type", kind), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": problem[0], "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def refuse_strangers(scope: Scope, by_any_name: bool = False) -> Refusal | None:
    """Returns the status and the line for a request that is not answered; None for one that is.

    A page of somebody else cannot read this one by a name of its own for this machine (DNS rebinding): the name in
    `Host` must be this machine's, unless the server has other names too. It cannot make the browser send anything:
    `Origin` must be this page's. Nobody can send more than MAX_REQUEST.
    """
    given = headers_of(scope)
    hosts, origins = given.get(b"host", []), given.get(b"origin", [])
    if len(hosts) != 1 or not (by_any_name or _without_port(hosts[0]) in _NAMES):
        return 403, f"The server answers to the names {HOST} and localhost only."
    if any(origin != f"http://{hosts[0]}" for origin in origins):
        return 403, "This page answers no other page."
    sizes = given.get(b"content-length", ["0"])
    if b"transfer-encoding" in given or not all(size.isdecimal() and int(size) <= MAX_REQUEST for size in sizes):
        return 413, f"A request has at most {MAX_REQUEST:,} bytes."
    return None


def headers_of(scope: Scope) -> dict[bytes, list[str]]:
    """The values of each header, by its name in small letters."""
    given: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        given.setdefault(name.lower(), []).append(value.decode("latin-1"))
    return given


def _without_port(host: str) -> str:
    """Returns the name in a Host header.

    >>> [_without_port(host) for host in ("localhost:7860", "127.0.0.1", "[::1]:80", "evil.example:80:localhost")]
    ['localhost', '127.0.0.1', '[::1]', 'evil.example:80:localhost']
    """
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
