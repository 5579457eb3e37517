"""Labels that cannot be learned or scored are refused with their rows; odd ones are told of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nolora_vision.training.errors import RunError
from nolora_vision.training.splits import Split

MOST_NAMED = 5
"""Rows or classes that a message names; the rest are counted."""


def refuse_labels(values: Sequence[Any], split: str, where: str) -> None:
    """Refuse a split's labels as they are stored, before they become classes.

    Raises:
        RunError: if some are missing, negative, or neither whole numbers nor names.
    """
    for what, wrong, advice in (
        ("missing", [i for i, v in enumerate(values) if v is None], "Fill them in or take these rows out."),
        (
            "negative",
            [i for i, v in enumerate(values) if isinstance(v, int) and v < 0],
            "-1 often stands for labels that are kept secret: choose another --test-split, or take these rows out.",
        ),
        (
            "no class",
            [i for i, v in enumerate(values) if v is not None and not isinstance(v, (int, str))],
            "Wanted whole numbers from 0 on, or names. Choose another column with --label-key.",
        ),
    ):
        if wrong:
            got = "" if what == "missing" else f", such as {values[wrong[0]]!r}"
            raise RunError(
                f"{len(wrong)} of {len(values)} labels of split {split} of {where} are {what}{got} "
                f"({named(wrong, 'row')}). {advice}"
            )


def refuse_classes(chosen: Mapping[str, Split], where: str) -> None:
    """Refuse classes that no classifier can be made for.

    Raises:
        RunError: if a label lies beyond the classes, or there is only one class.
    """
    names = chosen["train"].table.class_names
    for split in chosen.values():
        beyond = np.flatnonzero((split.labels < 0) | (split.labels >= len(names)))
        if len(beyond):
            rows = [int(split.rows[i]) for i in beyond]
            raise RunError(
                f"Split {split.table.name} of {where} has labels beyond its {len(names)} classes, such as "
                f"{split.labels[beyond[0]]} ({named(rows, 'row')}). Are its splits of one dataset?"
            )
    if len(names) < 2:
        raise RunError(f"{where} has a single class ({', '.join(names)}), so there is nothing to tell apart.")


def label_warnings(chosen: Mapping[str, Split]) -> Iterator[str]:
    """A sentence for each thing about the labels that a person may not know."""
    names, seen = chosen["train"].table.class_names, set(chosen["train"].labels.tolist())
    for role in ("val", "test"):
        only = [names[label] for label in sorted(set(chosen[role].labels.tolist()) - seen)]
        if only:
            share = np.isin(chosen[role].labels, [names.index(name) for name in only]).mean()
            yield (
                f"No training image shows {named(only, 'class', 'classes')}, as {share:.0%} of the {role} split do: "
                f"these can't be got right."
            )


def named(what: Sequence[Any], one: str, several: str | None = None) -> str:
    """row 3, or rows 3, 8, 9 and 4 more."""
    shown, rest = ", ".join(map(str, what[:MOST_NAMED])), len(what) - MOST_NAMED
    return f"{one if len(what) == 1 else several or f'{one}s'} {shown}{f' and {rest} more' if rest > 0 else ''}"
