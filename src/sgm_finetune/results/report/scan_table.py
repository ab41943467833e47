"""Shows a scan on the terminal: one row for each kind and shape, within the terminal's width."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from sgm_finetune.measure.scan_result import MatrixScan, Scan

_NUMBERS, _SHAPE, _LAYERS, _CONTROL = 43, 15, 8, 13
"""Characters that parts of a row take: the numbers, the shape, the layers of lowest and highest SNR, the control."""

_ORDER = (
    r"emb|wte|wpe|shared",
    r"q|query", r"k|key", r"v|value",
    r"gate|router", r"up|fc1|fc_in|fc|in|wi|intermediate|w1|w3",
)  # fmt: skip
"""Words in names of matrices, in the order in which a transformer uses them. A name with none is an output matrix."""


def scan_table(scan: Scan, width: int) -> Table:
    """Returns the table for a terminal of `width` characters. A narrow one leaves out the shape, then the layers."""
    groups: dict[tuple[str, tuple[int, int]], list[MatrixScan]] = {}
    for kind in kinds_in_order(scan.matrices):
        for matrix in scan.matrices:
            if matrix.kind == kind:
                groups.setdefault((kind, matrix.shape), []).append(matrix)
    with_control = any(matrix.control is not None for matrix in scan.matrices)
    names = short_kinds(kind for kind, _ in groups)
    free = width - _NUMBERS - _CONTROL * with_control - min(40, max(map(len, names.values())))
    with_layers, with_shape = free >= _LAYERS, free >= _LAYERS + _SHAPE
    title = f"{scan.model}: signal-to-noise ratio, estimator {scan.estimator}"
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", overflow="fold", min_width=min(16, max(map(len, names.values()))))
    for name in ("num", *(["shape"] if with_shape else []), "lowest\nSNR dB", "median\n", "highest\n", "median\nrank"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_control:
        table.add_column("shuffled:\nrank (most)", justify="right", no_wrap=True)
    for (kind, shape), matrices in groups.items():
        lowest, median, highest = lowest_median_highest(matrices)
        table.add_row(
            Text(names[kind]),  # Text: rich must not read `c_attn[q]` as markup
            str(len(matrices)),
            *([_shape(shape)] if with_shape else []),
            _level(lowest) + (_place(lowest, matrices) if with_layers else ""),
            _level(median),
            _level(highest) + (_place(highest, matrices) if with_layers else ""),
            _rank(matrices, shape),
            *([_control(matrices)] if with_control else []),
        )
    return table


def scan_summary(scan: Scan) -> str:
    """Returns one line: number of matrices, seconds, range of SNR, numbers without signal and with infinite SNR."""
    parts = [f"{len(scan.matrices):,} {'matrix' if len(scan.matrices) == 1 else 'matrices'}"]
    if scan.seconds:
        parts[0] += f" in {scan.seconds:.1f} s"
    if ranked := [matrix for matrix in scan.matrices if 0 < matrix.snr < math.inf]:
        lowest, median, highest = lowest_median_highest(ranked)
        parts.append(f"SNR {lowest.snr_db:.1f} to {highest.snr_db:.1f} dB, median {median.snr_db:.1f}")
    if silent := sum(matrix.snr == 0 for matrix in scan.matrices):
        parts.append(f"{silent:,} without any signal")
    if infinite := sum(math.isinf(matrix.snr) for matrix in scan.matrices):
        parts.append(f"{infinite:,} with an infinite SNR, not ranked")
    return " · ".join(parts)


def kinds_in_order(matrices: Iterable[MatrixScan]) -> list[str]:
    """Returns kinds in the order of use: embeddings; in each stack of layers attention, MLP, the rest; heads."""
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))
    has_layer = {matrix.kind for matrix in matrices if matrix.layer is not None}
    stacks = list(dict.fromkeys(kind.partition("*")[0] for kind in kinds))

    def place(kind: str) -> tuple[int, int, bool, int]:
        step = _step(kind)
        where = 1 if kind in has_layer else (0 if step == 0 else 2)
        in_mlp = not re.search("att", kind, re.IGNORECASE)
        return where, stacks.index(kind.partition("*")[0]), in_mlp, step

    return sorted(kinds, key=place)


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Returns kind -> its name without the prefix that the kinds of all layers share.

    >>> short_kinds(["lm_head", "model.embed", "model.layers.*.q", "model.layers.*.mlp.up"])
    {'lm_head': 'lm_head', 'model.embed': 'embed', 'model.layers.*.q': 'q', 'model.layers.*.mlp.up': 'mlp.up'}
    """
    split = {kind: kind.split(".") for kind in kinds}
    layered = [parts for parts in split.values() if "*" in parts[:-1]] or list(split.values())
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == layered[0][shared] for parts in layered):
        shared += 1
    common = layered[0][:shared] if layered else []
    short = {}
    for kind, parts in split.items():
        same = 0
        while same < min(shared, len(parts) - 1) and parts[same] == common[same]:
            same += 1
        short[kind] = ".".join(parts[same:])
    return short if len(set(short.values())) == len(short) else {kind: kind for kind in split}


def _step(kind: str) -> int:
    """Returns the index in _ORDER of the first match in the parts of a name; len(_ORDER) if no part matches.

    The last part is tried first. A part in brackets counts as the last one: `c_attn[q]`, `output.dense`.
    """
    for part in reversed(re.split(r"[.\[]", kind.rstrip("]"))):
        words = [word for word in re.split(r"[^a-z0-9]+|(?<=proj)\d", part.lower()) if word]
        for step, pattern in enumerate(_ORDER):
            whole = re.search(pattern, part) if step == 0 else any(re.fullmatch(pattern, word) for word in words)
            if whole:
                return step
    return len(_ORDER)


def lowest_median_highest(matrices: Iterable[MatrixScan]) -> tuple[MatrixScan, MatrixScan, MatrixScan]:
    """Returns three matrices by SNR. The median of an even number is the upper of the two in the middle."""
    ordered = sorted(matrices, key=lambda matrix: matrix.snr)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}" if any(shape) else "–"


def _level(matrix: MatrixScan) -> str:
    if matrix.snr == 0:
        return "none"
    return "inf" if math.isinf(matrix.snr) else f"{matrix.snr_db:.1f}"


def _place(matrix: MatrixScan, among: Sequence[MatrixScan]) -> str:
    """Returns the layer of a matrix if it is one of several."""
    return f" @{matrix.layer:<2}" if len(among) > 1 and matrix.layer is not None else ""


def _rank(matrices: Sequence[MatrixScan], shape: tuple[int, int]) -> str:
    ranks = sorted(matrix.signal_rank for matrix in matrices)
    return f"{ranks[len(ranks) // 2]} of {min(shape)}" if any(shape) else "–"


def _control(matrices: Sequence[MatrixScan]) -> str:
    ranks = sorted(matrix.control.signal_rank for matrix in matrices if matrix.control is not None)
    return f"{ranks[len(ranks) // 2]} ({ranks[-1]})" if ranks else "–"
