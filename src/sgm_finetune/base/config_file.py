"""Reads the configuration from a YAML file and `key=value` overrides; reports a mistake in one line."""

from __future__ import annotations

import copy
import difflib
import itertools
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sgm_finetune.base.config import ALTERNATIVES, Config, known_keys, sections, with_present_keys
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import short_repr
from sgm_finetune.base.untrusted import Written, parse_yaml, read_yaml


@dataclass(frozen=True)
class FileValues:
    """The nested values of a configuration file, before any override, and where they were read."""

    where: str
    values: dict[str, Any]


def read_values(path: Path | str | None) -> FileValues:
    """The values in a YAML file (None: none, so all defaults). Raises UserError for a missing or unreadable file."""
    if path is None:
        return FileValues("defaults", {})
    return FileValues(str(path), _read_yaml(Path(path).expanduser()))


def overridden(
    file: FileValues,
    overrides: typing.Sequence[str] = (),
    announce: typing.Callable[[str], None] = lambda line: None,
) -> Config:
    """The configuration of `file` with `section.key=value` overrides applied. `file` stays as it is.

    Raises UserError as `load_config`.
    """
    values = copy.deepcopy(file.values)
    origin = dict.fromkeys(_leaf_keys(values), file.where)
    return parse_config(values, file.where, origin | set_overrides(values, overrides, file.where, announce))


def load_config(
    path: Path | str | None,
    overrides: typing.Sequence[str] = (),
    announce: typing.Callable[[str], None] = lambda line: None,
) -> Config:
    """The configuration in a YAML file (None: all defaults), with `section.key=value` overrides applied.

    An override replaces what it excludes in the file (data.train a data.name), and `announce(line)` is told so.
    Raises UserError for a missing or unreadable file, an unknown key (the message names the nearest known key), a value
    of the wrong type or out of range, and an override that is not `key=value`.
    """
    return overridden(read_values(path), overrides, announce)


