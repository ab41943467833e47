"""`sgm import`: writes our configuration from Axolotl's or LLaMA-Factory's, and lists what has no counterpart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_text
from sgm_finetune.base.reference import commented_yaml
from sgm_finetune.base.untrusted import read_yaml, refuse
from sgm_finetune.commands.foreign import axolotl, llamafactory
from sgm_finetune.commands.foreign.translation import Translation
from sgm_finetune.commands.init import write_schema


@dataclass(frozen=True)
class Imported:
    """A configuration that was translated."""

    config: Config
    program: str
    """The program whose configuration it was."""
    notes: list[str]
    """What has no counterpart here, or another meaning, a line each."""
    unneeded: list[str]
    """Keys for which SGM needs no setting."""


def import_config(source: Path, path: Path, overwrite: bool = False) -> Imported:
    """Translates the file `source` and writes the configuration, with the notes as comments, to `path`.

    Raises UserError when `path` exists and `overwrite` is false, when `source` is not a configuration of one of the
    programs, and for a training that SGM does not do.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or replace it with --force")
    imported = translate(source)
    head = [f"From {source.name} ({imported.program}). Without a counterpart, or with another meaning here:"]
    comment = "".join(f"# {line}\n" for line in [*head, *(f"- {note}" for note in imported.notes)])
    write_text(path, f"{comment}\n{commented_yaml(imported.config, schema=write_schema())}")
    return imported


def translate(source: Path) -> Imported:
    """The configuration in the file `source`, translated. Raises UserError as `import_config`."""
    try:
        theirs = read_yaml(source.expanduser())
    except FileNotFoundError:
        raise UserError(f"No file {source}; give a configuration of Axolotl or LLaMA-Factory") from None
    except (OSError, ValueError) as error:
        refuse(source, "YAML file", error)
    if not isinstance(theirs, dict):
        theirs = {}
    t = Translation(theirs)
    try:
        if axolotl.MODEL_KEY in theirs:
            program = axolotl.NAME
            axolotl.translate(t)
        elif llamafactory.MODEL_KEY in theirs:
            program = llamafactory.NAME
            llamafactory.translate(t, source.expanduser().parent)
        else:
            raise UserError(
                f"it has neither {axolotl.MODEL_KEY} ({axolotl.NAME}) nor {llamafactory.MODEL_KEY} "
                f"({llamafactory.NAME}); sgm import reads configurations of these two"
            )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return Imported(parse_config(t.by_section(), str(source)), program, t.notes, t.unneeded)
