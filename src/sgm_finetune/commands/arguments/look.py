"""The arguments of the commands that look before a run: `sgm data`, `scan`, `estimate` and `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.arguments.options import AsJson, ConfigFile, ConfigPath, Overrides, divided, read_config
from sgm_finetune.commands.arguments.output import console_for, loading, print_saved


def data_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Number of examples to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show training examples as the model will read them, and their lengths. Text outside the loss is dimmed.

    Example: sgm data data.train=chats.jsonl model.task=causal-lm data.max_length=1024
    """
    settings = read_config(config, overrides or [], as_json)
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings)
    with loading():
        from sgm_finetune.commands.data import preview

    shown = preview(settings, console_for(as_json, result=True), examples)
    if as_json:
        print(json.dumps(shown))


def scan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, local folder, .safetensors, .bin or .gguf file, embedded demo model; or a file of results."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write the result to.")] = None,
    estimator: Annotated[
        Literal["mp", "spectrum"] | None,
        typer.Option(help="mp: ours, the default. spectrum: the published script's.", show_default=False),
    ] = None,
    format: Annotated[
        Literal["json", "spectrum", "axolotl"] | None,
        typer.Option(help="Format to write or print: json (the default of --output), or a file for those tools."),
    ] = None,
    top_fraction: Annotated[
        float | None, typer.Option(help="axolotl: share of each kind to train, (0, 1].", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures: a map of layers x kinds, and histograms."),
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(help="--plot: draw histograms of these: a name, or a pattern such as '*v_proj'. Repeatable."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Scan each matrix a second time with its entries shuffled.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute again what an earlier scan has cached.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the signal-to-noise ratio of every weight matrix, with two matrices in memory at a time.

    After an interruption, the same command continues where it stopped.

    Example: sgm scan smollm2-135m-instruct --output scan.json --plot pictures
    """
    if top_fraction is not None and not 0 < top_fraction <= 1:
        raise UserError(f"--top-fraction is {top_fraction}; it is a share above 0 and at most 1")
    if format == "axolotl" and top_fraction is None:
        raise UserError("--format axolotl needs --top-fraction, for example --top-fraction 0.5")
    if top_fraction is not None and format != "axolotl":
        raise UserError("--top-fraction goes with --format axolotl, which lists the parameters to train")
    if matrix and plot is None:
        raise UserError("--matrix says which histograms to draw; it needs --plot FOLDER")
    if as_json and format not in (None, "json"):
        raise UserError(f"--json and --format {format} print two things; leave one of them out")
    from sgm_finetune.commands.requests import ScanRequest

    request = ScanRequest(
        model,
        output=output,
        format=None if as_json else format,
        estimator=estimator,
        top_fraction=top_fraction,
        control=control,
        plot=plot,
        matrices=tuple(matrix or ()),
        fresh=fresh,
    )
    request.check()
    with loading("PyTorch"):
        from sgm_finetune.commands.scan import run_scan

    console = console_for(as_json or (output is None and format is not None), result=output is None)
    scanned = run_scan(request, console)
    if as_json:
        print(json.dumps(scanned.to_dict(), allow_nan=False))


def estimate_command(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    config: ConfigPath = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory, disk and time of a run from its configuration and data, without loading weights.

    Example: sgm estimate data.name=rotten-tomatoes training.batch_size=8 memory.budget=2GiB
    """
    settings = read_config(*divided(config_file, overrides, config), as_json)
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings, with_plan=True)
    with loading():
        from sgm_finetune.commands.estimate import estimate_for

    needed = estimate_for(settings, console_for(as_json, result=True))
    if as_json:
        print(json.dumps(needed.to_dict()))


def plan_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the plan to.")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Scan and probe, and write the plan: what is trained, what is shared, and why. Reuse it with plan=plan.json.

    Example: sgm plan data.name=rotten-tomatoes merge.threshold=0.9 --output plans/strict.json
    """
    settings = read_config(config, overrides or [], as_json)
    if output.exists() and not settings.output.overwrite:
        raise UserError(f"{output} exists; name another --output, or replace it with output.overwrite=true")
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings)
    with loading():
        from sgm_finetune.commands.plan import make_plan_for
        from sgm_finetune.measure.plan_file import plan_document, save_plan

    console = console_for(as_json)
    plan = make_plan_for(settings, console)
    save_plan(plan, output)
    print_saved(console, output)
    if as_json:
        print(json.dumps(plan_document(plan)))
