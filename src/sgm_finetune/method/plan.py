"""The plan as plain data: what is trained, what is shared, and every number that led there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from sgm_finetune.method.subspace import Side, Sketch


@dataclass(frozen=True)
class PlanSettings:
    """The choices a plan follows; meanings and ranges as the configuration keys of the same names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    scope: Literal["activation", "layers"] = "activation"
    criterion: Literal["subspace", "cosine", "snr"] = "subspace"
    side: Literal["auto", "input", "output", "none"] = "auto"
    threshold: float = 0.85
    snr_tolerance_db: float | None = None
    max_group_size: int | None = None
    top_fraction: float | None = None
    snr_threshold: float | None = None
    prefer_depth: bool = False


@dataclass(frozen=True)
class MatrixNumbers:
    """What was measured on one weight matrix; `halves` is None where the probe did not run."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    snr: float | None
    snr_db: float | None
    signal_rank: int | None
    halves: tuple[Sketch, Sketch] | None = None
    activation: str | None = None
    """Name of the first matrix that reads the same activations."""
    num_experts: int | None = None
    """Of a stack of experts, whose `shape` is that of one; `halves` are sketches of the one matrix that they make."""


@dataclass(frozen=True)
class Energy:
    """Shares of held-out gradient energy kept by a basis of `rank` directions, fitted on the other half (eq. 11)."""

    input: float
    output: float


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix: its numbers, whether it is trained, and its group (None: its own two factors)."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    """Rows (d_out) and columns (d_in)."""
    selected: bool
    group: str | None = None
    start: Literal["spectral", "random"] = "random"
    """Where lora_A of a matrix without a group starts: its own gradient's spectrum (of a stack of experts: the one of
    all of them), or PEFT's default."""
    snr: float | None = None
    """Signal energy / noise energy; null: not scanned, or infinite under the published estimator."""
    snr_db: float | None = None
    """The same in decibels; null also where there is no signal at all (snr 0)."""
    signal_rank: int | None = None
    gradient_energy: float | None = None
    """Estimate of the squared norm of the probe's gradient (eq. 10)."""
    cosine_other_half: float | None = None
    """Cosine of the gradient with itself on the other half of the batches (eq. 13b): the noise ceiling."""
    kept_own: Energy | None = None
    """By a basis of its own."""
    kept_shared: float | None = None
    """By the group's basis, on the group's side."""
    num_experts: int | None = None
    """Of a stack of experts, each with its own two factors; `shape` is that of one. null: a linear layer."""


@dataclass(frozen=True)
class Group:
    """Matrices that share one factor: lora_A on the input side, lora_B on the output side."""

    name: str
    kind: str
    side: Side
    members: tuple[str, ...]
    start: Literal["spectral", "random"] = "spectral"
    """Where the shared factor starts: the group's gradient spectrum, or PEFT's default initialisation."""
    similarity: float | None = None
    """Smallest pairwise similarity within, under the plan's criterion."""
    joint_retention: float | None = None
    """Smallest, over members, of (energy the group's basis keeps) / (energy the own basis keeps), held out."""
    snr_spread_db: float | None = None


@dataclass(frozen=True)
class KindNumbers:
    """What the selected layers of one kind have in common, or the matrices that read the same activations (of the kind
    `layers.*.attention.query+key`); means over all pairs of them."""

    kind: str
    num_layers: int
    side: Side | None
    """The side on which they may merge (None: they do not, in this scope)."""
    retention_input: float | None = None
    retention_output: float | None = None
    """Of eq. 14, the mean over all pairs of layers."""
    retention_all_input: float | None = None
    retention_all_output: float | None = None
    """Energy kept by one basis for all the kind's layers / by own bases, the mean over layers (eq. 14b); `auto` takes
    the larger side."""
    cosine_mean: float | None = None
    cosine_max: float | None = None
    cosine_other_half: float | None = None
    """Of each layer with itself on other data: what perfect agreement would measure."""


@dataclass(frozen=True)
class Similarity:
    """What the grouping saw: of every two matrices how well they agree."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}

    kind: str
    """As in `KindNumbers`."""
    side: Side | None
    """Of the gradients (eq. 14); None: cosines of the whole gradients (eq. 13b)."""
    members: tuple[str, ...]
    values: Tensor
    """(n x n), float64, symmetric; the diagonal is 1."""


@dataclass(frozen=True)
class Plan:
    """A whole plan. `starts` (name of a group, or of a matrix without one -> d x rank basis) travels beside the JSON
    in plan.safetensors; `similarities` are for pictures and no part of the file."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True, "extra": "forbid"}

    model: str
    settings: PlanSettings
    matrices: tuple[PlannedMatrix, ...]
    groups: tuple[Group, ...] = ()
    kinds: tuple[KindNumbers, ...] = ()
    estimator: str | None = None
    format: Literal["sgm-plan/1"] = "sgm-plan/1"
    starts: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    similarities: tuple[Similarity, ...] = field(default=(), repr=False, compare=False)

    @property
    def selected(self) -> tuple[PlannedMatrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.selected)

    def shape_of(self, name: str) -> tuple[int, int]:
        return next(matrix.shape for matrix in self.matrices if matrix.name == name)
