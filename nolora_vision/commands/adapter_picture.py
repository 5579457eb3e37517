"""The picture of a saved adapter: update norms by block, v and the gate, the learned nonlinearities."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nolora_vision.adapters.anatomy import AdapterAnatomy
from nolora_vision.training import figures

KINDS = ("q", "k", "v", "qk", "kv", "qkv", "proj", "fc1", "fc2", "mlp", "")
"""Roles of updates, in the order in which pictures show them; each has the same colour and marker in all of them."""
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    *["#000000"] * 2,
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "0.4",
)
MARKERS = "osD<>oXv^vs"


def adapter_picture(path: Path, rows: Sequence[AdapterAnatomy], *, title: str, reach: float = 3.0) -> bool:
    """What training did to adapters: updates, v and gates by block, and the learned f of each role, depth as colour.

    Args:
        reach: f is drawn for h in [-reach, reach]; how wide h = A x spreads depends on images and backbone.
    """
    plt = figures.pyplot()
    if plt is None:
        return False
    kinds = sorted({row.kind for row in rows}, key=lambda kind: (KINDS.index(kind) if kind in KINDS else 99, kind))
    panels: list[tuple[str, str, Any]] = [
        ("norm of the update", "‖slope of the update at h = 0‖", lambda row: (row.update_norm,)),
        ("directions it uses", f"Σσ² / max σ²  (rank {max(row.rank for row in rows)})", lambda row: (row.stable_rank,)),
        ("v: mean and range (1 at the start)", "v", lambda row: row.v),
        (
            "strength of the gate (0 at the start)",
            "‖G‖",
            lambda row: None if row.modulation != "gate" else (row.gate_norm,),
        ),
    ]
    panels = [panel for panel in panels if any(panel[2](row) for row in rows)]
    learned = kinds if any(row.theta for row in rows) else kinds[:1]
    deep = 2 if learned and any(row.theta_moved() for row in rows) else 1
    lines, columns = (1, len(panels)) if len(panels) < 4 else (2, 2)
    size = (max(5.4 * columns, 2.9 * len(learned) + 1.2), 3.2 * lines + 2.7 * deep + 0.8)
    figure = plt.figure(figsize=size, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.2 * lines + 0.3, 2.7 * deep + 0.2))
    for axis, (name, label, values) in zip(above.subplots(lines, columns, squeeze=False).flat, panels, strict=True):
        _by_block(axis, rows, kinds, values)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel(label)
        if label != "v":
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    above.legend(*above.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=12, frameon=False)
    _draw_functions(plt, below, rows, learned, reach, deep)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _by_block(axis: Any, rows: Sequence[AdapterAnatomy], kinds: Sequence[str], of: Any) -> None:
    """A line for each kind through the means of its values in each block, with a bar from smallest to largest."""
    blocks = list(dict.fromkeys(row.block for row in rows))
    for k, kind in enumerate(kinds):
        style = KINDS.index(kind) if kind in KINDS else len(KINDS) - 1
        values = [[v for row in rows if (row.kind, row.block) == (kind, b) for v in of(row) or ()] for b in blocks]
        points = [(i + 0.5 * ((k + 0.5) / len(kinds) - 0.5), found) for i, found in enumerate(values) if found]
        x, means = [x for x, _ in points], [float(np.mean(found)) for _, found in points]
        axis.plot(
            x, means, marker=MARKERS[style], color=COLOURS[style], markersize=5, linewidth=1.3, label=kind or "other"
        )
        lowest, highest = [min(found) for _, found in points], [max(found) for _, found in points]
        axis.vlines(x, lowest, highest, color=COLOURS[style], alpha=0.5)
    labels = [".".join(re.findall(r"\d+", block)) or "–" for block in blocks]
    step = math.ceil(len(labels) / (24 if max(map(len, labels)) < 3 else 10))
    axis.set_xticks(range(0, len(labels), step), labels[::step])
    for x in range(1, len(labels)):
        if "." in labels[x] and labels[x].split(".")[0] != labels[x - 1].split(".")[0]:
            axis.axvline(x - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_xlabel("block" + (" (stage.block)" if any("." in label for label in labels) else ""))
    axis.grid(alpha=0.3)


def _draw_functions(
    plt: Any, figure: Any, rows: Sequence[AdapterAnatomy], kinds: Sequence[str], reach: float, deep: int
) -> None:
    """For each kind f of every rank unit of every block over the f before training, and below it the difference."""
    axes = figure.subplots(deep, len(kinds), sharex=True, sharey="row", squeeze=False)
    blocks, h = list(dict.fromkeys(row.block for row in rows)), np.linspace(-reach, reach, 121)
    learned, names = any(row.theta for row in rows), "/".join(dict.fromkeys(row.nonlinearity for row in rows))
    colours, before = plt.get_cmap("viridis"), None
    for column, kind in zip(axes.T, kinds, strict=True):
        for row in (row for row in rows if row.kind == kind):
            after, before = row.curves(h.tolist())
            look = {"color": colours(0.92 * blocks.index(row.block) / max(1, len(blocks) - 1)), "linewidth": 0.7}
            for axis, start in zip(column, (0, before), strict=False):
                if learned and start is not None:
                    axis.plot(h, (after - start).T.numpy(), alpha=0.6, **look)
        if before is not None:
            column[0].plot(h, before.numpy(), "k--", linewidth=1.4, label="before training" if learned else names)
            column[0].legend(loc="upper left", fontsize=8, frameon=False)
        column[0].set_title(kind if learned else "", fontsize=10)
        column[-1].set_xlabel("h = (A x)ᵢ")
    for line, label in zip(axes, ("f(h)", "f(h) − f(h) before"), strict=False):
        line[0].set_ylabel(label)
        [axis.grid(alpha=0.3) for axis in line]
    if learned:
        scale = plt.cm.ScalarMappable(plt.Normalize(0, 1 / 0.92), colours)
        bar = figure.colorbar(scale, ax=list(axes.flat), aspect=40, pad=0.01)
        bar.ax.set_ylim(0, 1)
        bar.set_ticks([0, 1], labels=["first\nblock", "last\nblock"])
    said = (
        "learned: a line for each rank unit of each block"
        if learned
        else "has no parameters, so training left it as is"
    )
    figure.suptitle(f"f = {names}, {said}" if learned else f"f = {names} {said}", fontsize=10)
