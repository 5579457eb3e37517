"""The figures of a report: curves labelled at their ends, bars of differences, learned nonlinearities; in one style"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nolora_vision.benchmark.curves import BarPanel, Curve, Panel
from nolora_vision.benchmark.intervals import Difference, signed

INK = "#16181d"
"""Text, axes and the baseline; the page may put its own colour in its place."""
HIGHER, LOWER, NOT_SHOWN = "#0072B2", "#D55E00", "#9aa0aa"
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
LABEL_SIZE, LABEL_GAP = 8.5, 11.0
"""Of the labels at the ends of curves, and the least distance between two of them, in points."""
OUTLYING = 1.5
"""A curve that ends up so many times the others' range below them is named at the edge, not drawn: it would flatten all
others."""
DEEP = 4.0
"""A point is shown if it lies no more than so many points, or times their range, below the lowest of the best ones."""


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
def axes_of_figure(
    count: int, *, width: float = WIDTH, height: float = HEIGHT, columns: int = COLUMNS
) -> Iterator[Any]:
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
    with axes_of_figure(len(panels)) as (figure, axes):
        drawn = []
        for axis, panel in zip(axes, panels, strict=True):
            low = far_below(panel.curves)
            drawn.append([curve for curve in panel.curves if curve not in low])
            for curve in drawn[-1]:
                draw_curve(axis, curve, look)
            set_scale(axis, [point.x for curve in drawn[-1] for point in curve.points], scale)
            if (bottom := floor_of(drawn[-1])) is not None:
                axis.set_ylim(bottom=bottom)
            axis.set_title(panel.title, wrap=True)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            for i, curve in enumerate(low):
                text, place = f"↓ {curve.label} {max(p.mean for p in curve.points):.1f}", (0.99, 0.03 + 0.06 * i)
                colour = look.of(curve.label)["color"]
                axis.text(*place, text, transform=axis.transAxes, color=colour, fontsize=LABEL_SIZE, ha="right")
        figure.draw_without_rendering()  # only now do the axes have their places
        for axis, curves in zip(axes, drawn, strict=True):
            _label_ends(axis, curves, look)
    return figure


def floor_of(curves: Sequence[Curve]) -> float | None:
    """Where the axis ends below, as a run that failed to learn would flatten all else; None: nothing is that low."""
    best = [max(point.mean for point in curve.points) for curve in curves]
    floor = min(best) - max(DEEP * (max(best) - min(best)), DEEP)
    return floor if any(point.mean < floor for curve in curves for point in curve.points) else None


def far_below(curves: Sequence[Curve]) -> list[Curve]:
    """Curves whose best mean is far below those of all others, of which there are at least three."""
    best = {curve.label: max(point.mean for point in curve.points) for curve in curves}
    low: list[Curve] = []
    for curve in sorted(curves, key=lambda c: best[c.label]):
        others = [best[c.label] for c in curves if c is not curve and c not in low]
        if len(others) < 3 or best[curve.label] > min(others) - max(OUTLYING * (max(others) - min(others)), 1):
            break
        low.append(curve)
    return low


def draw_curve(axis: Any, curve: Curve, look: Look) -> None:
    """A line through the means, with 95 % intervals, the seeds as dots, and a ring around the best point."""
    style = look.of(curve.label)
    points = curve.points
    axis.plot([p.x for p in points], [p.mean for p in points], label=curve.label, **style)
    for point in points:
        axis.plot([point.x] * len(point.values), point.values, ".", color=style["color"], alpha=0.4, markersize=3)
        if point.interval is not None and len(point.values) >= FEWEST_FOR_INTERVALS:
            axis.vlines(point.x, *point.interval, color=style["color"], linewidth=1.2, alpha=0.8)
        if point is curve.best:
            axis.plot([point.x], [point.mean], "o", markersize=11, fillstyle="none", color=style["color"])


def set_scale(axis: Any, xs: Sequence[float], scale: str, *, labels: bool = True) -> None:
    """The x-axis of a scale of `curves_figure`; with room for labels at the ends of curves."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(x for x in (*xs, *[1.0] * (not any(xs))) if x > 0), max(*xs, 1e-12)
    if scale == "parameters" and min(xs) <= 0:
        axis.set_xscale("symlog", linthresh=low / 2, linscale=0.5)
    else:
        axis.set_xscale("log", base=2 if scale == "log2" else 10)
        room = max((high / low) ** 0.08, 1.6 if scale == "parameters" else 1.0) if high > low else 2
        axis.set_xlim(low / room, high * room)
    if labels:
        axis.set_xlim(right=high * (max(high / low, 10) ** 0.45))
    axis.xaxis.set_minor_locator(NullLocator())  # its labels would be formulas, which are not parsed here
    if scale == "parameters" or len(set(xs)) > 8:
        if axis.get_xscale() == "log" and high < 30 * low:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    else:
        axis.set_xticks(sorted(set(xs)), [f"{x:g}" if x < 1000 else f"{x:,.0f}" for x in sorted(set(xs))])


