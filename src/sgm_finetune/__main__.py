"""`python -m sgm_finetune` is `sgm`."""

from sgm_finetune.cli import main

main()
