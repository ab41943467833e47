"""The command `sgm`, which src/finetune.py and src/evaluate.py call too: arguments in, results and exit status out.

Help and wrong input answer at once: a command checks what it was given (commands/requests.py) before it imports its
own module, and with it PyTorch.
"""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.arguments import begin, look, train, use
from sgm_finetune.commands.arguments.output import set_quiet
from sgm_finetune.commands.exit_status import run_and_exit
from sgm_finetune.commands.libraries import configure_libraries

COMMANDS = {
    "Begin": {"init": begin.init_command, "import": begin.import_command, "doctor": begin.doctor_command},
    "Look first": {
        "data": look.data_command,
        "scan": look.scan_command,
        "estimate": look.estimate_command,
        "plan": look.plan_command,
    },
    "Train": {
        "finetune": train.finetune_command,
        "sweep": train.sweep_command,
        "evaluate": train.evaluate_command,
        "ship": train.ship_command,
    },
    "Use": {
        "report": use.report_command,
        "compare": use.compare_command,
        "generate": use.generate_command,
        "chat": use.chat_command,
        "serve": use.serve_command,
        "export": use.export_command,
    },
}
"""The commands by name, in the panels of `sgm --help`."""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune transformers on machines that are a little too small: measure, merge, train, evaluate, save.",
)
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"sgm-finetune {version('sgm-finetune')}")
        raise typer.Exit


@app.callback()
def set_options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only; --json still prints the result.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the messages of the libraries too (like SGM_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    set_quiet(quiet)
    configure_libraries(verbose or bool(os.environ.get("SGM_DEBUG")))


def run(arguments: list[str] | None = None) -> int:
    """Runs `sgm` with `arguments` (None: those of the process) and returns its exit status. Raises what ends it
    early."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except typer.TyperException as error:
        raise UserError(f"{error.format_message()} (sgm --help lists what there is)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if status == 128 + signal.SIGINT:  # typer makes a number of Ctrl-C, and returns it
        raise KeyboardInterrupt
    return status or 0


def main(arguments: list[str] | None = None) -> None:
    """Runs `sgm` with `arguments` (None: those of the process) and exits with its status."""
    run_and_exit(lambda: run(arguments))
