"""The servers answer this machine's own page alone."""

from __future__ import annotations

import asyncio

import pytest

from sgm_finetune.commands.server import MAX_REQUEST, guarded, refuse_strangers

OWN = {"host": "127.0.0.1:7860"}


def asked(headers: list[tuple[str, str]], kind: str = "http") -> dict:
    """The first message that goes back: `reached` from the page itself, or the guard's."""
    sent: list = []

    async def page(scope, receive, send):
        await send({"type": "reached"})

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("the body was read")

    scope = {"type": kind, "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}
    asyncio.run(guarded(page, refuse_strangers)(scope, receive, send))
    return sent[0]


@pytest.mark.parametrize(
    "headers",
    [
        OWN,
        {"host": "localhost:8888"},  # the other end of a tunnel
        {"host": "[::1]:7860"},
        {"host": "localhost"},
        OWN | {"origin": "http://127.0.0.1:7860"},
        OWN | {"content-length": str(MAX_REQUEST)},
    ],
    ids=str,
)
def test_the_own_page_is_answered(headers):
    assert asked(list(headers.items())) == {"type": "reached"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("host", "evil.example")], 403),
        ([("host", "evil.example:7860")], 403),
        ([("host", "127.0.0.1.evil.example:7860")], 403),
        ([("host", "localhost:7860:evil.example")], 403),
        ([("host", "")], 403),
        ([], 403),
        ([("host", "localhost:7860"), ("host", "evil.example")], 403),
        ([*OWN.items(), ("origin", "http://evil.example")], 403),
        ([*OWN.items(), ("origin", "null")], 403),
        ([*OWN.items(), ("origin", "http://127.0.0.1:9999")], 403),
        ([*OWN.items(), ("origin", "http://localhost:7860")], 403),
        ([*OWN.items(), ("origin", "http://127.0.0.1:7860"), ("Origin", "http://evil.example")], 403),
        ([*OWN.items(), ("content-length", str(MAX_REQUEST + 1))], 413),
        ([*OWN.items(), ("content-length", "-1")], 413),
        ([*OWN.items(), ("transfer-encoding", "chunked")], 413),
    ],
    ids=str,
)
def test_another_name_another_page_and_too_much_are_refused_unread(headers, status):
    answered = asked(headers)
    assert answered["status"] == status
    assert not [name for name, _ in answered["headers"] if name.startswith(b"access-control")]


def test_a_socket_of_another_page_is_closed():
    assert asked([("host", "evil.example")], "websocket")["type"] == "websocket.close"


def test_the_start_and_end_of_the_server_pass():
    assert asked([], "lifespan") == {"type": "reached"}
