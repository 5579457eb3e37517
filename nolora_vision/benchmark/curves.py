"""What the figures of a report show, as plain numbers: curves over parameters, rates, ranks and images, and bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nolora_vision.benchmark.comparison import RANK, TRAIN_SIZE, Cell, Comparison, Outcome
from nolora_vision.benchmark.intervals import Difference, interval
from nolora_vision.benchmark.published import dataset_title
from nolora_vision.benchmark.results import Run


@dataclass(frozen=True)
class Point:
    """A place on a curve: the values of all seeds there, in percent."""

    x: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean."""
        return interval(self.values)


@dataclass(frozen=True)
class Curve:
    """One method's points by x."""

    label: str
    points: tuple[Point, ...]
    best: Point | None = None
    """The point that is marked."""


@dataclass(frozen=True)
class Panel:
    """Curves that share axes."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Bar:
    """One method's difference to the baseline."""

    label: str
    difference: Difference


@dataclass(frozen=True)
class BarPanel:
    """The bars of one cell."""

    title: str
    bars: tuple[Bar, ...]


def by_parameters(comparisons: Sequence[Comparison]) -> list[Panel]:
    """Test top-1 over trained parameters without the head, the ranks of a method joined by a line."""
    panels = _over(comparisons, (RANK,), lambda c, o: o.parameters)
    return [panel for panel in panels if len({p.x for curve in panel.curves for p in curve.points}) > 1]


def by_rank(comparisons: Sequence[Comparison]) -> list[Panel]:
    """Test top-1 over the rank, of methods with several."""
    return _several(_over(comparisons, (RANK,), lambda c, o: dict(c.cell.axes).get(RANK)))


def by_train_size(comparisons: Sequence[Comparison]) -> list[Panel]:
    """Test top-1 over the number of training images, of methods with several."""
    return _several(_over(comparisons, TRAIN_SIZE, lambda c, o: o.average("dataset", "train_images")))


def _several(panels: Iterable[Panel]) -> list[Panel]:
    cut = (Panel(p.title, tuple(curve for curve in p.curves if len(curve.points) > 1)) for p in panels)
    return [panel for panel in cut if panel.curves]


def _over(
    comparisons: Sequence[Comparison], joined: Sequence[str], of: Callable[[Comparison, Outcome], Any]
) -> list[Panel]:
    """A panel for each cell but for the joined axes; outcomes without an x, or that share it, are drawn once."""
    groups: dict[Cell, dict[str, dict[float, Point]]] = {}
    for comparison in comparisons:
        cell = comparison.cell
        place = Cell(cell.dataset, cell.model, cell.without(*joined))
        for outcome in comparison.outcomes:
            x = of(comparison, outcome)
            if outcome.tests and x is not None:
                curve = groups.setdefault(place, {}).setdefault(outcome.label, {})
                curve.setdefault(float(x), Point(float(x), tuple(outcome.tests.values())))
    return [
        Panel(_title(place), tuple(Curve(label, _sorted(points)) for label, points in curves.items()))
        for place, curves in groups.items()
    ]


def _sorted(points: Mapping[float, Point]) -> tuple[Point, ...]:
    return tuple(points[x] for x in sorted(points))


def _title(cell: Cell) -> str:
    return ", ".join(part for part in (dataset_title(cell.dataset), cell.conditions) if part)


def by_learning_rate(comparisons: Sequence[Comparison], axis: str = "lr") -> list[Panel]:
    """Validation top-1 of the choose phase over one chosen axis, the others at their best; the best point is marked."""
    panels = []
    for comparison in comparisons:
        runs: dict[str, dict[float, dict[Any, list[Run]]]] = {}
        for run in comparison.tried:
            x = run.point.get(axis)
            if isinstance(x, (int, float)) and x > 0 and axis in run.sweep.choose_axes and run.val is not None:
                runs.setdefault(run.label, {}).setdefault(float(x), {}).setdefault(run.chosen_axes, []).append(run)
        order = [outcome.label for outcome in comparison.outcomes if len(runs.get(outcome.label, ())) > 1]
        curves = tuple(_rate_curve(label, runs[label]) for label in order)
        if curves:
            panels.append(Panel(_title(comparison.cell), curves))
    return panels


def _rate_curve(label: str, by_x: Mapping[float, Mapping[Any, Sequence[Run]]]) -> Curve:
    points = []
    for x in sorted(by_x):
        settings = [tuple(run.val for run in runs if run.val is not None) for runs in by_x[x].values()]
        points.append(max((Point(x, values) for values in settings), key=_most_seeds_then_mean))
    return Curve(label, tuple(points), max(points, key=_most_seeds_then_mean))


def _most_seeds_then_mean(point: Point) -> tuple[int, float]:
    """Means over different numbers of seeds are not compared: while choosing is under way some points have fewer."""
    return len(point.values), point.mean


def difference_bars(comparisons: Sequence[Comparison]) -> list[BarPanel]:
    """Every method's difference to the baseline, cell by cell."""
    panels = (
        BarPanel(_title(c.cell), tuple(Bar(outcome.label, difference) for outcome, difference in c.differences))
        for c in comparisons
    )
    return [panel for panel in panels if panel.bars]
