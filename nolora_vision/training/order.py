"""Order and augmentation of training images: functions of seed, epoch and image alone, whoever loads them.

However many worker processes or machines load, whatever a method draws for its own initialisation, and wherever a run
goes on after it was stopped: the same seed gives the same batches, bit for bit. accelerate's seedable sampler does this
for the order alone, and cannot begin in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils.data import Sampler

ORDER, AUGMENTATION = 0, 1
"""What the random numbers are for."""
_numpys: Any = mtrand  # whose stubs lack the two functions
_FOR_NUMPY = np.random.MT19937()
"""Seeded anew for each image."""


class SeededOrder(Sampler[int]):
    """All images in a new order in each epoch; yields epoch · images + index, so that a worker knows the epoch, too."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0
        self.skip = {0: 0}
        """How many images of an epoch are done already."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(number_of(self.seed, ORDER, self.epoch))
        for index in torch.randperm(self.images, generator=generator).tolist()[self.skip.get(self.epoch, 0) :]:
            yield self.epoch * self.images + index


def number_of(*facts: int) -> int:
    """A seed of 32 bits from several numbers, well mixed: neighbours give unrelated ones."""
    return int(np.random.SeedSequence(facts).generate_state(1)[0])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers on the processor from this seed; afterwards they are as before."""
    before = random.getstate(), _numpys.get_bit_generator(), torch.get_rng_state()
    random.seed(seed)
    _numpys.set_bit_generator(_FOR_NUMPY)  # copying numpy's state there and back would cost 70 µs for each image
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        _numpys.set_bit_generator(before[1])
        torch.set_rng_state(before[2])


def start_epoch(batches: Any, epoch: int, *, skip: int = 0) -> int:
    """Tell a loader, accelerate's or torch's, which epoch comes next, if it wants to know.

    Returns:
        How many of its batches those images are that were seen; their size may have been another one then.

    Args:
        skip: images of it that were seen before the run was stopped, by all processes.
    """
    order = _order_of(batches)
    if order is not None:
        order.skip = {epoch: skip}
    for owner in (batches, getattr(batches, "sampler", None)):
        if owner is not None and hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            break
    return -(-skip // (getattr(batches, "total_batch_size", None) or batches.batch_size)) if skip else 0


def weight_in_update(batch: int, batches: int, steps: int) -> float:
    """What a batch counts beside those of a full update: the last update of an epoch may have fewer of them.

    Args:
        batch: counted from 0.
        batches: of the epoch.
        steps: batches of an update.
    """
    return steps / min(steps, batches - batch // steps * steps)


def _order_of(batches: Any) -> SeededOrder | None:
    """The order that a loader takes its images in, under accelerate's wrappers; None if it has another."""
    sampler = getattr(batches, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, SeededOrder):
        sampler = getattr(sampler, "batch_sampler" if hasattr(sampler, "batch_sampler") else "sampler", None)
    return sampler
