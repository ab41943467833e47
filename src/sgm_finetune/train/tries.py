"""The tries of a sweep, as its folder keeps them. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt


class Validation(BaseModel):
    """One validation of a try."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: PositiveInt
    percent: int = Field(ge=0, le=100)
    """Of the try's steps."""
    loss: float


class Try(BaseModel):
    """One try: its settings, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    number: PositiveInt
    settings: dict[str, str]
    """Key -> the text of its value."""
    state: Literal["complete", "pruned", "failed"]
    validations: tuple[Validation, ...] = ()
    reason: str | None = None
    """Why it was stopped, or failed; None for a complete try."""
    steps: NonNegativeInt = 0
    learning_rate: float | None = None
    """The peak of the training."""
    trainable_parameters: NonNegativeInt | None = None
    seconds: NonNegativeFloat = 0.0

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, the first of equals; a run keeps that checkpoint."""
        return min(self.validations, key=lambda found: found.loss, default=None)

    @property
    def loss(self) -> float | None:
        """The lowest validation loss; None where there is none."""
        return None if self.best is None else self.best.loss

    @property
    def outcome(self) -> str:
        """What came of it, as a line."""
        if self.best is None:
            return f"failed: {self.reason}"
        loss = f"validation loss {self.best.loss:.4f}"
        return f"stopped: {loss}, {self.reason}" if self.state == "pruned" else f"{loss} at step {self.best.step}"


def winner(tries: list[Try]) -> Try | None:
    """The complete try with the lowest validation loss, the first of equals; None if no try is complete."""
    complete = [one for one in tries if one.state == "complete"]
    return min(complete, key=lambda one: one.loss or 0.0, default=None)
