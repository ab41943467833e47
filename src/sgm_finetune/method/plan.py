"""The plan as plain data: what is trained, what is shared, and the numbers behind it (docs/method.md section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sgm_finetune.method.sides import Sharing, Side

if TYPE_CHECKING:
    from torch import Tensor

    from sgm_finetune.method.subspace import Sketch
else:
    Tensor = Sketch = Any  # a plan is data: it is read and shown without torch


@dataclass(frozen=True)
class PlanSettings:
    """The choices that a plan follows. Meanings and ranges are those of the configuration keys of the same names."""

    rank: int = 0
    """0 with kind "full", as is alpha."""
    alpha: float = 0.0
    dropout: float = 0.0
    scope: Literal["activation", "layers", "pool"] = "activation"
    criterion: Literal["subspace", "cosine", "snr"] = "subspace"
    side: Literal["auto", "input", "output", "none"] = "auto"
    threshold: float = 0.85
    snr_tolerance_db: float | None = None
    max_group_size: int | None = None
    top_fraction: float | None = None
    snr_threshold: float | None = None
    by: Literal["snr", "depth", "random", "gradient"] = "snr"
    seed: int = 0
    """Seed of a random selection."""
    kind: Literal["lora", "full"] = "lora"
    """Whether the selected matrices get a low-rank update, or are trained whole. The settings of rank and merging mean
    nothing then."""
    also: tuple[Literal["norms", "embeddings", "head"], ...] = ()
    """With kind "full": what is trained beside the selected matrices."""


@dataclass(frozen=True)
class MatrixNumbers:
    """The measurements of one weight matrix. `halves` is None without a probe."""

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
    """Number of experts in a stack; None: a linear layer. `shape` is that of one expert; `halves` are sketches of all
    experts as one matrix (eq. 9b)."""
    gradient_energy: float | None = None
    """Estimate of the squared norm of the probe's gradient (eq. 10); None without a probe."""

    @property
    def num_entries(self) -> int:
        """Of all experts in a stack."""
        return self.shape[0] * self.shape[1] * (self.num_experts or 1)


@dataclass(frozen=True)
class Energy:
    """Shares of held-out gradient energy that a basis of `rank` directions keeps, fitted to the other half (eq. 11)."""

    input: float
    output: float


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix of a plan: its numbers, whether it is trained, and its group (None: its own two factors)."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    """Rows (d_out) and columns (d_in)."""
    selected: bool
    group: str | None = None
    start: Literal["spectral", "random"] = "random"
    """Where lora_A of a matrix without a group starts: at the spectrum of its gradient (in a stack: of the gradients of
    all experts), or at PEFT's default."""
    snr: float | None = None
    """Signal energy / noise energy; None: not scanned, or infinite under the published estimator."""
    snr_db: float | None = None
    """The same in decibels; None also without any signal (snr 0)."""
    signal_rank: int | None = None
    gradient_energy: float | None = None
    """Estimate of the squared norm of the probe's gradient (eq. 10)."""
    cosine_other_half: float | None = None
    """Cosine of the gradient with itself on the other half of the batches (eq. 13b): the noise ceiling."""
    kept_own: Energy | None = None
    """What a basis of its own keeps."""
    kept_shared: float | None = None
    """What the group's basis keeps on the group's side."""
    num_experts: int | None = None
    """Number of experts in a stack, each with two factors of its own; `shape` is that of one. None: a linear layer."""


@dataclass(frozen=True)
class Group:
    """Matrices that share lora_A ("input"), lora_B ("output"), or both: a pool, in which each weights the r directions
    by codes of its own."""

    name: str
    kind: str
    side: Sharing
    members: tuple[str, ...]
    start: Literal["spectral", "random"] = "spectral"
    """Where the shared factor starts: at the spectrum of the group's gradients, or at PEFT's default initialisation."""
    similarity: float | None = None
    """Smallest similarity of two members, under the plan's criterion."""
    joint_retention: float | None = None
    """Smallest (energy that the group's basis keeps) / (energy that the own basis keeps) of a member, held out."""
    snr_spread_db: float | None = None
    """Largest minus smallest SNR of the members."""


@dataclass(frozen=True)
class KindNumbers:
    """What the selected layers of one kind have in common.

    Matrices that read the same activations have a joint kind such as `layers.*.attention.query+key`.
    """

    kind: str
    num_layers: int
    side: Sharing | None
    """The side on which they may merge; None: they do not merge in this scope."""
    retention_input: float | None = None
    retention_output: float | None = None
    """Mean of R over all pairs of layers (eq. 14)."""
    retention_all_input: float | None = None
    retention_all_output: float | None = None
    """Energy that one basis for all layers of the kind keeps / energy that own bases keep, the mean over layers
    (eq. 14b). `auto` takes the side with the larger value."""
    cosine_mean: float | None = None
    cosine_max: float | None = None
    cosine_other_half: float | None = None
    """Mean cosine of a layer with itself on the other half of the batches: the value of perfect agreement (eq. 13b)."""


@dataclass(frozen=True)
class Similarity:
    """How well every two matrices agree, as the grouping read it."""

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}

    kind: str
    """As in `KindNumbers`."""
    side: Side | None
    """Side of the gradients (eq. 14); None: cosines of the whole gradients (eq. 13b)."""
    members: tuple[str, ...]
    values: Tensor
    """(n x n), float64, symmetric; the diagonal is 1."""


@dataclass(frozen=True)
class Plan:
    """A whole plan.

    `starts` maps the name of a group, or of a matrix without a group, to its basis (d x rank). It is stored beside the
    JSON in plan.safetensors. `similarities` are for figures and are not stored.
    """

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
        """The matrices that are trained, in order."""
        return tuple(matrix for matrix in self.matrices if matrix.selected)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Rows and columns of the matrix `name`. Raises StopIteration if the plan does not hold it."""
        return next(matrix.shape for matrix in self.matrices if matrix.name == name)
