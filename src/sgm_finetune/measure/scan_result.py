"""The result of a scan: plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sgm_finetune.method.snr import NO_SIGNAL_DB, Estimator, ratio_decibels
from sgm_finetune.model.names import kind_of, layer_of


@dataclass(frozen=True)
class Control:
    """What the scan says about a matrix whose entries were shuffled: same values, no structure."""

    signal_rank: int
    snr_db: float


@dataclass(frozen=True)
class MatrixScan:
    """What a scan says about one weight matrix; the numbers as in `SnrStatistics`."""

    name: str
    """Name of the module: the parameter's name without the trailing `.weight`, and `[part]` where the matrix is one
    part of a fused or stacked parameter: `h.0.attn.c_attn[q]`, `layers.0.mlp.experts.gate_up_proj[7.up]`."""
    kind: str
    """The name with every number replaced by `*`; matrices of one kind are compared with each other."""
    layer: int | None
    """First number in the name; None where there is none."""
    shape: tuple[int, int]
    """As stored (a transposed GPT-2 Conv1D included; the numbers do not depend on it). (0, 0) where it is unknown: in
    a published result file, which holds ratios alone; sigma, edge, signal_rank and energy are 0 then."""
    sigma: float
    edge: float
    signal_rank: int
    snr: float
    snr_db: float
    parameter: str
    """The stored parameter that this matrix is, or is a part of, with its `.weight`."""
    energy: float
    """‖W‖²_F, squared units of the weights; SNR/(1 + SNR) of it is signal ("mp")."""
    control: Control | None = None
    """The same matrix with its entries shuffled; None where no control was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite SNR (published formula only) is null."""
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
        """Inverse of `to_dict`. KeyError, TypeError or ValueError where it is something else."""
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
    """What it took; not part of the result, so not in the file: equal weights give equal files."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "estimator": self.estimator,
            "matrices": [matrix.to_dict() for matrix in self.matrices],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scan:
        """Inverse of `to_dict`. KeyError, TypeError or ValueError where it is something else."""
        estimator = values["estimator"]
        if estimator not in ("mp", "spectrum"):
            raise ValueError(f"unknown estimator {estimator!r}")
        return cls(str(values["model"]), estimator, tuple(MatrixScan.from_dict(m) for m in values["matrices"]))


def by_parameter(scan: Scan, model_name: Callable[[str], str] = lambda stored: stored) -> tuple[MatrixScan, ...]:
    """One entry per parameter, in the order of their first parts; what has no parts comes back unchanged.

    The parameters are the stored ones, or those of a model that calls the stored ones by `model_name` and may hold
    several as one: a stack of experts. The parts of one parameter (the q, k and v of a fused matrix; the experts of a
    stack) become one entry that is named like its module: energies of signal and noise summed, and so SNR =
    signal/noise; ranks summed; σ the root mean square over all entries; the largest edge. Under "spectrum", whose ratio
    is none of energies, the SNR is the mean (infinite if one is). Shape: rows added where the parts agree in columns,
    else columns added where they agree in rows, else the first part's.
    """
    groups: dict[str, list[MatrixScan]] = {}
    for matrix in scan.matrices:
        groups.setdefault(model_name(matrix.parameter), []).append(matrix)
    return tuple(_named(parameter, parts, scan.estimator) for parameter, parts in groups.items())


def _named(parameter: str, parts: Sequence[MatrixScan], estimator: Estimator) -> MatrixScan:
    """The entry of one parameter, called as the model calls it."""
    whole = parts[0] if len(parts) == 1 and "[" not in parts[0].name else _united(parts, estimator)
    if parameter == parts[0].parameter and whole is parts[0]:
        return whole
    name = parameter.removesuffix(".weight")
    return replace(whole, name=name, kind=kind_of(name), layer=layer_of(name))


def _united(parts: Sequence[MatrixScan], estimator: Estimator) -> MatrixScan:
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
        shape=_united_shape([part.shape for part in parts]),
        sigma=math.sqrt(sum(n * part.sigma**2 for n, part in zip(sizes, parts, strict=True)) / max(1, sum(sizes))),
        edge=max(part.edge for part in parts),
        signal_rank=sum(part.signal_rank for part in parts),
        snr=snr,
        snr_db=ratio_decibels(snr),
        energy=sum(part.energy for part in parts),
        control=control,
    )


def _summed_snr(parts: Iterable[tuple[float, float]]) -> float:
    """Σ signal / Σ noise of matrices given as (energy, SNR)."""
    pairs = list(parts)
    largest = max(energy for energy, _ in pairs)
    if largest == 0:
        return 0.0
    shares = [(energy / largest, snr) for energy, snr in pairs]  # sums stay finite
    if any(math.isinf(snr) for _, snr in shares):
        return math.inf
    return sum(e * snr / (1 + snr) for e, snr in shares) / sum(e / (1 + snr) for e, snr in shares)


def _ratio(decibels: float) -> float:
    return 0.0 if decibels <= NO_SIGNAL_DB else 10 ** (decibels / 10)


def _united_shape(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    rows, cols = shapes[0]
    if all(shape[1] == cols for shape in shapes):
        return sum(shape[0] for shape in shapes), cols
    if all(shape[0] == rows for shape in shapes):
        return rows, sum(shape[1] for shape in shapes)
    return rows, cols
