"""How far training has come and what it gave so far, as numbers: what a stopped run must know to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nolora_vision.training.tally import Tally


@dataclass
class Fit:
    """What training gave: the weights of its best epoch by validation, or of its last one, and its history."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_val_top1_percent: float = -1.0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    train_seconds: float = 0.0
    images_seen: int = 0
    """Of the data set."""
    forward_images: int = 0
    """Images that went through the model in training: more than it has seen where it looks at some twice."""
    epochs: int = 0
    """Epochs that are done, validation included."""
    batches: int = 0
    """Batches that are done of the epoch after them, by each process."""
    updates: int = 0
    """Optimizer steps."""
    warnings: list[str] = field(default_factory=list)
    """What was odd about it, said once."""
    resumed_at: list[int] = field(default_factory=list)
    """The optimizer steps at which the run was stopped and went on."""

    def keep(self, val_top1_percent: float, state: dict[str, Tensor]) -> None:
        """Take the weights of the epoch that is being ended as the best ones so far."""
        self.best_epoch, self.best_val_top1_percent, self.best_state = self.epochs + 1, val_top1_percent, state

    def warn(self, text: str, listener: Any) -> None:
        """Note what is odd, and tell it, unless something was told already."""
        if not self.warnings:
            self.warnings.append(text)
            listener.warn(text)

    def end_epoch(self, tally: Tally, row: dict[str, float]) -> None:
        """Count an epoch whose batches are done, and what is said of it."""
        self.train_seconds += tally.seconds
        self.images_seen += tally.images
        self.forward_images += tally.passes
        self.epochs, self.batches = self.epochs + 1, 0
        self.history.append({**row, "train_seconds": tally.seconds, "images_per_s": tally.images / tally.seconds})

    @property
    def images_per_s(self) -> float:
        """Training images per second, validation apart."""
        return self.images_seen / self.train_seconds if self.train_seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """All but the tensors."""
        return {name: value for name, value in vars(self).items() if name != "best_state"}

    @classmethod
    def of(cls, facts: Mapping[str, Any], best_state: dict[str, Tensor]) -> Fit:
        """From `facts()` and the tensors."""
        return cls(**{**facts, "best_state": best_state})
