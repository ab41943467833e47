"""`sgm serve`: the model before and after, for every client that speaks OpenAI's protocol. Needs the extra `serve`."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.openai.application import build
from sgm_finetune.commands.openai.asked import MODELS, RefusedError
from sgm_finetune.commands.requests import HOST, ServeRequest
from sgm_finetune.commands.server import (
    Application,
    Refusal,
    Scope,
    Written,
    guarded,
    headers_of,
    refuse_strangers,
    run_server,
)
from sgm_finetune.commands.turns import wait_for_last
from sgm_finetune.results.answers import generates_text
from sgm_finetune.results.load import LoadedResult, find_base, load_trained, read_stored


def serve(config: Config, overrides: Sequence[str], request: ServeRequest, console: Console) -> None:
    """Serves the result in `config.output.dir` until it is interrupted.

    Raises UserError, before the model is loaded, for a request that cannot be served, and for a result that does not
    answer with texts.
    """
    request.check(config)
    log = StepLog(console)
    stored = read_stored(config, overrides, log)
    if not generates_text(stored.config.model.task):
        raise UserError(
            f"sgm serve answers with texts, and this run's model.task is {stored.config.model.task}; take sgm generate "
            "or sgm report --serve"
        )
    result = load_trained(find_base(stored, log), log)
    address = f"[{request.host}]" if ":" in request.host else request.host
    log.line("open", f"http://{address}:{request.port}/v1  (models {', '.join(MODELS)}; Ctrl-C stops it)")
    try:
        run_server(application(result, request), request.port, request.host)
    finally:
        wait_for_last()


def application(result: LoadedResult, request: ServeRequest) -> Application:
    """Returns the web application, which answers whom `request` lets in."""

    def refuse(scope: Scope) -> Refusal | None:
        """Another machine has other names for this one, and a token keeps strangers out instead."""
        return refuse_strangers(scope, by_any_name=request.host != HOST) or _refuse_without(request.token, scope)

    return guarded(build(result), refuse, _in_json)


def _refuse_without(token: str | None, scope: Scope) -> Refusal | None:
    """The refusal of a request without the token; None if it has it or none is needed."""
    given = headers_of(scope).get(b"authorization", [""])
    kind, _, value = given[0].partition(" ")
    right = kind.lower() == "bearer" and hmac.compare_digest(value.encode(), (token or "").encode())
    return None if token is None or (right and len(given) == 1) else (401, "The token is missing or wrong")


def _in_json(status: int, line: str) -> Written:
    code = "invalid_api_key" if status == 401 else None
    return b"application/json", json.dumps(RefusedError(status, line, code=code).to_dict()).encode()
