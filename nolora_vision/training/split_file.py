"""Splits as a file, splits.json: which rows a run trained, validated and tested on, to take exactly those again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nolora_vision.training.errors import RunError
from nolora_vision.training.splits import Split
from nolora_vision.training.table import Table

FORMAT_VERSION = 1
ROLES = ("train", "val", "test")


def describe_splits(dataset_id: str, splits: Mapping[str, Split], notes: Mapping[str, str]) -> dict[str, Any]:
    """The contents of a split file: for each split the dataset's split that it is of, and the rows there."""
    described = {
        role: {
            "of": splits[role].table.name,
            "of_rows": len(splits[role].table.labels),
            "of_fingerprint": splits[role].table.fingerprint,
            "images": len(splits[role]),
            "rows": rows_to_text(splits[role].rows),
            "note": notes.get(role, ""),
        }
        for role in ROLES
    }
    return {"format_version": FORMAT_VERSION, "dataset": dataset_id, "splits": described}


def read_split_file(
    path: Path, tables: Mapping[str, Table], dataset_id: str
) -> tuple[dict[str, Split], dict[str, str]]:
    """The splits that a file describes, of these tables, and its notes.

    Raises:
        RunError: if it is no split file, is of other data, or its splits share rows.
    """
    saved = _load(path)
    if saved["dataset"] != dataset_id:
        raise RunError(f"--splits {path} is of the dataset {saved['dataset']}, not of {dataset_id}.")
    by_name = {table.name: table for table in tables.values()}
    splits: dict[str, Split] = {}
    for role in ROLES:
        facts = saved["splits"][role]
        table = by_name.get(facts["of"])
        if table is None:
            raise RunError(
                f"--splits {path}: its {role} split is of the dataset's split {facts['of']!r}; loaded are "
                f"{', '.join(by_name)}. Was it made with another --test-split?"
            )
        _refuse_other_data(f"--splits {path}", facts, table)
        splits[role] = Split(table, rows_from_text(facts["rows"]))
        if splits[role].rows.max(initial=-1) >= len(table.labels):
            raise RunError(
                f"--splits {path}: its {role} split names rows beyond the {len(table.labels):,} of the data."
            )
    _refuse_overlap(path, splits)
    return splits, {role: saved["splits"][role].get("note", "") for role in ROLES}


def rows_to_text(rows: np.ndarray) -> str:
    """Row numbers in ascending order as ranges: `0-99 150 200-210`."""
    if not len(rows):
        return ""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    ends = [*(starts[1:] - 1), len(rows) - 1]
    pairs = [(int(rows[a]), int(rows[b])) for a, b in zip(starts, ends, strict=True)]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def rows_from_text(text: str) -> np.ndarray:
    """The row numbers of `rows_to_text`.

    Raises:
        ValueError: if the text is not of this form, or not in ascending order.
    """
    rows = [np.zeros(0, np.int64)]
    for part in text.split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"no row numbers: {part!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"row numbers out of order: {part!r}")
        rows.append(np.arange(first, last + 1))
    found = np.concatenate(rows)
    if (np.diff(found) <= 0).any():
        raise ValueError("row numbers out of order")
    return found


def _load(path: Path) -> dict[str, Any]:
    """The file's contents, of the right form."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (version := saved["format_version"]) == FORMAT_VERSION:
            _refuse_missing(saved, ("dataset", "splits"))
            for role in ROLES:
                _refuse_missing(saved["splits"][role], ("of", "of_rows", "of_fingerprint", "rows"))
                rows_from_text(saved["splits"][role]["rows"])
    except OSError as error:
        raise RunError(f"--splits {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"--splits {path} is no split file ({type(error).__name__}: {error}). Wanted the splits.json of a run."
        ) from error
    if version != FORMAT_VERSION:
        raise RunError(f"--splits {path} has format {version}; this version reads format {FORMAT_VERSION}.")
    return saved


def _refuse_missing(facts: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    if missing := [name for name in wanted if name not in facts]:
        raise ValueError(f"no {', '.join(missing)}")


def _refuse_other_data(what: str, facts: Mapping[str, Any], table: Table) -> None:
    if facts["of_rows"] != len(table.labels):
        raise RunError(
            f"{what} was made of {facts['of_rows']:,} rows of the split {table.name!r}, which has "
            f"{len(table.labels):,} here."
        )
    if facts["of_fingerprint"] != table.fingerprint:
        raise RunError(
            f"{what} was made of other data: the labels or class names of the split {table.name!r} differ. Load the "
            f"same --revision and --label-key, and do not pack a part."
        )


def _refuse_overlap(path: Path, splits: Mapping[str, Split]) -> None:
    for i, a in enumerate(ROLES):
        for b in ROLES[i + 1 :]:
            first, second = splits[a], splits[b]
            if first.table is second.table and (shared := len(np.intersect1d(first.rows, second.rows))):
                raise RunError(f"--splits {path}: its {a} and {b} splits share {shared:,} rows.")
