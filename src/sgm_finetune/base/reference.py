"""Describes the configuration from its own types: a commented YAML file, a JSON Schema, a page of the documentation."""

from __future__ import annotations

import json
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sgm_finetune.base.config import Config, known_keys, sections

WIDTH = 100


class Key(NamedTuple):
    """One key of the configuration."""

    name: str
    """Dotted name."""
    type: str
    bounds: str
    """Interval in mathematical notation; "" when the key has no bounds."""
    default: Any
    description: str


def keys() -> Iterator[Key]:
    """All keys, in the order of the configuration."""
    for name in known_keys():
        section, _, leaf = name.rpartition(".")
        model: type[BaseModel] = Config.model_fields[section].annotation if section else Config  # type: ignore[assignment]
        field = model.model_fields[leaf]
        text = " ".join((field.description or "").split())
        yield Key(name, _type(field.annotation), _bounds(field), _default(field), text)


def commented_yaml(config: Config, shown: Collection[str] = (), schema: str | None = None) -> str:
    """`config` as a YAML file that explains itself and loads as `config` again.

    It writes each key that differs from its default or is in `shown` (dotted names), below its description. A comment
    lists the other keys of the same sections with their defaults. `schema` is a path or address of the JSON Schema,
    with which editors complete keys.
    """
    lines = [f"# yaml-language-server: $schema={schema}", ""] if schema else []
    values, described = config.model_dump(mode="json"), {key.name: key for key in keys()}
    for name in Config.model_fields:
        is_section = name in sections(Config)
        inner = values[name] if is_section else {"": values[name]}
        dotted = {leaf: f"{name}.{leaf}" if leaf else name for leaf in inner}
        written = [leaf for leaf in inner if dotted[leaf] in shown or inner[leaf] != described[dotted[leaf]].default]
        if not written:
            continue
        indent = ""
        if is_section:
            indent = "  "
            lines.append(f"{name}:")
        for leaf, value in inner.items():
            key = described[dotted[leaf]]
            if leaf in written:
                lines += _wrap(_describe(key), f"{indent}# ", f"{indent}# ")
                lines.append(f"{indent}{leaf or name}: {_scalar(value)}")
        rest = ", ".join(f"{leaf}: {_scalar(value)}" for leaf, value in inner.items() if leaf not in written)
        if rest:
            begin = f"{indent}# defaults: "
            lines += _wrap(rest, begin, f"{indent}#   ")
        lines.append("")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file."""
    schema = _with_bounds(Config.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sgm-finetune configuration", **schema}


def _with_bounds(node: Any) -> Any:
    """A JSON Schema whose bounds all have the names that programs know.

    Pydantic leaves its own names where a key may be null.

    >>> _with_bounds({"anyOf": [{"ge": 1, "type": "integer"}, {"type": "null"}]})
    {'anyOf': [{'minimum': 1, 'type': 'integer'}, {'type': 'null'}]}
    """
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    if isinstance(node, dict):
        return {names.get(name, name): _with_bounds(inner) for name, inner in node.items()}
    return [_with_bounds(inner) for inner in node] if isinstance(node, list) else node


def reference_page() -> str:
    """The text of docs/reference/config.md: one table for each section."""
    lines = [
        "# Configuration",
        "",
        "This page lists every key of config.yaml, the values it takes and its default. On the command line, write",
        "`section.key=value`. An unknown key, a wrong type or a value out of range stops the command with one line,",
        "before it loads anything.",
        "",
        "The type of a key says how its value is read, in the file and on the command line. A text is what stands",
        "there: `output.dir=o/trial #7`, `output.dir=2024-01-01`. Put it into quotes where it would mean null",
        '(`"null"`), or, in the file, where it holds ` #` or `: `. A number is plain: `90`, `1_000`, `0.5`, `1e-3`;',
        "`1:30` and `010` are refused. A switch is `true` or `false`. Lists and mappings are YAML:",
        "`data.columns={text: review, label: stars}`. In keys that take a path, `~` is your home folder.",
        "",
        "Editors complete and check the file with the [JSON Schema](config.schema.json) of these keys. Begin the file",
        "with `# yaml-language-server: $schema=config.schema.json`; `sgm init` writes such a line.",
        "",
        "`python -m sgm_finetune.base.reference docs/reference` generates this page.",
    ]
    section = None
    for key in keys():
        heading, _, leaf = key.name.rpartition(".")
        if heading != section:
            section = heading
            lines += ["", f"## {heading or 'plan'}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        takes = f"{key.type} {key.bounds}".strip().replace("|", "\\|")
        description = re.sub(r"([<>|])", r"\\\1", key.description)
        lines.append(f"| `{leaf}` | {takes} | `{_scalar(key.default)}` | {description} |")
    return "\n".join(lines) + "\n"


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _describe(key: Key) -> str:
    """The description, followed by the possible values when the key is a choice or has bounds."""
    if key.bounds:
        return f"{key.description} ({key.type}, {key.bounds})"
    is_choice = " | " in key.type
    return f"{key.description} ({key.type})" if is_choice else key.description


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _type(annotation: Any) -> str:
    """The type in the words of a person who writes YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(_scalar(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}{'s' if _type(arguments[0]) == 'mapping' else ''}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "mapping"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}[annotation]


def _bounds(field: FieldInfo) -> str:
    """The bounds of a key as an interval; "" when there are none.

    >>> [key.bounds for key in keys() if key.name in ("probe.num_batches", "adapter.dropout")]
    ['[2, 10000]', '[0, 1)']
    """
    found: dict[str, Any] = {}
    for part in field.metadata:
        for name in ("ge", "gt", "le", "lt"):
            if (value := getattr(part, name, None)) is not None:
                found[name] = value
    if not found:
        return ""
    low = f"[{found['ge']}" if "ge" in found else f"({found.get('gt', '−∞')}"
    high = f"{found['le']}]" if "le" in found else f"{found.get('lt', '∞')})"
    return f"{low}, {high}"


def _scalar(value: Any) -> str:
    """`value` in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _write_reference(folder: str) -> None:
    from pathlib import Path

    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.md").write_text(reference_page(), encoding="utf-8", newline="\n")
    (Path(folder) / "config.schema.json").write_text(
        json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    import sys

    _write_reference(sys.argv[1])
