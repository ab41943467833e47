"""Tries a chat template once, within bounds of time and memory: a template is a program that came with a model.

Transformers renders it in jinja's sandbox, which keeps it from files and attributes and bounds neither loops nor texts.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from sgm_finetune.base.errors import UserError

SECONDS = 1
"""Processor seconds of the trial; an ordinary template takes 0.05."""
MEMORY = 128 * 2**20
"""Bytes that the trial may take beyond those of this process."""
_TOO_LONG, _TOO_MUCH = 3, 4  # exit statuses of the trial
_ENDS = [getattr(signal, name) for name in ("SIGXCPU", "SIGKILL", "SIGSEGV") if hasattr(signal, name)]
"""The signals by which a trial ends that takes too long, or nests too deep."""


def try_template(tokenizer: Any, tools: Any = None) -> None:
    """Raises UserError when the tokenizer's chat template takes too long or too much for a few short conversations.

    Each template is tried once, in a copy of this process (`fork`), which the system stops at the bounds.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if template not in _reasons:
        _reasons[template] = _find_reason(template, tokenizer.special_tokens_map)
    if _reasons[template]:
        raise UserError(
            f"This model's chat template takes more than {_reasons[template]} for a short conversation; read "
            "chat_template.jinja in the model's folder, or take another model"
        )


_reasons: dict[str, str] = {}
"""Template -> the bound that it exceeds, or ""."""


def _find_reason(template: str, special: Mapping[str, Any]) -> str:
    """The bound that the template exceeds; "" for a template within them, and on a system without `fork`."""
    if not hasattr(os, "fork"):
        return ""
    with warnings.catch_warnings():
        # Python 3.12 warns of fork beside threads, whose locks stay locked: the copy calls jinja alone
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _try(template, special)
    status = _wait(child)
    if os.WIFSIGNALED(status):  # macOS ends copies of processes that used its libraries with other signals
        return f"{SECONDS} second" if os.WTERMSIG(status) in _ENDS else ""
    return {_TOO_LONG: f"{SECONDS} second", _TOO_MUCH: f"{MEMORY // 2**20} MiB"}.get(os.WEXITSTATUS(status), "")


def _wait(child: int) -> int:
    """The status of the trial's process. One that hangs without using the processor is ended, and counts as tried."""
    deadline = time.monotonic() + 10 * SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0


def _try(template: str, special: Mapping[str, Any]) -> None:
    """Renders the conversations in the process of the trial, and ends it."""
    import resource

    outcome = 0
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(signum, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        if os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm", encoding="ascii") as sizes:
                held = int(sizes.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        for conversation, tools in _conversations():
            for ask in (False, True):
                try:
                    render_jinja_template(
                        [conversation], tools, chat_template=template, **{**special, "add_generation_prompt": ask}
                    )
                except MemoryError:
                    outcome = _TOO_MUCH
                except Exception:  # a template may refuse a conversation, with any type
                    continue
    finally:
        os._exit(outcome)


def _conversations() -> list[tuple[list[dict[str, Any]], Any]]:
    """Conversations of several forms, each with its tools."""
    asked, answered = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
    system = {"role": "system", "content": "e"}
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "g", "parameters": parameters}}
    found = {"role": "tool", "name": "f", "content": "1", "tool_call_id": "123456789"}
    called = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, found, answered]
    return [([asked], None), ([asked, answered] * 20, None), ([system, asked, answered, asked], None), (called, [tool])]
