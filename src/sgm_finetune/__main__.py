"""`python -m sgm_finetune` is `sgm`."""

from sgm_finetune.commands.cli import main

main()
