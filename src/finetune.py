"""`python src/finetune.py [key=value ...]` is `sgm finetune`; it reads config.yaml."""

import sys

from sgm_finetune.__main__ import main

if __name__ == "__main__":
    sys.path.pop(0)  # this folder's evaluate.py must not stand for the `evaluate` library
    main(["finetune", *sys.argv[1:]])
