"""What an epoch of training adds up: loss, top-1, images; on a GPU read a step late, so that it need not wait."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from nolora_vision.training.consistency import Outcome
from nolora_vision.training.errors import NotFiniteError


class Listener(Protocol):
    """Who is told of each step."""

    def step(self, *, loss: float, top1: float, images_per_s: float) -> None: ...


class Numbers:
    """Numbers of a step on their way from the device: a read waits for that step, and for nothing queued since."""

    def __init__(self, *numbers: Tensor) -> None:
        together = torch.stack([number.detach().float() for number in numbers])
        self.values = together.to("cpu", non_blocking=together.is_cuda)
        self.there = torch.cuda.Event() if together.is_cuda else None
        if self.there is not None:
            self.there.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self.there is not None:
            self.there.synchronize()
        return self.values.tolist()


class Tally:
    """One epoch's sums.

    Args:
        epoch: counted from 0.
        processes: each of them sees as many images.
        sums: of an epoch that was stopped in the middle, to go on with.
    """

    SUMS = ("steps", "read", "passes", "total", "right")

    def __init__(
        self, listener: Listener, *, epoch: int, processes: int, sums: Mapping[str, float] | None = None
    ) -> None:
        self.listener, self.epoch, self.processes = listener, epoch, processes
        self.started, self.ended = time.perf_counter(), 0.0
        self.steps = self.read = self.passes = 0
        self.total = self.right = 0.0
        self.pending: tuple[Numbers, int, str] | None = None
        if sums:
            self.started -= sums["seconds"]
            vars(self).update({name: sums[name] for name in self.SUMS})

    def sums(self) -> dict[str, float]:
        """What another tally of the same epoch can go on with, exactly; reads what is still on its way."""
        self.finish()
        return {**{name: getattr(self, name) for name in self.SUMS}, "seconds": self.seconds}

    def add(
        self, outcome: Outcome, labels: Tensor, optimizer: torch.optim.Optimizer, norm: Tensor | None = None
    ) -> None:
        """Note a step whose work is queued, after reading the one before; where nothing is queued, read it, too.

        Args:
            norm: of the gradient, where the step updates the weights.

        Raises:
            NotFiniteError: if the loss or the gradient of what was read is not finite.
        """
        right = (outcome.logits.detach().argmax(-1) == labels).sum()
        now = Numbers(outcome.loss, right, *([] if norm is None else [norm])), len(labels), rates_of(optimizer)
        self.finish()
        self.pending = now
        self.passes += outcome.passes * self.processes
        if now[0].there is None:
            self.finish()

    def finish(self) -> None:
        """Read what is still on its way.

        Raises:
            NotFiniteError: if its loss or its gradient is not finite.
        """
        if self.pending is None:
            return
        (numbers, n, rates), self.pending = self.pending, None
        loss, right, *norm = numbers.read()
        self.steps += 1
        self.total, self.right, self.read = self.total + loss * n, self.right + right, self.read + n
        for of, value in [("loss", loss), *(("gradient", value) for value in norm)]:
            if not math.isfinite(value):
                raise NotFiniteError(of, value, step=self.steps, epoch=self.epoch + 1, rates=rates)
        self.listener.step(loss=self.loss, top1=self.top1_percent, images_per_s=self.images / self.seconds)

    @property
    def images(self) -> int:
        """Images of the data set seen so far, by all processes."""
        return self.read * self.processes

    @property
    def loss(self) -> float:
        """Mean so far, of this process."""
        return self.total / self.read

    @property
    def top1_percent(self) -> float:
        """So far, of this process."""
        return 100 * self.right / self.read

    @property
    def seconds(self) -> float:
        """Since the epoch began, until its last batch was read."""
        return (self.ended or time.perf_counter()) - self.started

    def end(self) -> None:
        """The epoch's batches are done: what comes now is not of its time.

        Raises:
            NotFiniteError: if the last loss or gradient is not finite.
        """
        self.finish()
        self.ended = time.perf_counter()


def rates_of(optimizer: torch.optim.Optimizer, *, highest: bool = False) -> str:
    """The learning rate of each group, now or the highest of its schedule, in words."""
    rates = [g.get("initial_lr", g["lr"]) if highest else g["lr"] for g in optimizer.param_groups]
    names = [g.get("name", i) for i, g in enumerate(optimizer.param_groups)]
    return ", ".join(f"{name} {rate:.2g}" for name, rate in zip(names, rates, strict=True))
