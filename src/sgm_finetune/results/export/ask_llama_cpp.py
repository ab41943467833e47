"""Asks llama.cpp about a GGUF file, in a process of its own, so that a crash in native code ends only that.

Runs as a program with two arguments: a JSON file {"model", "ids", "texts", "threads"}, and an .npz file for the
results. The results are `logits`, (sequences, length, vocabulary) in float32, and the tokens of text number N: `N.0`
without and `N.1` with special tokens around it. The JSON file may also have

- "adapter", a LoRA adapter's GGUF file: the model computes with it;
- "prompts" and "max_new_tokens": `answer.N` is the likeliest tokens after prompt number N, up to the first at which
  llama.cpp itself stops;
- "classes", their number: the model is a classifier, `logits` are (sequences, classes), and `scored` those of "scored";
- "scored", a list of [ids, labels]: `losses` is the loss of each sequence in nats, summed over the positions that have
  a label, and `counts` is their number.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PIECE = 512
"""Tokens that llama.cpp reads at one time."""
_held: list[Any] = []
"""What llama.cpp calls until the process ends."""


def main(request_file: Path, results: Path) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    request = json.loads(request_file.read_text(encoding="utf-8"))
    _held.append(silent := llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    # keeps the weights in the file's layout: the AMX layout crashes in version 0.3.36
    parameters.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    prompts, limit, scored = request.get("prompts", []), request.get("max_new_tokens", 0), request.get("scored", [])
    longest = max(len(row) + more for rows, more in (
        (request["ids"], 0), (prompts, limit), ([ids for ids, _ in scored], 0),
    ) for row in rows)  # fmt: skip
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = max(64, longest)
    classes = request.get("classes")
    settings.embeddings = classes is not None
    settings.n_batch = settings.n_ubatch = settings.n_ctx if classes else min(_PIECE, settings.n_ctx)
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to half precision
    context = llama_cpp.llama_init_from_model(model, settings)
    if "adapter" in request:
        _add_adapter(llama_cpp, model, context, request["adapter"])
    vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
    width = llama_cpp.llama_vocab_n_tokens(vocabulary)
    found: dict[str, Any] = {}
    if classes is not None:
        rows = {"logits": request["ids"], "scored": [ids for ids, _ in scored]}
        found |= {key: _class_logits(llama_cpp, context, ids, classes) for key, ids in rows.items()}
        prompts, scored = [], []
    else:
        found["logits"] = np.stack([_logits(llama_cpp, context, row, width) for row in request["ids"]])
    for number, row in enumerate(prompts):
        answer = _answer(llama_cpp, context, vocabulary, row, limit)
        found[f"answer.{number}"] = np.array(answer, dtype=np.int64)
    losses = [_loss(llama_cpp, context, ids, labels, width) for ids, labels in scored]
    found["losses"], found["counts"] = np.array([loss for loss, _ in losses]), np.array([count for _, count in losses])
    for number, text in enumerate(request["texts"]):
        for add_special in (False, True):
            tokens = _tokens(llama_cpp, vocabulary, text.encode(), add_special)
            found[f"{number}.{int(add_special)}"] = np.array(tokens, dtype=np.int64)
    np.savez(results, **found)


def _add_adapter(llama_cpp: Any, model: Any, context: Any, file: str) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(model, file.encode())
    if not adapter:
        sys.exit("llama.cpp cannot load the adapter over the base")
    adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
        sys.exit("llama.cpp cannot use the adapter")


def _answer(llama_cpp: Any, context: Any, vocabulary: Any, prompt: list[int], limit: int) -> list[int]:
    """The likeliest tokens after the prompt, with the one at which llama.cpp stops."""
    width, answer = llama_cpp.llama_vocab_n_tokens(vocabulary), []
    _forget(llama_cpp, context)
    read, position = prompt, 0
    while len(answer) < limit:
        (last,) = _decode(llama_cpp, context, read, position, [len(read) - 1], width)
        answer.append(likeliest := int(last.argmax()))
        if llama_cpp.llama_vocab_is_eog(vocabulary, likeliest):
            break
        read, position = [likeliest], position + len(read)
    return answer


def _logits(llama_cpp: Any, context: Any, row: list[int], width: int) -> np.ndarray:
    """The logits at every position of a row."""
    _forget(llama_cpp, context)
    return np.stack(list(_decode(llama_cpp, context, row, 0, range(len(row)), width)))


def _class_logits(llama_cpp: Any, context: Any, rows: list[list[int]], classes: int) -> np.ndarray:
    """The logits of the classes of each row."""
    found = np.empty((len(rows), classes), np.float32)
    for number, row in enumerate(rows):
        batch = _batch(llama_cpp, row, 0, range(len(row)))
        if llama_cpp.llama_encode(context, batch):
            sys.exit("llama.cpp cannot compute classes from the file")
        found[number] = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), (classes,))
        llama_cpp.llama_batch_free(batch)
    return found


def _loss(llama_cpp: Any, context: Any, row: list[int], labels: list[int], width: int) -> tuple[float, int]:
    """The loss in nats, summed over the positions whose next label is not negative, and the number of these."""
    _forget(llama_cpp, context)
    positions = [at for at in range(len(row) - 1) if labels[at + 1] >= 0]
    total = 0.0
    for at, logits in zip(positions, _decode(llama_cpp, context, row, 0, positions, width), strict=True):
        most = logits.max()
        total += float(most + np.log(np.exp(logits - most).sum(dtype=np.float64)) - logits[labels[at + 1]])
    return total, len(positions)


def _forget(llama_cpp: Any, context: Any) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def _decode(
    llama_cpp: Any, context: Any, row: list[int], begin: int, positions: Sequence[int], width: int
) -> Iterator[np.ndarray]:
    """Reads `row`, which follows `begin` tokens that the context holds, and yields the logits at `positions` of it."""
    wanted, size = set(positions), llama_cpp.llama_n_batch(context)
    for first in range(0, len(row), size):
        piece = range(first, min(first + size, len(row)))
        batch = _batch(
            llama_cpp, [row[at] for at in piece], begin + first, [at - first for at in piece if at in wanted]
        )
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama.cpp cannot compute logits from the file")
        computed = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (width,)).copy()
            for place, at in enumerate(piece)
            if at in wanted
        ]
        llama_cpp.llama_batch_free(batch)
        yield from computed


def _batch(llama_cpp: Any, row: Sequence[int], begin: int, wanted: Sequence[int]) -> Any:
    """One sequence, which begins at position `begin`; something is computed at the places `wanted` of it."""
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, token in enumerate(row):
        batch.token[place] = token
        batch.pos[place] = begin + place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = False
    for place in wanted:
        batch.logits[place] = True
    return batch


def _tokens(llama_cpp: Any, vocabulary: Any, text: bytes, add_special: bool) -> list[int]:
    """Returns a text's tokens. Special tokens that the text spells out are recognised."""
    room = 4 * len(text) + 8  # a space may become three bytes
    tokens = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), tokens, room, add_special, True)
    return list(tokens[:count])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
