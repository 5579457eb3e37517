"""Splits, subsets, transforms and loaders: from a dataset's name to batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from nolora_vision.training.errors import RunError
from nolora_vision.training.image_cache import ImageCache
from nolora_vision.training.sources import Table, load_tables

SPLIT_SEED = 0
"""Validation splits and evaluation subsets are the same for every run, whatever its seed."""
TEST_SHARE = 0.2
"""Of a dataset that comes as one heap."""


@dataclass(frozen=True)
class Split:
    """Rows of a table."""

    table: Table
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Class of each row."""
        return np.asarray(self.table.labels)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class ImageData:
    """A dataset ready to use: three splits without overlap, class names, and what it is."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    about: Mapping[str, Any]


def load_data(
    name: str,
    *,
    seed: int = 0,
    val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    revision: str | None = None,
) -> ImageData:
    """Load a dataset and split it. Splits are fixed; only the training subset depends on the seed.

    Raises:
        RunError: if it cannot be loaded, or a split is empty.
    """
    tables, about = load_tables(name, image_key=image_key, label_key=label_key, revision=revision)
    splits, notes = split_tables(tables, val_split)
    train = subset(splits["train"], max_train_samples, seed)
    val, test = (subset(splits[split], max_eval_samples, SPLIT_SEED) for split in ("val", "test"))
    for split, rows in (("training", train), ("validation", val), ("test", test)):
        if not len(rows):
            raise RunError(f"The {split} split of {name} is empty. Check the dataset, or choose another --val-split.")
    sizes = {"train_images": len(train), "val_images": len(val), "test_images": len(test)}
    names = tables["train"].class_names
    about = {**about, **sizes, "num_classes": len(names), "splits": notes}
    return ImageData(train, val, test, names, about)


def split_tables(tables: Mapping[str, Table], val_split: float) -> tuple[dict[str, Split], dict[str, str]]:
    """Train, validation and test rows, and where each comes from; what is lacking is taken from the training rows."""
    splits = {name: Split(table, np.arange(len(table.labels))) for name, table in tables.items()}
    notes = {name: "the dataset's own" for name in splits}
    if "test" not in splits and "val" in splits:
        splits["test"], notes["test"] = splits.pop("val"), "the dataset's validation split"
        notes.pop("val")
    for name, share in (("test", TEST_SHARE), ("val", val_split)):
        if name not in splits:
            splits["train"], splits[name] = hold_out(splits["train"], share)
            notes[name] = f"{share:.0%} of the training images, by class, seed {SPLIT_SEED}"
    return splits, notes


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """Divide the rows of each class: (kept, held out)."""
    random = np.random.default_rng(SPLIT_SEED)
    held = []
    for label in np.unique(split.labels):
        members = random.permutation(split.rows[split.labels == label])
        held.append(members[: round(len(members) * share)])
    out = np.sort(np.concatenate(held)) if held else split.rows[:0]
    return Split(split.table, np.setdiff1d(split.rows, out)), Split(split.table, out)


def subset(split: Split, most: int | None, seed: int) -> Split:
    """At most so many rows, drawn by the seed."""
    if most is None or most >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(split.rows)[:most]
    return Split(split.table, np.sort(rows))


class TransformedImages(Dataset[tuple[Tensor, int] | tuple[Tensor, int, int]]):
    """A split with a transform: index → image (C, H, W) and class, and the index if it is asked for.

    With a cache the numbers that come out are the same, bit for bit: before augmentation whole decoded images are kept
    and never smaller ones, and for evaluation, where nothing is random, the images as they are before normalisation.

    Args:
        before: what happens to an image before it is kept.
        after: what happens to it each time.
    """

    def __init__(
        self, split: Split, before: Any, after: Any, cache: ImageCache | None = None, *, with_rows: bool = False
    ) -> None:
        self.split, self.before, self.after, self.cache, self.with_rows = split, before, after, cache, with_rows

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        row = int(self.split.rows[index])

        def make() -> Image.Image:
            return self.before(self.split.table.image(row))

        image = make() if self.cache is None else self.cache.image(index, make)
        label = int(self.split.table.labels[row])
        return (self.after(image), label, index) if self.with_rows else (self.after(image), label)


def fixed_and_random(transform: Any, *, training: bool) -> tuple[Compose, Compose]:
    """A timm transform in two: what an image may be kept after, and what remains; one after the other they are it."""
    steps = transform.transforms
    cut = 0 if training else next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    return Compose(steps[:cut]), Compose(steps[cut:])


def make_loader(
    split: Split,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    training: bool,
    workers: int = 0,
    seed: int = 0,
    augmentation: Mapping[str, Any] | None = None,
    cache_bytes: int = 0,
    with_rows: bool = False,
) -> DataLoader[Any]:
    """Batches of a split under timm's transform for the model.

    Args:
        data_config: of `timm.data.resolve_model_data_config`: input_size, mean, std, interpolation, crop_pct.
        augmentation: further arguments of `timm.data.create_transform`, for training.
        cache_bytes: of images to keep decoded at most, for all workers together; see `TransformedImages`.
        with_rows: yield (images, labels, indices into the split) instead of (images, labels).
    """
    kept = {key: data_config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    transform = create_transform(**kept, is_training=training, **(augmentation or {}))
    capacity = int(min(cache_bytes, cache_need(split, kept["input_size"], training=training)))
    cache = ImageCache(len(split), capacity) if capacity else None
    return DataLoader(
        TransformedImages(split, *fixed_and_random(transform, training=training), cache, with_rows=with_rows),
        batch_size=batch_size,
        shuffle=training,
        drop_last=training and len(split) > batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_seed_worker,
        generator=torch.Generator().manual_seed(seed),
    )


def cache_need(split: Split, input_size: Sequence[int], *, training: bool) -> float:
    """Bytes that keeping a whole split takes: not known for images of any size, 0 where they are in memory already."""
    if training:
        return 0 if split.table.in_memory else math.inf
    _, height, width = input_size
    return len(split) * 3 * height * width


def _seed_worker(worker: int) -> None:
    """Give numpy and random, which timm's augmentations use, the worker's own torch seed."""
    import random

    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)
