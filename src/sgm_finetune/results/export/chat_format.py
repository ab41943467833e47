"""An Ollama Modelfile: the chat template in Go's language, found by looking at what the tokenizer's own writes.

A format is what stands before and after each role's content; it is kept only where it gives, character for character,
what the tokenizer's template gives on `CONVERSATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgm_finetune.data.columns import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether an answer is asked for) -> text, as the tokenizer's chat template."""

_S, _U, _A = "SYSTEM¶CONTENT", "USER¶CONTENT", "ASSISTANT¶CONTENT"
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello."},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Who wrote "Emma"?'}),
    (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Two\nlines, and {braces}"},
    ),
    (
        {"role": "system", "content": "You are a cook."},
        {"role": "user", "content": "Soup?"},
        {"role": "assistant", "content": "With leeks."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "They are sweet."},
        {"role": "user", "content": "Thanks."},
    ),
)


@dataclass(frozen=True)
class ChatFormat:
    begin: str
    """What every conversation begins with."""
    roles: dict[str, tuple[str, str]]
    """Role -> what stands before its content, and after it."""
    prompt: str
    """What asks for an answer."""
    default_system: str | None
    """What the template says for the system where the conversation does not."""

    def render(self, messages: Sequence[Message], asks: bool) -> str:
        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text = self.begin
        for message in messages:
            before, after = self.roles[message["role"]]
            text += before + message["content"] + after
        return text + (self.prompt if asks else "")

    def go_template(self) -> str:
        """For Ollama, whose own default system message (SYSTEM) stands for `default_system`."""
        branches = [
            f'{"else if" if at else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for at, (role, (before, after)) in enumerate(self.roles.items())
        ]
        inner = "{{ ".join(branches)
        return f"{self.begin}{{{{ range .Messages }}}}{{{{ {inner}{{{{ end }}}}{{{{ end }}}}{self.prompt}"

    def stop(self) -> str:
        """The text that ends an answer."""
        return self.roles["assistant"][1].strip()


def find_format(render: Render) -> ChatFormat | None:
    """The format that agrees with `render` on all CONVERSATIONS; None where there is none of this kind."""
    try:
        found = _derived(render)
        if found is None or any("{{" in text or '"""' in text for text in _texts(found)):
            return None
        agrees = all(found.render(m, asks) == render(m, asks) for m in CONVERSATIONS for asks in (False, True))
    except Exception:  # a template raises what it likes for roles that it does not take
        return None
    return found if agrees else None


def _derived(render: Render) -> ChatFormat | None:
    user = {"role": "user", "content": _U}
    assistant = {"role": "assistant", "content": _A}
    whole = render([{"role": "system", "content": _S}, user, assistant, user, assistant], False)
    asked = render([user, assistant, user], True)
    before_system, _, rest = whole.partition(_S)
    between, _, rest = rest.partition(_U)
    after_user, _, rest = rest.partition(_A)
    after_assistant, _, rest = rest.partition(_U)
    if not rest or not rest.endswith(after := rest.rpartition(_A)[2]):
        return None
    # after the last answer stands what closes it; before the next question, what opens that besides
    opens_user = after_assistant.removeprefix(after)
    if after_assistant == opens_user and after:
        return None
    after_system = between.removesuffix(opens_user)
    prompt_and_close = asked.rpartition(_U)[2]
    closed = render([user], False).rpartition(_U)[2]
    prompt = prompt_and_close.removeprefix(closed)
    opens_assistant = after_user.removeprefix(closed)
    alone = render([user], False).partition(_U)[0]
    begin = _common_start(before_system, alone)
    default: str | None = None
    if alone.endswith(opens_user) and alone != opens_user:
        middle = alone.removesuffix(opens_user)
        if middle.startswith(before_system) and after_system and middle.endswith(after_system):
            default = middle.removeprefix(before_system).removesuffix(after_system)
            begin = ""
        else:
            begin = middle
    elif alone == opens_user:
        begin = ""
    return ChatFormat(
        begin=begin,
        roles={
            "system": (before_system.removeprefix(begin), after_system),
            "user": (opens_user, closed),
            "assistant": (opens_assistant, after),
        },
        prompt=prompt,
        default_system=default,
    )


def _common_start(one: str, other: str) -> str:
    end = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:end]


def _texts(found: ChatFormat) -> list[str]:
    sides = [side for pair in found.roles.values() for side in pair]
    return [found.begin, found.prompt, found.default_system or "", *sides]


def modelfile(model: str, found: ChatFormat | None, begin_of_text: str | None, stops: Sequence[str]) -> str:
    """`model` is the GGUF file's name; `begin_of_text` what the runtime puts before every prompt itself, which the
    template then leaves out. Without a format the template is left to Ollama, which reads the GGUF file's."""
    lines = [f"FROM ./{model}"]
    if found is not None:
        template = found.go_template().removeprefix(begin_of_text or "")
        lines.append(f'TEMPLATE """{template}"""')
        if found.default_system:
            lines.append(f'SYSTEM """{found.default_system}"""')
    quoted = (stop.replace("\\", "\\\\").replace('"', '\\"') for stop in dict.fromkeys(stops) if stop)
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in quoted)]) + "\n"
