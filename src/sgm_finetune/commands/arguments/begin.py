"""The arguments of `sgm init`, `sgm import` and `sgm doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from sgm_finetune.base.config import Quantization, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.arguments.options import AsJson
from sgm_finetune.commands.arguments.output import console_for, print_saved


def init_command(
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="config.yaml")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Answers the first question.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Answers the second.")] = None,
    task: Annotated[
        Task | None, typer.Option("--task", metavar="TASK", help=f"Answers the third: {', '.join(get_args(Task))}.")
    ] = None,
    quantization: Annotated[Quantization | None, typer.Option("--quantization", help="Answers the fourth.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; take the default answer for what is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Ask four questions and write a commented configuration.

    Example: sgm init reviews.yaml --data reviews.csv
    """
    console = console_for(False, result=True)
    if not yes and not sys.stdin.isatty() and None in (model, data, task, quantization):
        raise UserError("sgm init asks, and there is no terminal; give the four answers as options, or --yes")
    from sgm_finetune.commands.init import Answers, next_steps, write_first_config

    given = Answers(model, data, task, quantization)
    write_first_config(path, console, given, ask=not yes, overwrite=force)
    print_saved(console, f"{path}\n{next_steps(path)}")


def import_command(
    source: Annotated[Path, typer.Argument(help="A configuration of Axolotl or LLaMA-Factory.", metavar="FILE")],
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="config.yaml")] = Path("config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a configuration from that of Axolotl or LLaMA-Factory, and list what has no counterpart.

    Example: sgm import qlora.yml
    """
    from sgm_finetune.base.console import StepLog
    from sgm_finetune.commands.import_config import import_config
    from sgm_finetune.commands.init import next_steps

    console = console_for(False, result=True)
    imported = import_config(source, path, overwrite=force)
    log = StepLog(console)
    for step, line in zip(["differs", *[""] * len(imported.notes)], imported.notes, strict=False):
        log.line(step, line)
    if imported.unneeded:
        log.line("not needed", ", ".join(sorted(imported.unneeded)))
    print_saved(console, f"{path}\n{next_steps(path)}")


def doctor_command(as_json: AsJson = False) -> None:
    """Try what works on this machine: processor, GPU, memory, disk, 4 and 8 bits, extras, hub; say what to install.

    Example: sgm doctor --json
    """
    from sgm_finetune.commands.doctor import examine, report, to_dict

    findings = list(examine()) if as_json else report(examine(), console_for(False, result=True))
    if as_json:
        print(json.dumps(to_dict(findings)))
    if any(finding.verdict == "broken" for finding in findings):
        raise SystemExit(2)
