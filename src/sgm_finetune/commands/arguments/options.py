"""The options that several commands have, and the configuration that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import FileValues, load_config, overridden, read_values
from sgm_finetune.commands.arguments.output import announce

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file with keys and values.", show_default="config.yaml, or defaults without one"
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change, e.g. training.epochs=2 merge.side=none", metavar="key=value")
]
ConfigFile = Annotated[
    str | None, typer.Argument(help="YAML file, instead of --config; or a key=value.", metavar="config.yaml")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and all else on stderr.")]


def read_config(named: Path | None, overrides: list[str], as_json: bool) -> Config:
    """The configuration in the file that --config names, else in config.yaml, else the defaults; with `overrides`."""
    return overridden(read_file(named, as_json), overrides, announce(as_json))


def read_file(named: Path | None, as_json: bool) -> FileValues:
    """The values in the file that --config names, else in config.yaml, else none."""
    if named is None and (named := _config_here()) is not None:
        announce(as_json)(f"read from {named}")
    return read_values(named)


def divided(config_file: str | None, overrides: list[str] | None, config: Path | None) -> tuple[Path | None, list[str]]:
    """The configuration file and the overrides of a command whose first argument may be either."""
    given = [*([config_file] if config_file else []), *(overrides or [])]
    if given and "=" not in given[0]:
        config = Path(given.pop(0))
    return config, given


def config_of_result(config: Path | None, overrides: list[str] | None) -> Config:
    """The configuration that says where a result is: only its output.dir counts."""
    return load_config(config or _config_here(), overrides or [])


def _config_here() -> Path | None:
    """config.yaml, if this folder has one."""
    path = Path("config.yaml")
    return path if path.exists() else None
