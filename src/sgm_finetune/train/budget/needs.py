"""What a run needs: memory in each phase, disk space and time, as numbers (docs/estimate.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PHASES = {
    "load": "loading",
    "test": "testing the untouched model",
    "probe": "probing",
    "step": "training",
    "validate": "validating",
    "test after": "testing",
}
"""Name of each phase, as shown to the user."""


@dataclass(frozen=True)
class Estimate:
    """Predicted bytes and seconds of one process.

    The parts (`weights_bytes` to `logits_bytes`) are those of a training step; `phases` holds the bytes of the whole
    process in each phase.
    """

    device: str
    peak_bytes: int
    peak_phase: str
    phases: dict[str, int]
    process_bytes: int
    """Libraries and data, measured when the estimate is made (0 on a GPU)."""
    weights_bytes: int
    """Those that are in memory at one time."""
    host_bytes: int
    """Bytes of the base in the host's memory, with `model.residence=host`."""
    mapped_bytes: int
    """Bytes of `weights_bytes` that are pages of files, with `model.residence=disk`; the system may take them back."""
    store_bytes: int
    """Bytes of the files that hold the base's blocks in the form in which they compute, if its own files do not."""
    read_bytes: int
    """Bytes of the base that a step reads from the disk, 0 if the system's cache can keep its files; or those that it
    copies from the host's memory to the GPU."""
    read_rate: float
    """Bytes a second that the disk reads or the GPU copies, measured or assumed; 0 if no step reads."""
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    probe_bytes: int
    """Activations and sketches of the probe."""
    disk_bytes: int
    seconds: dict[str, float]
    trainable_parameters: int
    micro_batch_size: int
    longest: int
    """Number of tokens of the longest training example."""
    steps: int

    @property
    def firm_phase(self) -> str:
        """The phase that needs the most memory that the system cannot take back. Loading does not count: it holds
        pages of files, which the system can drop."""
        return max((phase for phase in self.phases if phase != "load"), key=self.phases.__getitem__)

    @property
    def firm_bytes(self) -> int:
        return self.phases[self.firm_phase]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": sum(self.seconds.values())}
