"""The server of `sgm report --serve`: it answers this machine's browser alone, and ends with a signal."""

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


def run_server(application: Application, port: int) -> None:
    """Serves `application` at HOST, behind `guarded`, until SIGINT or SIGTERM, which is raised again afterwards."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    ended_by: list[int] = []

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            ended_by.append(sig)
            ENDS.set()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        guarded(application), host=HOST, port=port, log_level="critical", proxy_headers=False,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )  # fmt: skip
    ENDS.clear()
    try:
        Server(settings).run()
    finally:
        ENDS.set()
    if ended_by:  # uvicorn raises it inside asyncio, which answers Ctrl-C itself
        signal.raise_signal(ended_by[0])


def guarded(application: Application) -> Application:
    """Returns `application` for requests that `refusal` lets through; the others get its answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        problem = refusal(scope) if scope["type"] != "lifespan" else None
        if problem is None:
            await application(scope, receive, send)
            return
        status, line = problem
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": line})
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": line.encode()})

    return answer


def refusal(scope: Scope) -> tuple[int, str] | None:
    """Returns the status and the line for a request that is not answered; None for one that is.

    A page of somebody else cannot read this one by a name of its own for this machine (DNS rebinding): the name in
    `Host` must be this machine's. It cannot make the browser send anything: `Origin` must be this page's. Nobody can
    send more than MAX_REQUEST.
    """
    given: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        given.setdefault(name.lower(), []).append(value.decode("latin-1"))
    hosts, origins = given.get(b"host", []), given.get(b"origin", [])
    if len(hosts) != 1 or _without_port(hosts[0]) not in _NAMES:
        return 403, f"This page is served under the names {HOST} and localhost only."
    if any(origin != f"http://{hosts[0]}" for origin in origins):
        return 403, "This page answers no other page."
    sizes = given.get(b"content-length", ["0"])
    if b"transfer-encoding" in given or not all(size.isdecimal() and int(size) <= MAX_REQUEST for size in sizes):
        return 413, f"A request has at most {MAX_REQUEST:,} bytes."
    return None


def _without_port(host: str) -> str:
    """Returns the name in a Host header.

    >>> [_without_port(host) for host in ("localhost:7860", "127.0.0.1", "[::1]:80", "evil.example:80:localhost")]
    ['localhost', '127.0.0.1', '[::1]', 'evil.example:80:localhost']
    """
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
