"""The settings of other libraries for a command: environment variables, set before PyTorch is loaded, and messages."""

from __future__ import annotations

import logging
import os
import re
import warnings

from sgm_finetune.base.text import printable


def configure_libraries(verbose: bool) -> None:
    """Sets environment variables before torch is loaded, and silences other libraries unless `verbose`.

    Waiting threads spin briefly: on a shared machine, OpenMP threads that spin for milliseconds cost more than the
    work (docs/LOG.md, 2026-11-23). oneDNN keeps 64 compiled products instead of 1,024, a set for each length of a
    batch, and is as fast (2026-11-26).
    """
    logging.setLogRecordFactory(_PrintableRecord)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")  # else Intel's Fortran in conda's scipy ends Ctrl-C
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no word about retries: base/hub.py says what failed
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # compressed-tensors has no setting for its bars
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _PrintableRecord(logging.LogRecord):
    """A message of a library, which may quote a file. The library's own colours are left out."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable(re.sub(r"\x1b\[[\d;]*m", "", super().getMessage()))
