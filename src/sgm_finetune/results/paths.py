"""The local files that a configuration names, so that a result finds them from any folder.

A run stores absolute paths. A result finds what moved together with its folder: if a stored path does not exist, the
same way from the run's folder is tried. Older results hold paths as they were typed, and are read by this rule too.
"""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from sgm_finetune.base.config import Config
from sgm_finetune.base.files import absolute_path
from sgm_finetune.data.embedded import EMBEDDED as DATA
from sgm_finetune.model.folder import EMBEDDED as MODELS

_PATHS = (
    ("model", "name"), ("data", "name"), ("data", "train"), ("data", "validation"), ("data", "test"), ("snr", "scan"),
    ("adapter", "from_run"), ("output", "dir"), ("plan",),
)  # fmt: skip
"""The keys that name local files. A name of a model or of data can be a hub id or an embedded one instead."""
_Keys = tuple[str | int, ...]


def _keys_of(values: dict[str, Any]) -> list[_Keys]:
    """The keys that name local files, also those of the entries of a mixture."""
    entries = range(len(values["data"].get("mixture") or ()))
    of_data = [keys for keys in _PATHS if keys[0] == "data"]
    return [*_PATHS, *(("data", "mixture", entry, *keys[1:]) for entry in entries for keys in of_data)]


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths of local files; names of the hub and embedded ones stay."""
    values = config.model_dump()
    for keys in _keys_of(values):
        name = _get(values, keys)
        if name is not None and (keys[-1] != "name" or _is_local(keys, name)):
            _set(values, keys, absolute_path(name))
    return config.model_validate(values)


def found_from(values: dict[str, Any], output: Path) -> dict[str, Any]:
    """The stored `values` of a configuration, with the paths of local files as they are now that the run's folder is
    `output`; a path that is found nowhere stays."""
    stored = str(_get(values, ("output", "dir")))
    found = deepcopy(values)
    for keys in _keys_of(values):
        name = _get(values, keys)
        if keys == ("output", "dir") or name is None or name in (MODELS if keys[0] == "model" else DATA):
            continue
        path = os.path.expanduser(name)
        tried = [path]
        if path and stored and os.path.isabs(path) == os.path.isabs(stored):  # else one does not tell of the other
            way = _way(stored, path)
            beside = [] if way is None else [os.path.normpath(output.absolute() / way)]
            tried = [path, *beside] if os.path.isabs(path) else [*beside, path]
        there = next((option for option in tried if os.path.exists(option)), None)
        if there is not None:
            _set(found, keys, absolute_path(there))
    return found


def _way(start: str, end: str) -> str | None:
    """The relative path from `start` to `end`, which are both absolute, or relative to one unknown folder. None where
    they are on different drives of Windows."""
    unknown = os.path.join(os.sep, *["_"] * 64)  # deep, so that `..` leads out of it
    try:
        return os.path.relpath(os.path.join(unknown, end), os.path.join(unknown, start))
    except ValueError:
        return None


def _is_local(keys: _Keys, name: str) -> bool:
    return name not in (MODELS if keys[0] == "model" else DATA) and os.path.isdir(os.path.expanduser(name))


def _get(values: Any, keys: _Keys) -> Any:
    for key in keys:
        values = values[key]
    return values


def _set(values: Any, keys: _Keys, value: str) -> None:
    _get(values, keys[:-1])[keys[-1]] = value
