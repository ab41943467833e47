"""The folder of a sweep: sweep.json, which is all that a sweep knows, and a folder for each try; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sgm_finetune.base.config import Config, known_keys
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import LOCK, write_json, write_text
from sgm_finetune.base.search_space import SearchSpace
from sgm_finetune.base.text import first_mistake, short_repr
from sgm_finetune.base.untrusted import refuse, require_json_object
from sgm_finetune.results.paths import with_absolute_paths
from sgm_finetune.train.tries import Try, winner

SWEEP, BEST, PAGE = "sweep.json", "best.yaml", "sweep.html"
_FREE = ("output.dir", "output.overwrite", "training.report_to")
"""Keys that may change when a sweep goes on."""


class Sweep(BaseModel):
    """The content of sweep.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["sgm-sweep/1"] = "sgm-sweep/1"
    ranges: dict[str, str]
    """Key -> its range or choices, as on the command line."""
    config: dict[str, Any]
    """Every other key of the tries, with its value."""
    validation: str | None = None
    """Fingerprint of the validation examples; None as long as no data was read."""
    tries: tuple[Try, ...] = ()

    @property
    def winner(self) -> Try | None:
        return winner(list(self.tries))

    def to_dict(self) -> dict[str, Any]:
        """The content of sweep.json, which says what follows from the tries too."""
        best = self.winner
        tries = [{**one.model_dump(mode="json"), "loss": one.loss} for one in self.tries]
        return {**self.model_dump(mode="json"), "tries": tries, "best": None if best is None else best.number}


def new_sweep(space: SearchSpace) -> Sweep:
    """A sweep without tries."""
    config = with_absolute_paths(space.config(space.first))
    left = {key: value for key, value in _flat(config).items() if key not in space.texts}
    return Sweep(ranges=space.texts, config=left)


def _flat(config: Config) -> dict[str, Any]:
    values = config.to_compare()
    pairs = ((key, key.rpartition(".")) for key in known_keys())
    return {key: values[section][leaf] if section else values[leaf] for key, (section, _, leaf) in pairs}


def open_folder(folder: Path, space: SearchSpace) -> Sweep:
    """The sweep in `folder`, which has this `space`; a new one if the folder is empty or not there.

    Raises UserError if the folder holds something else: another sweep, or files that no sweep wrote.
    """
    wanted = new_sweep(space)
    if not (folder / SWEEP).exists():
        _check_free(folder)
        return wanted
    found = _read(folder / SWEEP)
    if (difference := _difference(found, wanted)) is not None:
        raise UserError(f"{folder} holds another sweep: {difference}; name another --output, or remove the folder")
    for one in found.tries:
        if set(one.settings) != set(found.ranges):
            refuse(folder / SWEEP, "sweep", ValueError(f"try {one.number} has other keys than the ranges"))
    return found


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    if folder.is_dir() and (other := sorted(path.name for path in folder.iterdir() if path.name != LOCK)):
        raise UserError(f"{folder} holds {other[0]} and no {SWEEP}; name another --output")


def _read(path: Path) -> Sweep:
    values = require_json_object(path)
    values.pop("best", None)  # they follow from the tries
    tries = values.get("tries")
    for one in tries if isinstance(tries, list) else []:
        if isinstance(one, dict):
            one.pop("loss", None)
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        refuse(path, "sweep", ValueError(first_mistake(error)))


def _difference(found: Sweep, wanted: Sweep) -> str | None:
    """The first key in which two sweeps differ, in words; None where they are the same sweep."""
    before, now = {**found.config, **found.ranges}, {**wanted.config, **wanted.ranges}
    for key in {**now, **before}:
        if key not in _FREE and before.get(key) != now.get(key):
            was, is_now = (short_repr(values.get(key), limit=60) for values in (before, now))
            return f"`{key}` was {was} there and is {is_now} now"
    return None


def save_sweep(sweep: Sweep, folder: Path) -> None:
    """Writes sweep.json, whole or not at all."""
    write_json(folder / SWEEP, sweep.to_dict())


def try_folder(folder: Path, number: int) -> Path:
    """The folder of a try.

    >>> try_folder(Path("sweep"), 7).as_posix()
    'sweep/tries/007'
    """
    return folder / "tries" / f"{number:03d}"


def write_best(best: Try, folder: Path) -> None:
    """Writes best.yaml: the configuration of the best try, for `sgm finetune --config`."""
    head = f"# Try {best.number} of a sweep: validation loss {best.loss:.4f} with {describe(best.settings)}\n"
    text = (try_folder(folder, best.number) / "config.yaml").read_text(encoding="utf-8")
    write_text(folder / BEST, head + text)


def describe(settings: dict[str, str]) -> str:
    """Settings as a command line has them.

    >>> describe({"adapter.rank": "4", "merge.scope": "layers"})
    'adapter.rank=4 merge.scope=layers'
    """
    return " ".join(f"{key}={text}" for key, text in settings.items())


def ranked(tries: Sequence[Try]) -> list[Try]:
    """Tries by their validation loss: complete ones, pruned ones, failed ones."""
    states = ("complete", "pruned", "failed")
    return sorted(tries, key=lambda one: (states.index(one.state), one.loss or 0.0, one.number))
