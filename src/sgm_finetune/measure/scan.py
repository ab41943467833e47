"""The scan: the signal-to-noise ratio of every weight matrix in a model's files (docs/method.md section 1).

At most two matrices are in memory at a time: one is read while the other is decomposed. No model is built.
"""

from __future__ import annotations

import difflib
import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Lock
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.scan_cache import content_key, recall, remember
from sgm_finetune.measure.scan_result import Control, MatrixScan, Scan
from sgm_finetune.method.decibels import Estimator
from sgm_finetune.method.singular_values import SingularValues, batched_singular_values, exact_bfloat16_products
from sgm_finetune.method.snr import SnrStatistics, signal_to_noise
from sgm_finetune.model.folder import local_folder, refuse_adapter
from sgm_finetune.model.names import kind_of, layer_of, module_of
from sgm_finetune.model.weights.stored import StoredMatrix, stored_matrices

_WORKERS = 2
"""Number of matrices in memory; their workers divide the threads among them."""
_MAX_BATCH_ELEMENTS = 2**26
"""Number of elements that a GPU decomposes together."""
_SHUFFLE_SEED = 0
_gpu_lock = Lock()
"""One decomposition at a time on a GPU: torch 2.11 cannot load its solvers in two threads at once."""


def scan(
    model: str | Path,
    *,
    estimator: Estimator = "mp",
    names: Collection[str] | None = None,
    control: bool = False,
    fresh: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scan:
    """The signal-to-noise ratios of a model's weight matrices, by layer number.

    `model` is a local folder, a `.safetensors`, `.bin` or `.gguf` file, an embedded demo model or a hub id. `names` (of
    modules, or of single parts) restricts the scan to these matrices. `control` scans each matrix a second time with
    its entries shuffled. A cache keeps singular values under the content of their matrix, so that an interrupted scan
    resumes where it stopped; `fresh` computes all of them again. `device` defaults to the first GPU, else the CPU.
    `progress(done, total, name)` is called in the calling thread after each matrix.

    Raises UserError for what `stored_matrices` refuses, for a model without matrices, an unknown name, and a matrix
    with values that are not finite.
    """
    if estimator not in get_args(Estimator):
        raise UserError(f"snr.estimator is {estimator!r}; it is one of {', '.join(get_args(Estimator))}")
    start = time.perf_counter()
    chosen = _choose(model, names, split_fused=estimator == "mp")
    purposes = ("", f"shuffled {_SHUFFLE_SEED}") if control else ("",)
    found: dict[str, dict[str, SingularValues]] = {matrix.name: {} for matrix in chosen}
    done = 0
    # `closing` stops the workers also when `progress` raises
    with closing(_measure(chosen, purposes, fresh, _device(device))) as measured:
        for matrix, purpose, spectrum in measured:
            found[matrix.name][purpose] = spectrum
            if len(found[matrix.name]) == len(purposes):
                done += 1
                if progress is not None:
                    progress(done, len(chosen), matrix.name)
    scanned = tuple(_matrix_scan(matrix, estimator, *found[matrix.name].values()) for matrix in chosen)
    return Scan(str(model), estimator, scanned, time.perf_counter() - start)


def measured_singular_values(
    model: str | Path, names: Collection[str], estimator: Estimator = "mp"
) -> Iterator[tuple[SingularValues, MatrixScan]]:
    """Yields the singular values and the scan of each of these matrices, in any order.

    Singular values come from the cache if it has them. Raises UserError as `scan` does.
    """
    chosen = _choose(model, names, split_fused=estimator == "mp")
    for matrix, _, found in _measure(chosen, ("",), False, _device(None)):
        yield found, _matrix_scan(matrix, estimator, found)


def matrix_names(model: str | Path, estimator: Estimator = "mp") -> list[str]:
    """Names of the matrices that `scan` would measure; reads only the headers. Raises UserError as `scan` does."""
    return [matrix.name for matrix in _choose(model, None, split_fused=estimator == "mp")]


def _choose(model: str | Path, names: Collection[str] | None, split_fused: bool) -> list[StoredMatrix]:
    """The matrices to scan, by layer number. Raises UserError before the first is read."""
    path = Path(model).expanduser()
    if not path.exists():
        path = local_folder(str(model))
    elif path.is_dir():
        refuse_adapter(path)
    stored = {matrix.name: matrix for matrix in stored_matrices(path, split_fused=split_fused)}
    if not stored:
        raise UserError(f"{model} has no two-dimensional weight; nothing to scan")
    if names is not None:
        modules = {module_of(name) for name in stored}
        for name in names:
            if name not in stored and name not in modules:
                near = difflib.get_close_matches(name, [*stored, *modules], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"{model} has no weight matrix {name}{hint}")
        stored = {name: m for name, m in stored.items() if name in names or module_of(name) in names}
    return [stored[name] for name in sorted(stored, key=_reading_order)]


def _reading_order(name: str) -> list[tuple[int, int, str]]:
    """Sorting key: names without a layer number come first, and layer 10 comes after layer 9 in every file."""
    parts = re.split(r"[.\[\]]", name)
    key = [(1, int(part), "") if part.isdecimal() else (2, 0, part) for part in parts]
    return key if layer_of(name) is not None else [(0, 0, ""), *key]


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _measure(
    matrices: Sequence[StoredMatrix], purposes: Sequence[str], fresh: bool, device: torch.device
) -> Generator[tuple[StoredMatrix, str, SingularValues]]:
    """Yields (matrix, purpose, spectrum): first for the bfloat16 matrices in order, then for the others in order.

    There are two workers, so that one matrix is read, checked and hashed while another is decomposed. Besides, two
    decompositions with half of the threads each take less time than one after the other with all of them.
    """
    threads = torch.get_num_threads()
    workers = min(_WORKERS, threads) if device.type == "cpu" else _WORKERS
    for is_bfloat16 in (True, False):
        batches = list(batches_by_size([m for m in matrices if (m.dtype == "bfloat16") is is_bfloat16], device))
        if not batches:
            continue
        pool = ThreadPoolExecutor(workers, "scan", torch.set_num_threads, (max(1, threads // workers),))
        try:
            with exact_bfloat16_products(is_bfloat16 and device.type == "cpu"):
                found = pool.map(lambda batch: _find_spectra(batch, purposes, fresh, device), batches)
                for batch, results in zip(batches, found, strict=True):
                    for matrix, by_purpose in zip(batch, results, strict=True):
                        yield from ((matrix, purpose, spectrum) for purpose, spectrum in by_purpose.items())
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def batches_by_size(matrices: Iterable[StoredMatrix], device: torch.device) -> Iterator[list[StoredMatrix]]:
    """Yields the matrices in batches that are decomposed together.

    On a CPU a batch is one matrix. On a GPU it has matrices of one smaller side, as many as fit into the memory of a
    large matrix.
    """
    if device.type == "cpu":
        yield from ([matrix] for matrix in matrices)
        return
    by_size: dict[int, list[StoredMatrix]] = {}
    for matrix in matrices:
        by_size.setdefault(min(matrix.shape), []).append(matrix)
    for size, members in by_size.items():
        largest = max(rows * cols for rows, cols in (matrix.shape for matrix in members))
        count = max(1, min(_MAX_BATCH_ELEMENTS // largest, _MAX_BATCH_ELEMENTS // (4 * size * size)))
        yield from (members[at : at + count] for at in range(0, len(members), count))


def _find_spectra(
    batch: Sequence[StoredMatrix], purposes: Sequence[str], fresh: bool, device: torch.device
) -> list[dict[str, SingularValues]]:
    """Purpose -> spectrum, for each matrix of a batch: from the cache, else computed and cached."""
    found: list[dict[str, SingularValues]] = [{} for _ in batch]
    missing: list[tuple[int, str, str, Tensor]] = []
    for index, stored in enumerate(batch):
        weights = stored.load()
        for purpose in purposes:
            key = content_key(weights, purpose)
            known = None if fresh else recall(key)
            if known is not None:
                found[index][purpose] = known
            else:
                missing.append((index, purpose, key, (_shuffled(weights) if purpose else weights).to(device)))
    if missing:
        try:
            with _gpu_lock if device.type == "cuda" else nullcontext():
                computed = batched_singular_values([weights for *_, weights in missing])
        except ValueError:
            raise _not_finite_error(batch) from None
        for (index, purpose, key, _), spectrum in zip(missing, computed, strict=True):
            remember(key, spectrum)
            found[index][purpose] = spectrum
    return [{purpose: by_purpose[purpose] for purpose in purposes} for by_purpose in found]


def _shuffled(weights: Tensor) -> Tensor:
    """The matrix with its entries in random order: the same values without structure."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    entries = weights.flatten().view(integer).clone()
    np.random.default_rng(_SHUFFLE_SEED).shuffle(entries.numpy())
    return entries.view(weights.dtype).view(weights.shape)


def _not_finite_error(batch: Iterable[StoredMatrix]) -> UserError:
    """The error for the first matrix of the batch with values that are not finite."""
    for matrix in batch:
        weights = matrix.load()
        if num_wrong := int(weights.numel() - torch.isfinite(weights).sum()):
            return UserError(
                f"{matrix.name} in {matrix.file} has {num_wrong} of {weights.numel()} values that are infinite or not "
                "a number; the weights are damaged, use another checkpoint"
            )
    raise AssertionError("every matrix is finite")


def _matrix_scan(
    matrix: StoredMatrix, estimator: Estimator, spectrum: SingularValues, shuffled: SingularValues | None = None
) -> MatrixScan:
    """The scan of a matrix from its singular values, and those of its shuffled entries for the control."""

    def statistics(spectrum: SingularValues) -> SnrStatistics:
        rows, cols = spectrum.alive if estimator == "mp" else matrix.shape
        return signal_to_noise(spectrum.values[: min(rows, cols)], rows, cols, estimator)

    found = statistics(spectrum)
    control = statistics(shuffled) if shuffled is not None else None
    return MatrixScan(
        name=matrix.name,
        kind=kind_of(matrix.name),
        layer=layer_of(matrix.name),
        shape=matrix.shape,
        sigma=found.sigma,
        edge=found.edge,
        signal_rank=found.signal_rank,
        snr=found.snr,
        snr_db=found.snr_db,
        parameter=matrix.parameter,
        energy=min(spectrum.values.square().sum().item(), sys.float_info.max),
        control=Control(control.signal_rank, control.snr_db) if control is not None else None,
    )
