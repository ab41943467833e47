"""An Ollama Modelfile, with the chat template in Go's template language.

SGM finds the format from the text that the tokenizer's template writes: the text before and after each role's content.
It keeps a format only if that writes `CONVERSATIONS` exactly as the tokenizer's template does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgm_finetune.data.conversations import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the text ends by asking for an answer) -> text, as the tokenizer's chat template writes it."""

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
    """Start of every conversation."""
    roles: dict[str, tuple[str, str]]
    """Role -> the text before and after its content."""
    prompt: str
    """Text that asks for an answer."""
    default_system: str | None
    """System message that the template adds to a conversation without one."""

    def render(self, messages: Sequence[Message], asks: bool) -> str:
        """Returns the conversation as text, as a `Render` does."""
        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text = self.begin
        for message in messages:
            before, after = self.roles[message["role"]]
            text += before + message["content"] + after
        return text + (self.prompt if asks else "")

    def go_template(self) -> str:
        """Returns the template for Ollama. The Modelfile's SYSTEM takes the place of `default_system`."""
        branches = [
            f'{"else if" if number else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.roles.items())
        ]
        inner = "{{ ".join(branches)
        return f"{self.begin}{{{{ range .Messages }}}}{{{{ {inner}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def find_format(render: Render) -> ChatFormat | None:
    """Returns the format that agrees with `render` on all CONVERSATIONS, or None if there is none."""
    try:
        found = _derive_format(render)
        if found is None or any("{{" in f"{text}{{" or '"""' in text for text in _texts(found)):
            return None
        agrees = all(found.render(m, asks) == render(m, asks) for m in CONVERSATIONS for asks in (False, True))
    except Exception:  # a template raises any exception for roles that it refuses
        return None
    return found if agrees else None


def _derive_format(render: Render) -> ChatFormat | None:
    """Returns the format that markers in place of the contents reveal. It can be wrong: `find_format` checks it."""
    user = {"role": "user", "content": _U}
    assistant = {"role": "assistant", "content": _A}
    whole = render([{"role": "system", "content": _S}, user, assistant, user, assistant], False)
    asked = render([user, assistant, user], True)
    before_system, _, rest = whole.partition(_S)
    between, _, rest = rest.partition(_U)
    after_user, _, rest = rest.partition(_A)
    after_assistant, _, rest = rest.partition(_U)
    after = rest.rpartition(_A)[2]
    if not rest or not rest.endswith(after):
        return None
    # the text after the last answer closes it; what else follows an earlier answer opens the next question
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
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _texts(found: ChatFormat) -> list[str]:
    sides = [side for pair in found.roles.values() for side in pair]
    return [found.begin, found.prompt, found.default_system or "", *sides]


def modelfile(model: str, found: ChatFormat | None, begin_of_text: str | None, stops: Sequence[str]) -> str:
    """Returns the text of the Modelfile for `model`, the name of the GGUF file.

    The template leaves out `begin_of_text`, which the runtime itself puts before every prompt. Without a format the
    Modelfile has no template, and Ollama uses the one in the GGUF file. A stop text that Ollama's parser cannot read as
    one value is left out: it contains three quotes. (The parser knows no escapes. A value ends with the line unless its
    quotes are still open.)

    >>> modelfile("m.gguf", None, None, ["</s>", "\\nUser:"]).splitlines()
    ['FROM ./m.gguf', 'PARAMETER stop "</s>"', 'PARAMETER stop \"\"\"', 'User:\"\"\"']
    """
    lines = [f"FROM ./{model}"]
    if found is not None:
        template = found.go_template().removeprefix(begin_of_text or "")
        lines.append(f'TEMPLATE """{template}"""')
        if found.default_system:
            lines.append(f'SYSTEM """{found.default_system}"""')
    for stop in dict.fromkeys(stops):
        if stop and '"""' not in stop:
            quote = '"""' if set(stop) & set('"\r\n') else '"'
            lines.append(f"PARAMETER stop {quote}{stop}{quote}")
    return "\n".join(lines) + "\n"
