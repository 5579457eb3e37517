"""A contact sheet: images with what a model predicts for them, as one PNG file."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nolora_vision.training import figures

CELL_INCHES, CELL_HEIGHT = 1.6, 1.28
"""Of a contact sheet: width of a cell, and its height in widths."""


def contact_sheet(path: Path, cells: Sequence[tuple[Any, str, float, str]], *, title: str, left_out: int = 0) -> bool:
    """Thumbnails in a grid; beneath each its class, a bar as long as its probability, and its file's name.

    Args:
        cells: PIL image, class, probability in [0, 1] and file name of each, at most a hundred or so.
        left_out: how many more there are, which the title says.
    """
    plt = figures.pyplot()
    if plt is None:
        return False
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height, head = columns + 0.12, rows * CELL_HEIGHT, 0.28  # in widths of a cell
    figure = plt.figure(figsize=(width * CELL_INCHES, (height + head) * CELL_INCHES), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-0.06, width - 0.06), ylim=(height, -head))
    axis.axis("off")
    for i, cell in enumerate(cells):
        _draw_cell(axis, i % columns, CELL_HEIGHT * (i // columns), cell)
    words = [title, f"{len(cells)} images" if len(cells) > 1 else "", f"{left_out:,} more left out" if left_out else ""]
    size = 12 if columns > 2 else 8
    heading = _shortened(" · ".join(filter(None, words)), int(16 * columns * 12 / size))
    axis.text(columns / 2, -0.45 * head, heading, fontsize=size, ha="center", va="center", parse_math=False)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in place of a character will do
            figure.savefig(scratch, dpi=120, format="png")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
        plt.close(figure)
    return True


def _draw_cell(axis: Any, x: float, y: float, cell: tuple[Any, str, float, str]) -> None:
    """One thumbnail with its bar and words, in a cell 1 wide and CELL_HEIGHT high."""
    image, name, probability, file = cell
    side, left = 0.9, x + 0.05
    w, h = (side * n / max(image.size) for n in image.size)
    x0, y0 = x + 0.5 - w / 2, y + (side - h) / 2
    smooth = "nearest" if max(image.size) < 64 else "antialiased"
    axis.imshow(np.asarray(image), extent=(x0, x0 + w, y0 + h, y0), interpolation=smooth, aspect="auto")
    colour = _confidence_colour(probability)
    axis.barh(y + 0.955, side, height=0.04, left=left, color="0.9")
    axis.barh(y + 0.955, side * probability, height=0.04, left=left, color=colour)
    common = {"va": "center", "parse_math": False}
    axis.text(left, y + 1.06, _shortened(name, 12), fontsize=9, ha="left", weight="bold", **common)
    percent = f"{100 * probability:.0f} %"
    axis.text(left + side, y + 1.06, percent, fontsize=9, ha="right", color=colour, weight="bold", **common)
    axis.text(left, y + 1.175, _shortened(file, 24), fontsize=6.5, ha="left", color="0.45", **common)


def _confidence_colour(probability: float) -> str:
    """Green from 80 %, amber from 50 %, red below; each dark enough to be read on white."""
    return "#1a7f37" if probability >= 0.8 else "#b06f00" if probability >= 0.5 else "#c0392b"


def _shortened(text: str, most: int) -> str:
    """Cut in the middle."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
