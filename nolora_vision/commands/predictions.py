"""Predictions as a person or a program wants them: table, lines, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST_CLASS = 24
"""Columns of a terminal after which a class name is cut."""
NARROWEST_PATH = 24
"""Columns down to which paths are shortened to make room for one more class."""
PADDING = 3
SIGNIFICANT_DIGITS = 6
"""Of probabilities in files; fp32 has seven."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first; or why it was skipped."""

    path: str
    classes: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    thumbnail: Any = None
    """A small PIL image, or None where none was asked for."""
    skipped: str = ""


def as_csv(predictions: Sequence[Prediction], top_k: int) -> str:
    """A header, and a row for each image: path, class_1, probability_1, …; skipped images have none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", *(f"{name}_{k}" for k in range(1, top_k + 1) for name in ("class", "probability"))])
    for prediction in predictions:
        if not prediction.skipped:
            writer.writerow(_fields(prediction))
    return valid_unicode(stream.getvalue())


def as_json(predictions: Sequence[Prediction]) -> str:
    """An object with the list of `predictions` and the list of what was `skipped`, and why."""
    rows = [
        {
            "path": p.path,
            "predictions": [
                {"class": name, "index": index, "probability": _rounded(probability)}
                for name, index, probability in zip(p.classes, p.indices, p.probabilities, strict=True)
            ],
        }
        for p in predictions
        if not p.skipped
    ]
    skipped = [{"path": p.path, "reason": p.skipped} for p in predictions if p.skipped]
    content = {"predictions": rows, "skipped": skipped}
    return valid_unicode(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def as_lines(predictions: Sequence[Prediction]) -> str:
    """A line for each image, separated by tabs: path, class, probability, class, probability, …"""
    rows = (_fields(p) for p in predictions if not p.skipped)
    return "".join("\t".join(printable(str(field)) for field in row) + "\n" for row in rows)


def print_table(predictions: Sequence[Prediction], title: str, console: Console) -> None:
    """A table with as many of each image's classes as the terminal is wide for, and a word on the rest."""
    shown = [p for p in predictions if not p.skipped]
    if not shown:
        return
    columns = [_class_cells(column) for column in zip_longest(*(_shares(p) for p in shown))]
    longest = max(cell_len(printable(p.path)) for p in shown)
    path_width, count = _fit([max(map(cell_len, column)) for column in columns], longest, console.width)
    table = Table()
    table.add_column("image", no_wrap=True)
    for k in range(count):
        table.add_column(_ordinal(k + 1), no_wrap=True, overflow="ellipsis", style="" if k == 0 else "dim")
    for p, *cells in zip(shown, *columns[:count], strict=True):
        first = Text(cells[0], style=confidence_style(p.probabilities[0]))
        table.add_row(Text(shorten_middle(printable(p.path), path_width)), first, *map(Text, cells[1:]))
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)
    if count < len(columns):
        text = f"The first {count} of {len(columns)} classes are shown: this terminal is {console.width} columns wide."
        console.print(Text(f"{text} --csv and --json have all.", style="dim"), soft_wrap=True)


def confidence_style(probability: float) -> str:
    """Colour of a terminal for how sure a prediction is: green from 80 %, yellow from 50 %, red below."""
    return "bold green" if probability >= 0.8 else "yellow" if probability >= 0.5 else "red"


def shorten_middle(text: str, width: int) -> str:
    """The text in at most so many columns, cut in the middle: of a path its end, the file's name, tells most."""
    if cell_len(text) <= width:
        return text
    head, tail = (width - 1) // 3, (width - 1) - (width - 1) // 3
    start = set_cell_size(text, head).rstrip()
    end = text[-tail:] if tail else ""
    while cell_len(end) > tail:
        end = end[1:]
    return f"{start}…{end}"


def printable(text: str) -> str:
    """The text with escapes in place of what would move a terminal's cursor, end a line, or is no Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _fields(p: Prediction) -> list[str | float]:
    pairs = zip(p.classes, p.probabilities, strict=True)
    return [p.path, *(field for name, value in pairs for field in (name, _rounded(value)))]


def _rounded(probability: float) -> float:
    return float(f"{probability:.{SIGNIFICANT_DIGITS}g}")


def _shares(p: Prediction) -> list[tuple[str, float]]:
    return list(zip(map(printable, p.classes), p.probabilities, strict=True))


def _class_cells(column: Sequence[tuple[str, float]]) -> list[str]:
    """Names to the left and percentages to the right, all of one width."""
    width = min(WIDEST_CLASS, max(cell_len(name) for name, _ in column))
    return [f"{_cut(name, width)} {100 * share:5.1f} %" for name, share in column]


def _cut(name: str, width: int) -> str:
    return set_cell_size(name, width) if cell_len(name) <= width else set_cell_size(name, width - 1) + "…"


def _fit(class_widths: Sequence[int], longest_path: int, width: int) -> tuple[int, int]:
    """Columns for the path, and how many classes fit beside it; one in any case."""
    room = width - 1 - PADDING - min(longest_path, NARROWEST_PATH)
    count = 0
    for class_width in class_widths:
        room -= class_width + PADDING
        if room < 0 and count:
            break
        count += 1
    taken = 1 + PADDING + sum(class_width + PADDING for class_width in class_widths[:count])
    return max(8, min(longest_path, width - taken)), count


def _ordinal(k: int) -> str:
    if k == 1:
        return "top-1"
    ending = "th" if 10 <= k % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"{k}{ending}"


def valid_unicode(text: str) -> str:
    """Names of files need not be Unicode, text files do."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
