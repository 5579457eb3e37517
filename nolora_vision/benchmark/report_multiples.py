"""Curves of many methods, which would be a tangle in one figure: each has axes of its own, with the others in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nolora_vision.benchmark.curves import Curve, Panel
from nolora_vision.benchmark.report_figures import (
    INK,
    LABEL_SIZE,
    Look,
    axes_of_figure,
    draw_curve,
    far_below,
    floor_of,
    set_scale,
)

CROWDED = 8
"""More curves than colours are a tangle."""
WIDTH, HEIGHT, COLUMNS = 2.5, 2.1, 4


def crowded(panels: Sequence[Panel]) -> bool:
    """Whether a panel has too many lines for one pair of axes."""
    return any(sum(len(curve.points) > 1 for curve in panel.curves) > CROWDED for panel in panels)


def multiples_figure(
    panels: Sequence[Panel], look: Look, *, baseline: str, xlabel: str, ylabel: str, scale: str
) -> Any:
    """Axes for each method of each panel, alike within a panel: its curve, the baseline dashed, the others grey.

    Args:
        scale: as of `curves_figure`.
    """
    places = [(panel, curve) for panel in panels for curve in panel.curves]
    with axes_of_figure(len(places), width=WIDTH, height=HEIGHT, columns=COLUMNS) as (figure, axes):
        for axis, (panel, curve) in zip(axes, places, strict=True):
            low = far_below(panel.curves)
            kept = [other for other in panel.curves if other not in low]
            for other in kept:
                _draw_behind(axis, other, dashed=other.label == baseline)
            if curve in low:
                text = f"↓ {max(p.mean for p in curve.points):.1f}"
                axis.text(0.99, 0.03, text, transform=axis.transAxes, fontsize=LABEL_SIZE, ha="right")
            else:
                draw_curve(axis, curve, look)
            set_scale(axis, [point.x for other in kept for point in other.points], scale, labels=False)
            axis.set_ylim(*_limits(kept))
            axis.set_title(f"{panel.title}: {curve.label}" if len(panels) > 1 else curve.label, wrap=True)
            axis.tick_params(labelsize=LABEL_SIZE)
        figure.supxlabel(xlabel, fontsize="medium")
        figure.supylabel(ylabel, fontsize="medium")
        if len(panels) == 1:
            figure.suptitle(panels[0].title, x=0.01, ha="left", fontweight="bold", fontsize="large")
    return figure


def _draw_behind(axis: Any, curve: Curve, *, dashed: bool) -> None:
    style = {"linestyle": "--", "linewidth": 1.2, "alpha": 0.8} if dashed else {"linewidth": 0.8, "alpha": 0.15}
    axis.plot([p.x for p in curve.points], [p.mean for p in curve.points], color=INK, label="_behind", **style)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Of all the axes of a panel: what is far below the best of each goes on below it."""
    means = [point.mean for curve in curves for point in curve.points]
    bottom = floor_of(curves)
    low, high = min(means) if bottom is None else bottom, max(means)
    room = 0.06 * (high - low) or 1.0
    return low - room * (bottom is None), high + room
