"""Images ready to use: from a dataset's name to its three splits, and from a split to batches for a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from nolora_vision.training.bad_images import readable, shared_images
from nolora_vision.training.errors import RunError
from nolora_vision.training.image_cache import ImageCache
from nolora_vision.training.label_checks import label_warnings, refuse_classes
from nolora_vision.training.order import AUGMENTATION, SeededOrder, drawing_from, number_of
from nolora_vision.training.sources import load_tables
from nolora_vision.training.split_file import describe_splits, read_split_file
from nolora_vision.training.splits import SPLIT_SEED, Split, both, split_tables, subset, training_subset
from nolora_vision.training.table import Table

MakeCache = Callable[[int, int], ImageCache]


@dataclass(frozen=True)
class ImageData:
    """A dataset ready to use: three splits, class names, and what it is."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    about: Mapping[str, Any]
    split_file: Mapping[str, Any] = field(default_factory=dict)
    """What `splits.json` says of the rows."""
    val_held_out: bool = True
    """Whether no validation image is trained on; otherwise its score says nothing, and no epoch may be chosen by it."""


def load_data(
    name: str,
    *,
    seed: int = 0,
    val_split: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    shots: int | None = None,
    train_fraction: float | None = None,
    train_on: Literal["train", "train_val"] = "train",
    splits: Path | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    revision: str | None = None,
    test_split: str | None = None,
    vtab_root: Path | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    check_shared: Literal["auto", "always", "never"] = "auto",
) -> ImageData:
    """Load a dataset and split it. Splits are fixed; only the training subset depends on the seed.

    Args:
        splits: a split file, which says all rows; then nothing is drawn.
        on_bad_image: raise when one is met, or read all beforehand and leave out those that cannot be read.
        check_shared: whether to look for images that training and test share; auto: if there are not too many.

    Raises:
        RunError: if it cannot be loaded, or a split is empty.
    """
    keys = {"image_key": image_key, "label_key": label_key, "revision": revision}
    tables, about = load_tables(name, **keys, test_split=test_split, vtab_root=vtab_root)
    if splits is None:
        chosen, notes = split_tables(tables, val_split, about.get("splits"))
        chosen["train"], taken = training_subset(
            chosen["train"], seed=seed, most=max_train_samples, shots=shots, fraction=train_fraction
        )
        notes["train"] += "" if taken == "all" else f": {taken}"
        chosen |= {role: subset(chosen[role], max_eval_samples, SPLIT_SEED) for role in ("val", "test")}
    else:
        chosen, notes = read_split_file(splits, tables, about["id"])
    chosen, skipped = _without_bad_images(chosen) if on_bad_image == "skip" else (chosen, {})
    for split, role in (("training", "train"), ("validation", "val"), ("test", "test")):
        if not len(chosen[role]):
            raise RunError(f"The {split} split of {name} is empty. Check the dataset, or choose another --val-split.")
    about = {**about, "warnings": _checked(chosen, name, check_shared), "skipped_images": skipped}
    file = describe_splits(about["id"], chosen, notes)
    held_out, names = train_on == "train", tables["train"].class_names
    train, notes = (chosen["train"], notes) if held_out else _with_validation(chosen, notes)
    about = {**about, **_facts(tables, train, chosen), "splits": notes, "val_held_out": held_out}
    return ImageData(train, chosen["val"], chosen["test"], names, about, file, held_out)


def _with_validation(chosen: Mapping[str, Split], notes: Mapping[str, str]) -> tuple[Split, dict[str, str]]:
    """Training and validation images to train on, and in words what they are."""
    also = f"{notes['train']}, and all {len(chosen['val']):,} validation images"
    return both(chosen["train"], chosen["val"]), {**notes, "train": also}


def _checked(chosen: Mapping[str, Split], name: str, check_shared: str) -> list[str]:
    """What is odd about labels and images; what is unusable is refused."""
    refuse_classes(chosen, name)
    shared = () if check_shared == "never" else shared_images(chosen, always=check_shared == "always")
    return [*label_warnings(chosen), *shared]


def _without_bad_images(chosen: Mapping[str, Split]) -> tuple[dict[str, Split], dict[str, list[str]]]:
    found = {role: readable(split) for role, split in chosen.items()}
    skipped = {role: problems for role, (_, problems) in found.items() if problems}
    return {role: good for role, (good, _) in found.items()}, skipped


