"""Images that cannot be read are left out and listed, and images that training and test share are told of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from nolora_vision.training.errors import ImageError
from nolora_vision.training.label_checks import named
from nolora_vision.training.splits import Split
from nolora_vision.training.table import Table

MOST_HASHED = 10_000
"""Images that are compared by their bytes without being asked to, which takes a second or two."""


def readable(split: Split) -> tuple[Split, list[str]]:
    """The rows whose image can be read, and a sentence on each other one; reads them all once."""
    if split.table.in_memory:
        return split, []

    def problem(row: int) -> str | None:
        try:
            split.table.image(row)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(problem, split.rows.tolist()))
    good = [problem is None for problem in found]
    return Split(split.table, split.rows[good]), [problem for problem in found if problem is not None]


def shared_images(chosen: Mapping[str, Split], *, always: bool) -> Iterator[str]:
    """A sentence for each two splits that have images in common, byte for byte.

    Args:
        always: however many images there are.
    """
    if not always and sum(map(len, chosen.values())) > MOST_HASHED:
        return
    hashes = {role: {_hash(split.table, row): row for row in split.rows.tolist()} for role, split in chosen.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = [row for key, row in hashes[second].items() if key in hashes[first]]
        if both:
            share = len(both) / len(chosen[second])
            yield (
                f"{len(both)} images of the {second} split ({share:.0%} of it: {named(sorted(both), 'row')}) are also "
                f"in the {first} split, byte for byte: its score is too high by what is learned by heart."
            )


def _hash(table: Table, row: int) -> bytes:
    stored = None if table.encoded is None else table.encoded(row)
    if stored is None:
        image = table.image(row)
        stored = f"{image.size}".encode() + image.tobytes()
    return hashlib.blake2b(stored, digest_size=16).digest()
