"""Asks llama.cpp about a GGUF file, in a process of its own, so that a crash in native code ends only that.

Runs as a program with two arguments: a JSON file {"model", "ids", "texts"}, and an .npz file for the results. The
results are `logits`, (sequences, length, vocabulary) in float32, and the tokens of text number N: `N.0` without and
`N.1` with special tokens around it. The file may also have {"prompts", "max_new_tokens"}; `answer.N` then has the
likeliest tokens after prompt number N, up to the first at which llama.cpp itself stops.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request_file: Path, results: Path) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    request = json.loads(request_file.read_text(encoding="utf-8"))
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    # keeps the weights in the file's layout: the AMX layout crashes in version 0.3.36
    parameters.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    prompts, limit = request.get("prompts", []), request.get("max_new_tokens", 0)
    length = max(*map(len, request["ids"]), *(len(row) + limit for row in prompts))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, length)
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to half precision
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
    width = llama_cpp.llama_vocab_n_tokens(vocabulary)
    found: dict[str, Any] = {"logits": np.stack([_logits(llama_cpp, context, row, width) for row in request["ids"]])}
    for number, row in enumerate(prompts):
        answer = _answer(llama_cpp, context, vocabulary, row, limit)
        found[f"answer.{number}"] = np.array(answer, dtype=np.int64)
    for number, text in enumerate(request["texts"]):
        for add_special in (False, True):
            tokens = _tokens(llama_cpp, vocabulary, text.encode(), add_special)
            found[f"{number}.{int(add_special)}"] = np.array(tokens, dtype=np.int64)
    np.savez(results, **found)


def _answer(llama_cpp: Any, context: Any, vocabulary: Any, prompt: list[int], limit: int) -> list[int]:
    """The likeliest tokens after the prompt, with the one at which llama.cpp stops."""
    width, answer = llama_cpp.llama_vocab_n_tokens(vocabulary), []
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    read, position = prompt, 0
    while len(answer) < limit:
        likeliest = int(_decode(llama_cpp, context, read, position, width)[-1].argmax())
        answer.append(likeliest)
        if llama_cpp.llama_vocab_is_eog(vocabulary, likeliest):
            break
        read, position = [likeliest], position + len(read)
    return answer


def _logits(llama_cpp: Any, context: Any, row: list[int], width: int) -> np.ndarray:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    return _decode(llama_cpp, context, row, 0, width)


def _decode(llama_cpp: Any, context: Any, row: list[int], begin: int, width: int) -> np.ndarray:
    """The logits at the positions of `row`, which follows `begin` tokens that the context holds."""
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for position, token in enumerate(row):
        batch.token[position] = token
        batch.pos[position] = begin + position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama.cpp cannot compute logits from the file")
    computed = [llama_cpp.llama_get_logits_ith(context, position)[:width] for position in range(len(row))]
    llama_cpp.llama_batch_free(batch)
    return np.array(computed, dtype=np.float32)


def _tokens(llama_cpp: Any, vocabulary: Any, text: bytes, add_special: bool) -> list[int]:
    """Returns a text's tokens. Special tokens that the text spells out are recognised."""
    room = len(text) + 8
    tokens = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), tokens, room, add_special, True)
    return list(tokens[:count])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
