"""The result of a scan: plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sgm_finetune.method.snr import Estimator


@dataclass(frozen=True)
class Control:
    """What the scan says about a matrix whose entries were shuffled: same values, no structure."""

    signal_rank: int
    snr_db: float


@dataclass(frozen=True)
class MatrixScan:
    """What a scan says about one weight matrix; the numbers as in `SpectrumStatistics`."""

    name: str
    """Name of the module: the parameter's name without the trailing `.weight`, and `[part]` where the matrix is one
    part of a fused or stacked parameter: `h.0.attn.c_attn[q]`, `layers.0.mlp.experts.gate_up_proj[7.up]`."""
    kind: str
    """The name with every number replaced by `*`; matrices of one kind are compared with each other."""
    layer: int | None
    """First number in the name; None where there is none."""
    shape: tuple[int, int]
    """As stored (a transposed GPT-2 Conv1D included; the numbers do not depend on it)."""
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
