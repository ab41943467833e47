"""Rounds a GGUF file in f16 to one of llama.cpp's k-quants, by llama.cpp's own quantiser, in a process of its own.

Runs as a program with three arguments: the file, the file to write, and the type (`q4_k_m`).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.results.export.llama_process import run_apart


def quantise(source: Path, target: Path, kind: str) -> None:
    """Writes `source` in the type `kind`. Raises UserError with llama.cpp's reason where it cannot."""
    reason = run_apart(__file__, str(source), str(target), kind)
    if reason is not None or not target.is_file():
        why = reason or "it left no file"
        raise UserError(f"llama.cpp cannot write {kind}: {why}; nothing was kept. Take --gguf-type q8_0")


def main(source: Path, target: Path, kind: str) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings: Any = ctypes.byref(parameters)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        sys.exit("its quantiser failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
