"""The figures of a report: curves labelled at their ends, bars of differences, learned nonlinearities; in one style"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nolora_vision.benchmark.curves import Curve, Panel
from nolora_vision.benchmark.intervals import signed

INK = "#16181d"
"""Text, axes and the baseline; the page may put its own colour in its place."""
COLOURS = (INK, "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
"""Okabe and Ito's, told apart by most colour-blind people; yellow, which white swallows, is an olive brown."""
MARKERS = "osD^vPX*"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.8,
    "lines.linewidth": 1.6, "lines.markersize": 5, "svg.hashsalt": "nolora_vision", "text.parse_math": False,
    "axes.facecolor": "none", "path.simplify": True,
}  # fmt: skip
WIDTH, HEIGHT, COLUMNS = 5.0, 3.7, 2
FEWEST_FOR_INTERVALS = 3
"""With two seeds Student's interval is 9 deviations wide and hides all else: the seeds themselves are drawn alone."""
LINE_ENDS = tuple((7, dy) for step in range(9) for dy in ((0,) if not step else (9 * step, -9 * step)))
AROUND = ((7, 0), (0, 10), (0, -10), (-7, 0), *((7, dy) for step in range(2, 8) for dy in (9 * step, -9 * step)))
"""Where a label may stand, in points from what it names; the first free place is taken."""


def matplotlib_installed() -> bool:
    """Whether figures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Look:
    """Colour and marker of each method, the same in all figures."""

    labels: tuple[str, ...]

    def of(self, label: str) -> dict[str, Any]:
        """Line style of a method."""
        i = self.labels.index(label)
        lap = i // len(COLOURS)
        return {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + lap) % len(MARKERS)],
            "linestyle": ("-", "--", ":", "-.")[lap % 4],
        }


@contextmanager
def _panels(count: int, *, width: float = WIDTH, height: float = HEIGHT, columns: int = COLUMNS) -> Iterator[Any]:
    """A figure of so many axes, in the report's style; (figure, axes)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = -(-count // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
        FigureCanvasAgg(figure)  # measures texts
        grid = figure.subplots(lines, columns, squeeze=False)
        for axis in grid.flat[count:]:
            axis.set_visible(False)
        yield figure, list(grid.flat[:count])


def curves_figure(panels: Sequence[Panel], look: Look, *, xlabel: str, ylabel: str, scale: str) -> Any:
    """A panel for each of them, a labelled line for each method: means, 95 % intervals and the seeds as dots.

    Args:
        scale: log10, log2, or parameters: log10 with a place for 0.
    """
    with _panels(len(panels)) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                _draw_curve(axis, curve, look)
            _set_scale(axis, [point.x for curve in panel.curves for point in curve.points], scale)
            axis.set_title(panel.title, wrap=True)
            axis.set(xlabel=xlabel, ylabel=ylabel)
        figure.draw_without_rendering()  # only now do the axes have their places
        for axis, panel in zip(axes, panels, strict=True):
            places = AROUND if scale == "parameters" else LINE_ENDS
            taken: list[Any] = []
            for curve in sorted(panel.curves, key=lambda c: -c.points[-1].mean):
                end = curve.points[-1]
                _label(axis, (end.x, end.mean), curve.label, look.of(curve.label)["color"], places, taken)
    return figure


def _draw_curve(axis: Any, curve: Curve, look: Look) -> None:
    style = look.of(curve.label)
    points = curve.points
    axis.plot([p.x for p in points], [p.mean for p in points], label=curve.label, **style)
    for point in points:
        axis.plot([point.x] * len(point.values), point.values, ".", color=style["color"], alpha=0.4, markersize=3)
        if point.interval is not None and len(point.values) >= FEWEST_FOR_INTERVALS:
            axis.vlines(point.x, *point.interval, color=style["color"], linewidth=1.2, alpha=0.8)
        if point is curve.best:
            axis.plot([point.x], [point.mean], "o", markersize=11, fillstyle="none", color=style["color"])


