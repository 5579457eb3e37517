"""One split of a dataset as it comes: images that are decoded when asked for, and their labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Table:
    """Images and labels of one split; an image is decoded when it is asked for. It can be pickled, for workers."""

    image: Callable[[int], Image.Image]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    in_memory: bool = False
    """Whether all images are decoded already."""
    name: str = "train"
    """What the dataset calls this split."""
    encoded: Callable[[int], bytes | None] | None = None
    """The file of an image as it is stored, JPEG or another; None where there is none."""

    @property
    def fingerprint(self) -> str:
        """Of the labels in their order and the class names: the same for every form and place of the same data."""
        facts = json.dumps([list(map(int, self.labels)), self.class_names])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]