def _count(x: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:g} {letter}"
    return f"{x:g}"


def _label_ends(axis: Any, curves: Sequence[Curve], look: Look) -> None:
    """Each curve's name right of its end; where ends are close, the names stand in one column, in their order."""
    point = axis.figure.dpi / 72
    bottom = axis.get_ylim()[0]
    last = {c.label: next(p for p in reversed(c.points) if p.mean >= bottom) for c in curves}
    places = ((axis.transData.transform((p.x, p.mean)), label) for label, p in last.items())
    ends = sorted((float(x), float(y), label) for (x, y), label in places)
    columns: list[list[tuple[float, float, str]]] = []
    for end in ends:
        if columns and end[0] - columns[-1][-1][0] < 45 * point:
            columns[-1].append(end)
        else:
            columns.append([end])
    for column in columns:
        column.sort(key=lambda end: end[1])
        right = max(x for x, _, _ in column) + 9 * point
        heights = spread([y for _, y, _ in column], LABEL_GAP * point)
        for (x, y, label), height in zip(column, heights, strict=True):
            colour = look.of(label)["color"]
            shift = ((right - x) / point, (height - y) / point)
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3,
                     "relpos": (0, 0.5)}  # fmt: skip
            note = axis.annotate(
                label, axis.transData.inverted().transform((x, y)), shift, textcoords="offset points", va="center",
                color=colour, fontsize=LABEL_SIZE, arrowprops=arrow if abs(shift[1]) > 3 or shift[0] > 12 else None,
            )  # fmt: skip
            note.set_in_layout(False)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as it takes to be a gap apart: neighbours that touch share out their middle."""
    blocks: list[tuple[float, int]] = []  # middle, count
    for height in heights:
        middle, count = height, 1
        while blocks and middle - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            before, n = blocks.pop()
            middle, count = (before * n + middle * count) / (n + count), n + count
        blocks.append((middle, count))
    return [middle + gap * (i - (count - 1) / 2) for middle, count in blocks for i in range(count)]


def differences_figure(panels: Sequence[BarPanel], baseline: str) -> Any:
    """A panel for each cell: each method's mean difference to the baseline as a bar from 0, with its 95 % interval."""
    most = max(len(panel.bars) for panel in panels)
    with axes_of_figure(len(panels), height=0.95 + 0.32 * most) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            reach = _reach(panel)
            for y, bar in enumerate(panel.bars):
                _draw_bar(axis, y, bar.difference, reach)
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_xlim(-reach, reach)
            axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
            axis.set_ylim(len(panel.bars) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.set_title(panel.title, wrap=True)
            axis.set_xlabel(f"test top-1 minus {baseline} (points)")
    return figure


def _reach(panel: BarPanel) -> float:
    """The largest difference of a seed that is shown, the same to both sides; what is far beyond the others is cut."""
    sizes = sorted(max(map(abs, bar.difference.pairs)) for bar in panel.bars)
    means = sorted(abs(bar.difference.mean) for bar in panel.bars)
    while len(sizes) > 3 and means[-1] > 3 * sizes[len(sizes) // 2]:
        sizes.pop()
        means.pop()
    intervals = [abs(end) for bar in panel.bars for end in bar.difference.interval or ()]
    return 1.1 * max(sizes[-1], *(end for end in intervals if end < 2 * sizes[-1]), 0.1)


def _draw_bar(axis: Any, y: int, difference: Difference, reach: float) -> None:
    shown = difference.sign
    colour = {1: HIGHER, -1: LOWER, 0: NOT_SHOWN}[shown]
    axis.barh(y, difference.mean, height=0.55, color=colour)
    found = difference.interval
    if found and len(difference.pairs) >= FEWEST_FOR_INTERVALS:
        axis.hlines(y, *found, color=INK, linewidth=1.3)
    axis.plot(difference.pairs, [y] * len(difference.pairs), ".", color=INK, alpha=0.45, markersize=4)
    axis.annotate(
        signed(difference.mean), (1, y), (4, 0), xycoords=axis.get_yaxis_transform(), textcoords="offset points",
        va="center", fontsize=LABEL_SIZE, fontweight="bold" if shown else "normal", color=colour if shown else INK,
    )  # fmt: skip
    if abs(difference.mean) > reach:  # the bar is longer than the axis
        side = 0.99 if difference.mean > 0 else 0.01
        text = "beyond ▸" if difference.mean > 0 else "◂ beyond"
        axis.text(side, y, text, transform=axis.get_yaxis_transform(), color="white", fontsize=LABEL_SIZE, va="center",
                  ha="right" if difference.mean > 0 else "left")  # fmt: skip


def functions_figure(functions: Mapping[str, Any]) -> Any:
    """A panel for each method: its learned f, a line for each rank unit, blocks as colour; dashed before training."""
    from matplotlib import colormaps

    with axes_of_figure(len(functions), width=3.6, height=3.2, columns=3) as (figure, axes):
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
