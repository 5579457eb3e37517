"""What a training step minimises: cross-entropy alone, or with consistency between two noisy looks at the same image.

PACE (Ni et al., arXiv 2409.17137, NeurIPS 2024) multiplies the outputs of adapters by noise and penalises the
difference of two noisy passes, ‖logits₁ − logits₂‖²; the penalty here is that one, and so are the ideas to compare with
the last epoch and to do it only now and then. The noise here sits on v, between A and B; see `modulation_noise.py`.
Shapes: `B` images of a batch, `K` classes, `N` images of the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) ↦ the mean over the images."""


class Batch(NamedTuple):
    """What a step sees."""

    images: Tensor
    """(B, C, H, W)."""
    targets: Tensor
    """(B,) classes, or (B, K) after mixup."""
    rows: Tensor | None
    """(B,) indices into the data set, if the loader yields them."""
    epoch: int
    weight: float = 1.0
    """Of its loss in the update."""


class Outcome(NamedTuple):
    """What a step has computed."""

    loss: Tensor
    logits: Tensor
    """(B, K) in fp32, of the first look at each image."""
    passes: int
    """Images that went through the model."""


class Objective(Protocol):
    """From a batch to what is to be minimised; some count batches, so each is for one `fit`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class Stateless:
    """Remembers nothing from batch to batch."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Plain(Stateless):
    """The cross-entropy of one look at each image."""

    loss_function: LossFunction = F.cross_entropy

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """One forward of the batch."""
        logits = model(batch.images).float()
        return Outcome(self.loss_function(logits, batch.targets), logits, len(logits))


@dataclass(frozen=True)
class Twice(Stateless):
    """Two noisy looks at the first share · B images, in one forward: their cross-entropy and their difference.

    loss = mean over all images of the mean cross-entropy of their looks + λ · mean over the images looked at twice of
    ‖logits₁ − logits₂‖².
    """

    loss_function: LossFunction
    weight: float
    """λ."""
    share: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """One forward of the batch and the copies after it."""
        n = len(batch.images)
        twice = max(1, round(self.share * n))
        logits = model(torch.cat([batch.images, batch.images[:twice]])).float()
        first, second = logits[:n], logits[n:]
        looks = ((first[:twice], 0, 0.5), (second, 0, 0.5), (first[twice:], twice, 1.0))
        loss = squared_distance(first[:twice], second).mean() * self.weight
        for part, start, factor in looks:
            if len(part):
                targets = batch.targets[start : start + len(part)]
                loss = loss + self.loss_function(part, targets) * (factor * len(part) / n)
        return Outcome(loss, first, len(logits))


class Every:
    """One objective in the first of every `period` batches, counted over all epochs, and another in between."""

    def __init__(self, period: int, first: Objective, between: Objective) -> None:
        self.period, self.first, self.between = period, first, between
        self.batches = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """What the one whose turn it is computes."""
        chosen = self.between if self.batches % self.period else self.first
        self.batches += 1
        return chosen(model, batch)

    def state(self) -> dict[str, Tensor]:
        """The count of batches."""
        return {"batches": torch.tensor(self.batches)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Count on from there."""
        self.batches = int(state["batches"])


class Previous:
    """One look at each image, compared with the logits that it had in the epoch before.

    loss = mean cross-entropy + λ · mean of ‖logits − logits of the last epoch‖² over the images of the batch that have
    any; in the first epoch none has.

    Args:
        weight: λ.
        images: N.
        gather: a tensor of one process → those of all, one after the other, as the order of each epoch is another.
    """

    def __init__(
        self, loss_function: LossFunction, weight: float, *, images: int, gather: Callable[[Tensor], Any]
    ) -> None:
        self.loss_function, self.weight, self.images, self.gather = loss_function, weight, images, gather
        self.epoch = 0
        self.last: tuple[Tensor, Tensor] | None = None
        """(N, K): the logits of the last epoch, and (N,): 1 where there are any, else 0."""
        self.seen: list[tuple[Tensor, Tensor]] = []
        """(rows, logits) of the batches of this epoch and process."""

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """One forward of the batch."""
        if batch.rows is None:
            raise ValueError("The loader yields no indices of its images: make it with `with_rows=True`.")
        if batch.epoch != self.epoch:
            self._turn_over(batch.epoch)
        logits = model(batch.images).float()
        loss = self.loss_function(logits, batch.targets)
        if self.last is not None:
            before, known = (table[batch.rows] for table in self.last)
            distances = squared_distance(logits, before) * known
            loss = loss + self.weight * distances.sum() / known.sum().clamp(min=1)
        self.seen.append((batch.rows, logits.detach()))
        return Outcome(loss, logits, len(logits))

    def state(self) -> dict[str, Tensor]:
        """The logits of the last epoch, and those of this one so far."""
        found = {"epoch": torch.tensor(self.epoch)}
        if self.last is not None:
            found |= {"last_logits": self.last[0], "last_known": self.last[1]}
        if self.seen:
            rows, logits = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
            found |= {"seen_rows": rows, "seen_logits": logits}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with them."""
        self.epoch = int(state["epoch"])
        self.last = (state["last_logits"], state["last_known"]) if "last_logits" in state else None
        self.seen = [(state["seen_rows"], state["seen_logits"])] if "seen_rows" in state else []

    def _turn_over(self, epoch: int) -> None:
        """The logits of the epoch that is over, of all processes, become those to compare with."""
        rows, logits = (self.gather(torch.cat(parts)) for parts in zip(*self.seen, strict=True))
        table, known = logits.new_zeros(self.images, logits.shape[1]), logits.new_zeros(self.images)
        table[rows], known[rows] = logits, 1
        self.last, self.seen, self.epoch = (table, known), [], epoch


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """‖first − second‖² of each image: (B, K) → (B,)."""
    return (first - second).square().sum(-1)