def _facts(tables: Mapping[str, Table], train: Split, chosen: Mapping[str, Split]) -> dict[str, Any]:
    """Sizes, and of which splits of the dataset they are."""
    sizes = {"train_images": len(train), "val_images": len(chosen["val"]), "test_images": len(chosen["test"])}
    rows = {table.name: len(table.labels) for table in tables.values()}
    return {**sizes, "num_classes": len(train.table.class_names), "rows": rows}


class TransformedImages(Dataset[tuple[Tensor, int] | tuple[Tensor, int, int]]):
    """A split with a transform: index → image (C, H, W) and class, and the index if it is asked for.

    With a cache the numbers that come out are the same, bit for bit: before augmentation whole decoded images are kept
    and never smaller ones; where nothing is random, as in evaluation, the images as they are before normalisation.

    Args:
        before: what happens to an image before it is kept.
        after: what happens to it each time.
        seed: of the augmentation; None: nothing is random. Keys may be those of a `SeededOrder` or plain indices.
    """

    def __init__(
        self,
        split: Split,
        before: Any,
        after: Any,
        cache: ImageCache | None = None,
        *,
        with_rows: bool = False,
        seed: int | None = None,
    ) -> None:
        self.split, self.before, self.after, self.cache, self.with_rows = split, before, after, cache, with_rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        epoch, index = divmod(key, len(self))
        row = int(self.split.rows[index])

        def make() -> Image.Image:
            return self.before(self.split.table.image(row))

        image = make() if self.cache is None else self.cache.image(index, make)
        if self.seed is None:
            pixels = self.after(image)
        else:
            with drawing_from(number_of(self.seed, AUGMENTATION, epoch, index)):
                pixels = self.after(image)
        label = int(self.split.table.labels[row])
        return (pixels, label, index) if self.with_rows else (pixels, label)


def fixed_and_random(transform: Any, *, augmented: bool) -> tuple[Compose, Compose]:
    """A timm transform in two: what an image may be kept after, and what remains; one after the other they are it."""
    steps = transform.transforms
    cut = 0 if augmented else next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    return Compose(steps[:cut]), Compose(steps[cut:])


def make_loader(
    split: Split,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    training: bool,
    no_aug: bool = False,
    workers: int = 0,
    seed: int = 0,
    augmentation: Mapping[str, Any] | None = None,
    cache_bytes: int = 0,
    make_cache: MakeCache = ImageCache,
    with_rows: bool = False,
) -> DataLoader[Any]:
    """Batches of a split under timm's transform for the model; for training as `order.py` says.

    Args:
        data_config: of `timm.data.resolve_model_data_config`: input_size, mean, std, interpolation, crop_pct.
        training: shuffled, and augmented unless no_aug.
        no_aug: training images as evaluation sees them, where nothing is random.
        augmentation: further arguments of `timm.data.create_transform`, for augmented images.
        cache_bytes: of images to keep decoded at most, for all workers together; see `TransformedImages`.
        make_cache: (images, bytes) → the cache: a new one, or one that other loaders have filled.
        with_rows: yield (images, labels, indices into the split) instead of (images, labels).
    """
    kept = {key: data_config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    augmented = training and not no_aug
    transform = create_transform(**kept, is_training=augmented, **(augmentation or {}))
    capacity = int(min(cache_bytes, cache_need(split, kept["input_size"], augmented=augmented)))
    cache = make_cache(len(split), capacity) if capacity else None
    parts = fixed_and_random(transform, augmented=augmented)
    return DataLoader(
        TransformedImages(split, *parts, cache, with_rows=with_rows, seed=seed if augmented else None),
        batch_size=batch_size,
        sampler=SeededOrder(len(split), seed) if training else None,
        drop_last=training and len(split) > batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_worker,
        generator=torch.Generator().manual_seed(seed),  # of the workers' own seeds: not drawn from the run's
    )


def cache_need(split: Split, input_size: Sequence[int], *, augmented: bool) -> float:
    """Bytes that keeping a whole split takes: not known for images of any size, 0 where they are in memory already."""
    if augmented:
        return 0 if split.table.in_memory else math.inf
    _, height, width = input_size
    return len(split) * 3 * height * width


def _prepare_worker(worker: int) -> None:
    """Workers share the processor, and a signal to the run's process group is for the run alone: it ends them."""
    torch.set_num_threads(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
