"""Training, validation and test rows of a dataset: held out by class, drawn by the seed, a few of each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from nolora_vision.training.errors import RunError
from nolora_vision.training.table import Table

T = TypeVar("T")

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


def split_tables(
    tables: Mapping[str, Table], val_split: float, notes: Mapping[str, str] | None = None
) -> tuple[dict[str, Split], dict[str, str]]:
    """Train, validation and test rows, and where each comes from; what is lacking is taken from the training rows.

    Args:
        notes: where the tables come from, if that is more than the dataset's own splits.
    """
    splits = {role: Split(table, np.arange(len(table.labels))) for role, table in tables.items()}
    said = {role: (notes or {}).get(role) or "the dataset's own" for role in splits}
    if "test" not in splits and "val" in splits:
        splits["test"], said["test"] = splits.pop("val"), "the dataset's validation split"
        said.pop("val")
    for role, share in (("test", TEST_SHARE), ("val", val_split)):
        if role not in splits:
            splits["train"], splits[role] = hold_out(splits["train"], share)
            said[role] = f"{share:.0%} of the training images, by class, seed {SPLIT_SEED}"
    return splits, said


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


def few_of_each(split: Split, shots: int, seed: int) -> Split:
    """So many rows of each class, drawn by the seed; those of fewer shots are among them.

    A class of which the table has no image at all, as 0 where labels count from 1, is no class here.

    Raises:
        RunError: if a class has fewer.
    """
    names = split.table.class_names
    counts = np.bincount(split.labels, minlength=len(names))
    there = np.unique(split.table.labels).tolist()
    if short := [label for label in there if counts[label] < shots]:
        worst = min(short, key=lambda label: counts[label])
        others = f", and {len(short) - 1} other classes have too few" if len(short) > 1 else ""
        raise RunError(
            f"--shots {shots} needs {shots} training images of each class: {names[worst]!r} has {counts[worst]}"
            f"{others}. Choose fewer shots, or another --val-split."
        )
    return _first_of_each(split, dict.fromkeys(there, shots), seed)


def fraction_of_each(split: Split, fraction: float, seed: int) -> Split:
    """This share of the rows of each class and at least one, drawn by the seed; smaller shares are among larger."""
    labels, counts = np.unique(split.labels, return_counts=True)
    wanted = {int(label): max(1, round(fraction * count)) for label, count in zip(labels, counts, strict=True)}
    return _first_of_each(split, wanted, seed)


def training_subset(
    split: Split, *, seed: int, most: int | None, shots: int | None, fraction: float | None
) -> tuple[Split, str]:
    """The rows to train on, and in words what was taken; at most one of the three ways to take fewer.

    Raises:
        RunError: if more than one is given, or a class has too few images.
    """
    given = {"max_train_samples": most, "shots": shots, "train_fraction": fraction}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise RunError(f"{' and '.join(names)} each choose the training images. Give one of them.")
    if shots is not None:
        return few_of_each(split, shots, seed), f"{shots} images of each class, seed {seed}"
    if fraction is not None:
        return fraction_of_each(split, fraction, seed), f"{fraction:.3g} of each class, seed {seed}"
    return subset(split, most, seed), "all" if most is None or most >= len(split) else f"{most} images, seed {seed}"


def both(first: Split, second: Split) -> Split:
    """The rows of two splits as one."""
    if first.table is second.table:
        return Split(first.table, np.union1d(first.rows, second.rows))
    a, b = as_table(first), as_table(second)
    table = Table(
        image=partial(_either, a.image, b.image, len(first)),
        labels=[*a.labels, *b.labels],
        class_names=a.class_names,
        in_memory=a.in_memory and b.in_memory,
        name=f"{a.name} + {b.name}",
        encoded=partial(_either, a.encoded, b.encoded, len(first)) if a.encoded and b.encoded else None,
    )
    return Split(table, np.arange(len(first) + len(second)))


def as_table(split: Split, name: str | None = None) -> Table:
    """The rows of a split as a table of their own."""
    table = split.table
    return Table(
        image=partial(_at, table.image, split.rows),
        labels=split.labels.tolist(),
        class_names=table.class_names,
        in_memory=table.in_memory,
        name=name or table.name,
        encoded=table.encoded and partial(_at, table.encoded, split.rows),
    )


def _first_of_each(split: Split, wanted: Mapping[int, int], seed: int) -> Split:
    """Rows of each class in an order that depends on seed and class alone, the first so many of them."""
    labels, kept = split.labels, [split.rows[:0]]
    for label, count in wanted.items():
        order = np.random.default_rng((seed, label)).permutation(split.rows[labels == label])
        kept.append(order[:count])
    return Split(split.table, np.sort(np.concatenate(kept)))


def _at(get: Callable[[int], T], rows: np.ndarray, i: int) -> T:
    return get(int(rows[i]))


def _either(first: Callable[[int], T], second: Callable[[int], T], n: int, i: int) -> T:
    return first(i) if i < n else second(i - n)
