"""The scan: signal-to-noise ratio of every weight matrix of a model, from its files (docs/method.md section 1).

One matrix is in memory at a time, and no model is built. Scanned are the two-dimensional `.weight` tensors inside
numbered layers, the ones an adapter may target; embeddings and output heads, which carry no layer number, are not,
and neither are embeddings inside layers (T5's relative positions).
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import get_args

from torch import Tensor

from sgm_finetune.errors import UserError
from sgm_finetune.measure.weights import StoredMatrix, stored_matrices
from sgm_finetune.method.snr import Estimator, signal_to_noise, singular_values
from sgm_finetune.method.spectrum import MatrixScan, Scan
from sgm_finetune.models import local_folder

_EMBEDDING = re.compile(r"(^|[._])(wte|wpe)$|embed|relative_attention_bias", re.IGNORECASE)


def scan(
    model: str | Path,
    *,
    estimator: Estimator = "mp",
    names: Collection[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scan:
    """Signal-to-noise ratio of the matrices of a model: a local folder, a `.safetensors` file, an embedded demo model
    or a hub id.

    `names` (without `.weight`) restricts the scan to these matrices, which then need no layer number.
    `progress(done, total, name)` is called after each matrix. Raises UserError for what `stored_matrices` refuses, a
    model without such matrices, an unknown name, and for quantised or non-finite weights, naming the matrix.
    """
    if estimator not in get_args(Estimator):
        raise UserError(f"snr.estimator is {estimator!r}; it is one of {', '.join(get_args(Estimator))}")
    start = time.perf_counter()
    chosen = _choose(model if Path(model).exists() else local_folder(str(model)), names)
    scanned = []
    for done, (name, matrix) in enumerate(chosen.items(), start=1):
        scanned.append(_scan_matrix(name, matrix, estimator))
        if progress is not None:
            progress(done, len(chosen), name)
    return Scan(str(model), estimator, tuple(scanned), time.perf_counter() - start)


def layer_of(name: str) -> int | None:
    """The first number among a name's dotted parts.

    >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("lm_head")
    (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def kind_of(name: str) -> str:
    """The name with every number among its dotted parts replaced by `*`.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _choose(model: str | Path, names: Collection[str] | None) -> dict[str, StoredMatrix]:
    """Module name -> matrix to scan, by layer number; all refused before the first is read."""
    stored = {m.name.removesuffix(".weight"): m for m in stored_matrices(model) if m.name.endswith(".weight")}
    if names is None:
        chosen = {n: m for n, m in stored.items() if layer_of(n) is not None and not _EMBEDDING.search(n)}
        if not chosen:
            raise UserError(f"{model} has no two-dimensional weight in a numbered layer; nothing to scan")
    else:
        for name in names:
            if name not in stored:
                near = difflib.get_close_matches(name, stored, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"{model} has no weight matrix {name}{hint}")
        chosen = {name: stored[name] for name in stored if name in set(names)}
    for name in chosen:
        if not chosen[name].is_float:
            chosen[name].load()
    return dict(sorted(chosen.items(), key=lambda item: _reading_order(item[0])))


def _reading_order(name: str) -> list[tuple[int, int, str]]:
    """Sorting key: numbers by value, the rest by letter, so that layer 10 comes after layer 9 in every file."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _scan_matrix(name: str, matrix: StoredMatrix, estimator: Estimator) -> MatrixScan:
    weights = matrix.load()
    if estimator == "mp":
        weights = _without_dead(weights)
    rows, cols = weights.shape
    values = singular_values(weights)
    found = signal_to_noise(values, rows, cols, estimator)
    return MatrixScan(
        name=name,
        kind=kind_of(name),
        layer=layer_of(name),
        shape=matrix.shape,
        sigma=found.sigma,
        edge=found.edge,
        signal_rank=found.signal_rank,
        snr=found.snr,
        snr_db=found.snr_db,
        parameter=matrix.name,
        energy=values.square().sum().item(),
    )


def _without_dead(weights: Tensor) -> Tensor:
    """The matrix without rows and columns of zeros: pruned units are neither noise nor signal.

    >>> import torch
    >>> _without_dead(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).tolist()
    [[1.0], [2.0]]
    """
    alive = weights != 0
    rows, cols = alive.any(dim=1), alive.any(dim=0)
    return weights if bool(rows.all() and cols.all()) else weights[rows][:, cols]
