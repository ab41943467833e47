"""The arguments of `sgm finetune`, `sgm sweep`, `sgm evaluate` and `sgm ship`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.search_space import search_space
from sgm_finetune.commands.arguments.options import (
    AsJson,
    ConfigFile,
    ConfigPath,
    Overrides,
    config_of_result,
    divided,
    read_config,
    read_file,
)
from sgm_finetune.commands.arguments.output import announce, console_for, loading


def finetune_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Scan, probe, plan, train, evaluate and save, as the configuration says.

    Example: sgm finetune data.name=rotten-tomatoes training.epochs=2 output.dir=runs/two-epochs
    """
    settings = read_config(config, overrides or [], as_json)
    from sgm_finetune.commands.requests import check_run

    check_run(settings)
    with loading():
        from sgm_finetune.commands.finetune import finetune

    metrics = finetune(settings, console_for(as_json), dry_run)
    if as_json:
        print(json.dumps(metrics))


def sweep_command(
    config_file: ConfigFile = None,
    ranges: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys to vary: key=A..B, key=log:A..B, key=A,B,C. Other key=value hold for every try.",
            metavar="key=range",
        ),
    ] = None,
    config: ConfigPath = None,
    tries: Annotated[int, typer.Option("--tries", min=1, help="Number of tries, those done before among them.")] = 12,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Begin no try that would not end within this time.", show_default="no limit"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the sweep.")] = Path("sweep"),
    as_json: AsJson = False,
) -> None:
    """Try settings by their validation loss, and write the configuration of the best try. Needs the extra sweep.

    After an interruption, the same command continues where it stopped.

    Example: sgm sweep training.learning_rate=log:3e-3..3e-2 adapter.rank=4,16 --tries 12 --minutes 60
    """
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"--minutes is {minutes:g}; it is a time above 0")
    named, overrides = divided(config_file, ranges, config)
    space = search_space(read_file(named, as_json), overrides, announce(as_json))
    from sgm_finetune.commands.requests import SweepRequest

    request = SweepRequest(space, tries, minutes, output)
    request.check()
    with loading():
        from sgm_finetune.commands.sweep import sweep

    found = sweep(request, console_for(as_json))
    if as_json:
        print(json.dumps(found))


def evaluate_command(overrides: Overrides = None, config: ConfigPath = None, as_json: AsJson = False) -> None:
    """Test output.dir/sgm_finetuned.pth on the test data, from that file and the base model alone.

    Example: sgm evaluate output.dir=runs/two-epochs
    """
    settings = config_of_result(config, overrides)
    from sgm_finetune.commands.requests import check_result

    check_result(settings)
    with loading():
        from sgm_finetune.commands.evaluate import evaluate

    metrics = evaluate(settings, overrides or [], console_for(as_json))
    if as_json:
        print(json.dumps(metrics))


def ship_command(
    output: Annotated[Path, typer.Argument(help="The output.dir of a run.", metavar="OUTPUT")],
    overrides: Overrides = None,
    task_test: Annotated[
        Path | None,
        typer.Option("--task-test", help="Test file; the run's own test data if not given.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="TASK,...",
            help="Tasks of lm-evaluation-harness that must not be lost.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a result with its base on the task and on what must not be lost; exit status 0: ship, 3: do not.

    Example: sgm ship runs/two-epochs --keep arc_easy && ./deploy runs/two-epochs
    """  # fmt: skip
    if "=" in str(output) and not output.exists():
        raise UserError(f"sgm ship {output} names no folder; write sgm ship OUTPUT {output}")
    settings = load_config(None, [*(overrides or []), f"output.dir={json.dumps(str(output))}"])
    from sgm_finetune.commands.requests import ShipRequest

    tasks = dict.fromkeys(name.strip() for name in (keep or "").split(",") if name.strip())
    if keep is not None and not tasks:
        raise UserError(f"--keep {keep!r} names no task; name some, or leave it out")
    request = ShipRequest(task_test, tuple(tasks))
    request.check(settings, overrides or [])
    with loading():
        from sgm_finetune.commands.exit_status import NOT_SHIPPED
        from sgm_finetune.commands.ship import ship

    verdict = ship(settings, overrides or [], request, console_for(as_json))
    if as_json:
        print(json.dumps(verdict))
    if not verdict["ship"]:
        raise typer.Exit(NOT_SHIPPED)