def set_overrides(
    values: dict[str, Any],
    overrides: typing.Sequence[str],
    where: str,
    announce: typing.Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Writes `section.key=value` overrides into the nested `values` of the file `where`, in place of what they exclude.

    Returns the origin of each key, for messages. Raises UserError when an override is not `key=value` or puts a key
    below a plain value.
    """
    given = {override: _parse_override(override) for override in overrides}
    if "selection" in values:
        values["selection"] = with_present_keys(values["selection"])
    for line in _replace_alternatives(values, dict(given.values()), where):
        announce(line)
    for override, (key, value) in given.items():
        _set_key(values, key, value, override)
    return {key: f"`{override}`" for override, (key, _) in given.items()}


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"`{override}` is not key=value; write for example training.epochs=1")
    declared = _declared(key)
    if _is_nested(declared) or text[:1] in ("'", '"'):
        try:
            value = parse_yaml(text)
        except ValueError:
            value = Written(text)
        if not _is_nested(declared) and not isinstance(value, str):
            value = Written(text)
    else:  # the whole text: `#` and `:` belong to it
        value = Written(text)
    return key, None if _is_null(value, declared) else value


def _declared(dotted: str) -> Any:
    """The type that a key declares; None for an unknown key."""
    first, *rest = dotted.split(".")
    model = sections(Config).get(first, Config)
    if model is not Config:
        if not rest:
            return model
        first, *rest = rest
    field = model.model_fields.get(first)
    if field is None:
        return None
    return str if rest else field.annotation  # data.columns.text


def _is_nested(declared: Any) -> bool:
    """Whether a key takes a list, a mapping or keys of its own."""
    is_section = isinstance(declared, type) and issubclass(declared, BaseModel)
    return is_section or typing.get_origin(declared) in (list, dict)


def _is_null(value: Any, declared: Any) -> bool:
    """Whether a value stands for null: written as null, for a key that may be null or a section."""
    may_be_null = type(None) in typing.get_args(declared) or declared in sections(Config).values()
    return value is None or (isinstance(value, Written) and value.is_null and may_be_null)


def _read_nulls(values: dict[str, Any]) -> None:
    """Writes None into the nested `values` of a file where null stands for a key that may be null."""
    for key, value in values.items():
        if isinstance(value, dict) and key in sections(Config):
            values[key] = {
                leaf: None if _is_null(inner, _declared(f"{key}.{leaf}")) else inner for leaf, inner in value.items()
            }
        elif _is_null(value, _declared(key)):
            values[key] = None


def _replace_alternatives(values: dict[str, Any], given: typing.Mapping[str, Any], where: str) -> list[str]:
    """Removes from the nested `values` each key that a `given` one excludes, with the keys that describe it, and
    returns a line for each. What is given twice stays, and is refused later.

    >>> values = {"data": {"name": "imdb", "columns": {"text": "review"}, "num_train": 100}}
    >>> _replace_alternatives(values, {"data.train": "mine.csv"}, "config.yaml")
    ['data.train=mine.csv replaces data.name=imdb of config.yaml, and data.columns with it']
    >>> values
    {'data': {'num_train': 100}}
    """
    lines = []
    for alternatives in ALTERNATIVES:
        for new, old in itertools.permutations(alternatives, 2):
            replaced = _find(values, old)
            if given.get(new) is None or old in given or replaced is None:
                continue
            gone = [
                key for key in alternatives[old] if key not in given and _find(values, key) not in (None, _default(key))
            ]
            for key in (old, *alternatives[old]):
                _remove(values, key)
            more = f", and {', '.join(gone)} with it" if gone else ""
            lines.append(f"{new}={given[new]} replaces {old}={replaced} of {where}{more}")
    return lines


def _section_of(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The mapping of the file that would hold a key, and the key's name in it."""
    section, _, leaf = dotted.rpartition(".")
    inner = values.get(section) if section else values
    return inner if isinstance(inner, dict) else {}, leaf


def _find(values: dict[str, Any], dotted: str) -> Any:
    """The value of a key of the file; None where the file does not have it."""
    inner, leaf = _section_of(values, dotted)
    return inner.get(leaf)


def _remove(values: dict[str, Any], dotted: str) -> None:
    inner, leaf = _section_of(values, dotted)
    inner.pop(leaf, None)


def _default(dotted: str) -> Any:
    section, _, leaf = dotted.partition(".")
    return getattr(getattr(Config(), section), leaf)


def parse_config(
    values: dict[str, Any], where: str = "config", origin: typing.Mapping[str, str] = types.MappingProxyType({})
) -> Config:
    """The configuration in the nested `values`.

    Raises UserError for an unknown key or a wrong value. The message begins with the `origin` of the key, else `where`.
    """
    values = {key: with_present_keys(value) if key == "selection" else value for key, value in values.items()}
    _reject_unknown_keys(values, Config, (), where, origin)
    try:  # an empty section is None in YAML and takes its defaults
        return Config.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise UserError(_describe_error(error, where, origin)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise UserError(
            f"No configuration file {path}; name another, leave --config out for the defaults, or create one with "
            "sgm init"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if values is None or (isinstance(values, Written) and values.is_null):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {short_repr(values, limit=60)}; write `key: value` lines")
    _read_nulls(values)
    return values


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> typing.Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set_key(values: dict[str, Any], dotted: str, value: Any, override: str) -> None:
    *parents, leaf = dotted.split(".")
    for section in parents:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"`{override}`: `{section}` holds {short_repr(inner, limit=60)}, which has no keys")
        values = inner
    values[leaf] = value


def _reject_unknown_keys(values, model, path, where, origin) -> None:
    """Raises UserError for a key that the model does not have, at any depth below `path`."""
    for key, value in values.items():
        dotted = ".".join((*path, str(key)))
        if key not in model.model_fields:
            raise UserError(
                f"{_origin(dotted, where, origin)}: unknown key `{dotted}`{_suggestion(str(key), model, dotted)}"
            )
        section = sections(model).get(key)
        if section is not None:
            if value is None:
                continue
            if not isinstance(value, dict):
                keys = ", ".join(section.model_fields)
                raise UserError(f"{where}: `{dotted}` is {short_repr(value, limit=60)}; it takes the keys {keys}")
            _reject_unknown_keys(value, section, (*path, key), where, origin)


def _origin(dotted: str, where: str, origin: typing.Mapping[str, str]) -> str:
    """The place where the key, or a key below it, was written."""
    return origin.get(dotted) or next((o for key, o in origin.items() if key.startswith(f"{dotted}.")), where)


def _suggestion(key: str, model: type[BaseModel], dotted: str) -> str:
    """The end of a message about an unknown key: the nearest known key, else the keys of its section."""
    near = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    elsewhere = [known for known in known_keys() if known.rpartition(".")[2] == key]
    elsewhere += difflib.get_close_matches(dotted, known_keys(), n=1, cutoff=0.6)
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; known keys: {', '.join(model.model_fields)}"


def _describe_error(error: ValidationError, where: str, origin: typing.Mapping[str, str]) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "dict_type":
        message = "write a mapping, such as {text: review, label: stars}"
    if (
        first["type"] == "value_error" and dotted not in known_keys() and len(location) <= 1
    ):  # a rule about several keys names them itself
        return f"{where}: {message}"
    known = next((key for key in known_keys() if dotted == key or dotted.startswith(f"{key}.")), dotted)
    return f"{_origin(known, where, origin)}: `{known}` is {short_repr(first['input'], limit=60)}; {message}"
