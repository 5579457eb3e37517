"""RunError: what a user can mend, said in one message without a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class RunError(Exception):
    """A run that cannot start or go on, with what was wrong, what was got, and what to do."""


class NotFiniteError(RunError):
    """A step of training whose loss or gradient is NaN or infinite.

    Args:
        of: loss or gradient.
        value: what it is.
        step, epoch: counted from 1.
        rates: learning rates of its groups.
    """

    def __init__(self, of: str, value: float, *, step: int, epoch: int, rates: str) -> None:
        super().__init__()
        self.of, self.value, self.step, self.epoch, self.rates = of, value, step, epoch, rates
        self.where: str | None = None
        """The layer, in words."""
        self.fit: Any = None
        """How far training was, a Fit."""
        self.weights_kept = False
        """Whether the weights in memory are still those from before that step."""
        self.kept: str | None = None
        """What is left of the run, in words."""
        self.told_by_main = False
        """Whether another process says it."""

    def __str__(self) -> str:
        where = "" if self.where is None else f" {self.where[0].upper()}{self.where[1:]}."
        kept = "" if self.kept is None else f" {self.kept}"
        return (
            f"The {self.of} is {self.value} at step {self.step} of epoch {self.epoch} (learning rates: {self.rates})."
            f"{where} Try a smaller --lr or --head-lr, --clip-grad, or --amp-dtype bfloat16 instead of float16.{kept}"
        )


LEAVE_OUT = "Mend it, or leave all such images out: --on-bad-image skip."


class ImageError(RunError):
    """An image that cannot be read, and which it is."""

    def __init__(self, message: str) -> None:
        message = message.rpartition("ImageError: ")[2].strip()  # a loader's process hands its traceback over with it
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop and can go on."""

    def __init__(self, number: int, folder: Path, *, saved: bool = True) -> None:
        super().__init__()
        self.number, self.folder, self.saved = number, folder, saved
