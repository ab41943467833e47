"""The arguments of `sgm finetune` and `sgm evaluate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sgm_finetune.commands.arguments.options import AsJson, ConfigPath, Overrides, config_of_result, read_config
from sgm_finetune.commands.arguments.output import console_for, loading


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
