"""`python src/evaluate.py [key=value ...]` is `sgm evaluate`; it reads output/sgm_finetuned.pth."""

import sys

from sgm_finetune.__main__ import main

if __name__ == "__main__":
    sys.path.pop(0)  # this file must not stand for the `evaluate` library
    main(["evaluate", *sys.argv[1:]])
