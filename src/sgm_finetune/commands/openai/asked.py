"""What a client asks for: requests in OpenAI's form, and the mistakes in them.

A parameter does what its name says or the request is refused. Null is the same as no value, as in OpenAI's own clients.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgm_finetune.results.answers import Prompt, When
from sgm_finetune.results.sampling import Sampling

MAX_TOKENS = 512
"""Most tokens of an answer whose request does not say."""
_MOST_TOKENS = 2**20
MODELS: tuple[When, ...] = get_args(When)
"""Names of the models: the base, and the trained one."""
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                   "parallel_tool_calls")  # fmt: skip
"""Parameters that change nothing in one answer."""
_ONLY: Mapping[str, Sequence[Any]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}  # fmt: skip
"""Parameters of which only the values that change nothing are taken."""


class RefusedError(Exception):
    """A request that is not answered: its HTTP status, and the fields of OpenAI's error."""

    def __init__(self, status: int, line: str, param: str | None = None, code: str | None = None):
        super().__init__(line)
        self.status, self.line, self.param, self.code = status, line, param, code

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.line, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """One prompt, and how it is to be answered."""

    when: When
    """The model: the base or the trained one."""
    prompt: Prompt
    raw: bool
    """Whether the prompt is a text to continue, without the chat template."""
    sampling: Sampling
    texts: tuple[str, ...]
    """Texts that end the answer."""
    num_likeliest: int | None
    """None: no log-probabilities."""
    stream: bool
    with_usage: bool
    """Whether a stream ends with the numbers of tokens."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: str = Field(min_length=1)
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "\n".join(parts)}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class _Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    def asked(self, prompt: Prompt, raw: bool, limit: int | None, num_likeliest: int | None) -> Asked:
        if self.model not in MODELS:
            line = f"There is no model {self.model[:80]!r}; take one of {', '.join(MODELS)}"
            raise RefusedError(404, line, "model", "model_not_found")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > 4 or "" in stops:
            raise RefusedError(400, "`stop` is at most four texts, and none of them is empty", "stop")
        if self.temperature is None and self.top_p < 1:
            line = "`top_p` needs `temperature`: without one, the likeliest token is taken always"
            raise RefusedError(400, line, "top_p")
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        sampling = Sampling(limit or MAX_TOKENS, self.temperature or 0.0, self.top_p, seed)
        usage = self.stream_options.include_usage
        return Asked(_when(self.model), prompt, raw, sampling, tuple(stops), num_likeliest, self.stream, usage)


class _ChatBody(_Body):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class _CompletionBody(_Body):
    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=5)


def read_chat(body: Any) -> Asked:
    """What a request for a chat completion asks for. Raises RefusedError for one that cannot be answered."""
    given = _parse(_ChatBody, body)
    if given.max_tokens is not None and given.max_completion_tokens is not None:
        raise RefusedError(400, "`max_tokens` and `max_completion_tokens` are the same; give one", "max_tokens")
    if given.top_logprobs is not None and not given.logprobs:
        raise RefusedError(400, "`top_logprobs` needs `logprobs`: true", "top_logprobs")
    prompt: Prompt = [message.plain() for message in given.messages]  # type: ignore[misc]
    likeliest = (given.top_logprobs or 0) if given.logprobs else None
    return given.asked(prompt, False, given.max_completion_tokens or given.max_tokens, likeliest)


def read_completion(body: Any) -> Asked:
    """What a request for a completion asks for. Raises RefusedError for one that cannot be answered."""
    given = _parse(_CompletionBody, body)
    prompts = [given.prompt] if isinstance(given.prompt, str) else given.prompt
    if len(prompts) != 1:
        raise RefusedError(400, f"`prompt` is one text, and here are {len(prompts)}; send one request each", "prompt")
    return given.asked(prompts[0], True, given.max_tokens, given.logprobs)


def _when(name: str) -> When:
    return MODELS[MODELS.index(name)]  # type: ignore[arg-type]


def _parse(kind: type[Any], body: Any) -> Any:
    if not isinstance(body, dict):
        raise RefusedError(400, "The body of a request is a JSON object")
    given = _without_nulls(body)
    for name in _WITHOUT_EFFECT:
        given.pop(name, None)
    for name, values in _ONLY.items():
        if name in given and given[name] not in values:
            raise RefusedError(400, f"`{name}` is not supported here; leave it out", name)
        given.pop(name, None)
    if isinstance(given.get("messages"), list):
        given["messages"] = [_without_nulls(one) if isinstance(one, dict) else one for one in given["messages"]]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _mistake(error) from None


def _without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _mistake(error: ValidationError) -> RefusedError:
    """The first mistake, named as OpenAI names it: messages.0.content."""
    first = error.errors()[0]
    place = first["loc"][: 3 if first["loc"][:1] == ("messages",) else 1]
    param = ".".join(str(part) for part in place)[:80]
    if first["type"] == "extra_forbidden":
        return RefusedError(400, f"`{param}` is not known here; leave it out", param, "unknown_parameter")
    return RefusedError(400, f"`{param}`: {first['msg'][:1].lower()}{first['msg'][1:]}", param)