def _set_scale(axis: Any, xs: Sequence[float], scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    low, high = min(x for x in (*xs, *[1.0] * (not any(xs))) if x > 0), max(*xs, 1e-12)
    if scale == "parameters" and min(xs) <= 0:
        axis.set_xscale("symlog", linthresh=low / 2, linscale=0.5)
    else:
        axis.set_xscale("log", base=2 if scale == "log2" else 10)
        room = (high / low) ** 0.08 if high > low else 2
        axis.set_xlim(low / room, high * room)
    axis.set_xlim(right=high * (max(high / low, 10) ** 0.45))  # the labels stand there
    if scale != "parameters" and len(set(xs)) <= 8:
        axis.set_xticks(sorted(set(xs)), [f"{x:,g}" if x < 1e6 else f"{x:,.0f}" for x in sorted(set(xs))])
        axis.xaxis.set_minor_locator(NullLocator())
    elif scale == "parameters":
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))


def _count(x: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:g} {letter}"
    return f"{x:g}"


def _label(axis: Any, at: tuple[float, float], text: str, colour: str, places: Sequence[Any], taken: list[Any]) -> None:
    """The text at the first of the places where it covers no other text; a thin line leads to it from afar."""
    renderer = axis.figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    for i, (dx, dy) in enumerate(places):
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 2}
        note = axis.annotate(
            text, at, (dx, dy), textcoords="offset points", ha=side, va="center", color=colour, fontsize=8.5,
            arrowprops=arrow if abs(dy) > 14 else None,
        )  # fmt: skip
        note.set_in_layout(False)
        box = _text_box(note, renderer)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 30 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 12
        if (inside and not any(box.overlaps(other) for other in taken)) or i == len(places) - 1:
            taken.append(box)
            return
        note.remove()


def _text_box(note: Any, renderer: Any) -> Any:
    """The box of an annotation's text without its leading line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def differences_figure(panels: Sequence[Any], baseline: str) -> Any:
    """A panel for each cell: each method's mean difference to the baseline as a bar from 0, with its 95 % interval."""
    most = max(len(panel.bars) for panel in panels)
    with _panels(len(panels), height=0.95 + 0.32 * most) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            for y, bar in enumerate(panel.bars):
                difference = bar.difference
                shown = difference.excludes_zero()
                colour = ("#0072B2" if difference.mean > 0 else "#D55E00") if shown else "#9aa0aa"
                axis.barh(y, difference.mean, height=0.55, color=colour)
                found = difference.interval
                if found and len(difference.pairs) >= FEWEST_FOR_INTERVALS:
                    axis.hlines(y, *found, color=INK, linewidth=1.3)
                axis.plot(difference.pairs, [y] * len(difference.pairs), ".", color=INK, alpha=0.45, markersize=4)
                axis.annotate(
                    signed(difference.mean), (1, y), (4, 0), xycoords=axis.get_yaxis_transform(),
                    textcoords="offset points", va="center", fontsize=8.5, fontweight="bold" if shown else "normal",
                    color=colour if shown else INK,
                )  # fmt: skip
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
            axis.set_ylim(len(panel.bars) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.set_title(panel.title, wrap=True)
            axis.set_xlabel(f"test top-1 minus {baseline} (points)")
    return figure


def functions_figure(functions: Mapping[str, Any]) -> Any:
    """A panel for each method: its learned f, a line for each rank unit, blocks as colour; dashed before training."""
    from matplotlib import colormaps

    with _panels(len(functions), width=3.6, height=3.2, columns=3) as (figure, axes):
        for axis, (label, found) in zip(axes, functions.items(), strict=True):
            blocks = list(dict.fromkeys(row["block"] for row in found["rows"]))
            for row in found["rows"]:
                colour = colormaps["cividis"](0.9 * blocks.index(row["block"]) / max(1, len(blocks) - 1))
                for values in row["after"]:
                    axis.plot(found["h"], values, color=colour, linewidth=0.5, alpha=0.5)
            if (before := next((row["before"] for row in found["rows"] if row["before"]), None)) is not None:
                axis.plot(found["h"], before, "--", color=INK, linewidth=1.5, label="before training")
                axis.legend(frameon=False, fontsize=8, loc="upper left")
            axis.set_title(label)
            axis.set(xlabel="h = (A x)ᵢ", ylabel="f(h)")
    return figure


def save_figure(figure: Any, path: Path, *, title: str) -> str:
    """Write a PNG on white, and return the figure as SVG without a background, for a page."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Title": title, "Software": None})
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
