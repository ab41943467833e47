"""The result of a scan, as plain data, and how the parts of a parameter become one entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sgm_finetune.method.decibels import NO_SIGNAL_DB, Estimator, ratio_decibels
from sgm_finetune.model.names import kind_of, layer_of


@dataclass(frozen=True)
class Control:
    """The scan of a matrix with shuffled entries: the same values without structure."""

    signal_rank: int
    snr_db: float


@dataclass(frozen=True)
class MatrixScan:
    """The scan of one weight matrix; `SnrStatistics` defines the numbers."""

    name: str
    """Name of the module: the parameter's name without `.weight`, and with `[part]` for one part of a fused or stacked
    parameter: `h.0.attn.c_attn[q]`, `layers.0.mlp.experts.gate_up_proj[7.up]`."""
    kind: str
    """The name with `*` for every number; matrices of one kind are compared with each other."""
    layer: int | None
    """The first number in the name; None without one."""
    shape: tuple[int, int]
    """As stored, so GPT-2's Conv1D is transposed; the numbers do not depend on it. (0, 0) when it is unknown: published
    result files hold ratios only. Then sigma, edge, signal_rank and energy are 0."""
    sigma: float
    edge: float
    signal_rank: int
    snr: float
    snr_db: float
    parameter: str
    """Name of the stored parameter that this matrix is or is a part of, with its `.weight`."""
    energy: float
    """‖W‖²_F, in squared units of the weights; with "mp" the fraction SNR/(1 + SNR) of it is signal."""
    control: Control | None = None
    """The same matrix with its entries shuffled; None without a control."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite SNR, which only the published formula gives, is null."""
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "shape": list(self.shape),
            "sigma": self.sigma,
            "edge": self.edge,
            "signal_rank": self.signal_rank,
            "snr": self.snr if math.isfinite(self.snr) else None,
            "snr_db": self.snr_db if math.isfinite(self.snr_db) else None,
            "parameter": self.parameter,
            "energy": self.energy,
            **({"control": asdict(self.control)} if self.control is not None else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MatrixScan:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for other values."""
        rows, cols = values["shape"]
        layer, snr, snr_db, control = values["layer"], values["snr"], values["snr_db"], values.get("control")
        return cls(
            name=str(values["name"]),
            kind=str(values["kind"]),
            layer=None if layer is None else int(layer),
            shape=(int(rows), int(cols)),
            sigma=float(values["sigma"]),
            edge=float(values["edge"]),
            signal_rank=int(values["signal_rank"]),
            snr=math.inf if snr is None else float(snr),
            snr_db=math.inf if snr_db is None else float(snr_db),
            parameter=str(values["parameter"]),
            energy=float(values["energy"]),
            control=None if control is None else Control(int(control["signal_rank"]), float(control["snr_db"])),
        )


@dataclass(frozen=True)
class Scan:
    """The scanned matrices of one model, by layer number, then in alphabetical order."""

    model: str
    estimator: Estimator
    matrices: tuple[MatrixScan, ...]
    seconds: float = field(default=0.0, compare=False)
    """How long the scan took. Files do not have it: equal weights give equal files."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "estimator": self.estimator,
            "matrices": [matrix.to_dict() for matrix in self.matrices],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scan:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for other values."""
        estimator = values["estimator"]
        if estimator not in ("mp", "spectrum"):
            raise ValueError(f"unknown estimator {estimator!r}")
        return cls(str(values["model"]), estimator, tuple(MatrixScan.from_dict(m) for m in values["matrices"]))


def by_parameter(scan: Scan, model_name: Callable[[str], str] = lambda stored: stored) -> tuple[MatrixScan, ...]:
    """One entry per parameter, in the order of their first parts; a matrix without parts stays as it is.

    `model_name` maps the name of a stored parameter to that of the model's, which may combine several stored ones: a
    stack of experts. The parts of one parameter (the q, k and v of a fused matrix, the experts of a stack) become one
    entry with the name of its module:

    - energies of signal and of noise are summed, and SNR = signal/noise; with "spectrum", whose ratio is not one of
      energies, the SNR is the mean (infinite if one part's is);
    - signal ranks are summed; σ is the root mean square over all entries; the edge is the largest;
    - rows are summed if the parts have equally many columns, else columns if they have equally many rows; else the
      shape is the first part's.
    """
    groups: dict[str, list[MatrixScan]] = {}
    for matrix in scan.matrices:
        groups.setdefault(model_name(matrix.parameter), []).append(matrix)
    return tuple(_parameter_scan(parameter, parts, scan.estimator) for parameter, parts in groups.items())


def _parameter_scan(parameter: str, parts: Sequence[MatrixScan], estimator: Estimator) -> MatrixScan:
    """The entry of one parameter, under the model's name."""
    is_whole = len(parts) == 1 and "[" not in parts[0].name
    if is_whole and parameter == parts[0].parameter:
        return parts[0]
    combined = parts[0] if is_whole else _combine(parts, estimator)
    name = parameter.removesuffix(".weight")
    return replace(combined, name=name, kind=kind_of(name), layer=layer_of(name))


def _combine(parts: Sequence[MatrixScan], estimator: Estimator) -> MatrixScan:
    """One entry for all parts of a parameter (`by_parameter`), under the first part's name."""
    first = parts[0]
    sizes = [rows * cols for rows, cols in (part.shape for part in parts)]
    snr = _summed_snr((part.energy, part.snr) for part in parts)
    if estimator == "spectrum":
        snr = sum(part.snr for part in parts) / len(parts)
    control = None
    if all(part.control is not None for part in parts):
        controls = [(part.energy, part.control) for part in parts if part.control is not None]
        shuffled = _summed_snr((energy, _ratio(control.snr_db)) for energy, control in controls)
        control = Control(sum(control.signal_rank for _, control in controls), ratio_decibels(shuffled))
    return replace(
        first,
        shape=_combined_shape([part.shape for part in parts]),
        sigma=math.sqrt(sum(n * part.sigma**2 for n, part in zip(sizes, parts, strict=True)) / max(1, sum(sizes))),
        edge=max(part.edge for part in parts),
        signal_rank=sum(part.signal_rank for part in parts),
        snr=snr,
        snr_db=ratio_decibels(snr),
        energy=sum(part.energy for part in parts),
        control=control,
    )


def _summed_snr(parts: Iterable[tuple[float, float]]) -> float:
    """Σ signal / Σ noise of matrices that are given as (energy, SNR)."""
    pairs = list(parts)
    largest = max(energy for energy, _ in pairs)
    if largest == 0:
        return 0.0
    scaled = [(energy / largest, snr) for energy, snr in pairs]  # keeps the sums finite
    if any(math.isinf(snr) for _, snr in scaled):
        return math.inf
    return sum(e * snr / (1 + snr) for e, snr in scaled) / sum(e / (1 + snr) for e, snr in scaled)


def _ratio(decibels: float) -> float:
    """The SNR for a value in dB; the value without signal gives 0."""
    return 0.0 if decibels <= NO_SIGNAL_DB else 10 ** (decibels / 10)


def _combined_shape(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    rows, cols = shapes[0]
    if all(shape[1] == cols for shape in shapes):
        return sum(shape[0] for shape in shapes), cols
    if all(shape[0] == rows for shape in shapes):
        return rows, sum(shape[1] for shape in shapes)
    return rows, cols
