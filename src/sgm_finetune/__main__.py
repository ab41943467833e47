"""`python -m sgm_finetune` is `sgm`."""

import signal
import sys

from sgm_finetune.commands.exit_status import run_and_exit


def main(arguments: list[str] | None = None) -> None:
    """Runs `sgm` as this process. Signals end it in one line from its first import on."""

    def imported() -> int:
        from sgm_finetune.commands.cli import run

        return run(arguments)

    try:
        run_and_exit(imported)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to clean up, so Ctrl-C needs no traceback


if __name__ == "__main__":
    main(sys.argv[1:])
