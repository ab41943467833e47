"""Rounds a GGUF file in f16 to one of llama.cpp's k-quants, by llama.cpp's own quantiser, in a process of its own.

Runs as a program with three arguments: the file, the file to write, and the type (`q4_k_m`).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError


def quantise(source: Path, target: Path, kind: str) -> None:
    """Writes `source` in the type `kind`. Raises UserError with llama.cpp's reason where it cannot."""
    command = [sys.executable, __file__, str(source), str(target), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not target.is_file():
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"llama.cpp cannot write {kind}: {reason}; nothing was kept. Take --gguf-type q8_0")


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
