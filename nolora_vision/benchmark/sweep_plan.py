"""What a sweep consists of: methods × cells, rates chosen by validation, seeds; and which runs are still missing."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nolora_vision.benchmark.sweep_checks import problems_of
from nolora_vision.benchmark.sweep_task import Phase, Point, Results, Task, make_task
from nolora_vision.config import ConfigError, Problem
from nolora_vision.training.config_file import read_yaml
from nolora_vision.training.errors import NotFiniteError
from nolora_vision.training.kinds import Text, Whole, from_mapping, settle, unaffected

_NOT_FINITE = re.compile(r"The (loss|gradient) is (nan|-?inf) at step")


@dataclass(frozen=True)
class Choose:
    """What is chosen for each method in each cell, on validation images only."""

    axes: Mapping[Text, Sequence[int | float]]
    """Candidates, in rising order; every method gets as many."""
    seeds: Sequence[Whole] = (100, 101)
    """Of the runs that choose; none of them is among the seeds that are reported."""
    extend: Whole = 2
    """How often a candidate beyond the best one may be added on each axis at whose edge that is."""

    def __post_init__(self) -> None:
        problems, _ = settle(self)
        if problems:
            raise ConfigError("Choose", problems)


@dataclass(frozen=True)
class Sweep:
    """A base config, methods that differ from it, axes along which all of them are compared, and seeds."""

    methods: Mapping[Text, Mapping[Text, Any]]
    """By name: fields of RunConfig; also `choose`: own candidates of an axis, or null where the method has no use for
    it, as many in all as the others have; `only`: axis → values to which it keeps."""
    base: Mapping[Text, Any] = field(default_factory=dict)
    """Fields of RunConfig for all runs."""
    axes: Mapping[Text, Sequence[Any]] = field(default_factory=dict)
    """Their product is the cells."""
    choose: Choose | None = None
    seeds: Sequence[Whole] = (0, 1, 2, 3, 4)
    """Of the runs that are tested."""
    baseline: Text = "lora"
    """The method that others are compared with."""
    keep_adapters: bool = False
    """Keep the folders of tested runs: adapter, pictures."""
    description: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        problems, bad = settle(self)
        if "methods" not in bad:
            problems += unaffected(list(problems_of(self)), bad)
        if problems:
            raise ConfigError(f"Sweep {self.name}".rstrip(), problems)

    def candidates(self, label: str) -> dict[str, list[float]]:
        """Candidates of a method by axis."""
        if self.choose is None:
            return {}
        every = {**self.choose.axes, **self.methods[label].get("choose", {})}
        return {axis: list(values) for axis, values in every.items() if values is not None}

    def cells(self, label: str | None = None) -> Iterator[Point]:
        """Every combination of the axes; those in which a method takes part."""
        only = {} if label is None else self.methods[label].get("only", {})
        for values in itertools.product(*self.axes.values()):
            cell = dict(zip(self.axes, values, strict=True))
            if all(cell[axis] in kept for axis, kept in only.items()):
                yield cell


@dataclass(frozen=True)
class Choice:
    """What validation says of a method in a cell."""

    label: str
    cell: Point
    point: Point
    val_top1_percent: float
    """Mean over the choosing seeds."""
    trials: int
    """Candidates that were tried."""
    at_edge: bool
    """Whether the best is still at an edge of them."""
    edges: tuple[str, ...] = ()
    """The axes at whose edge it is."""


@dataclass(frozen=True)
class Held:
    """A method for which nothing can be chosen in a cell."""

    label: str
    cell: Point
    why: str

    def __str__(self) -> str:
        where = "".join(f", {axis} {value}" for axis, value in self.cell.items())
        return f"{self.label}{where}: nothing is chosen and tested, as {self.why}"


@dataclass(frozen=True)
class Plan:
    """What counts of a sweep, as far as it is known."""

    tasks: tuple[Task, ...]
    """All runs, done or not, in their order."""
    choices: tuple[Choice, ...]
    held: tuple[Held, ...]

    def missing(self, results: Results) -> list[Task]:
        """The runs that can be done next."""
        return [task for task in self.tasks if task.record_in(results) is None]

    def counted(self, results: Results) -> dict[str, Mapping[str, Any]]:
        """The records of its runs; a folder may hold others, of settings that it had before."""
        found = ((task.name, task.record_in(results)) for task in self.tasks)
        return {name: record for name, record in found if record is not None}


def read_sweep(path: Path) -> Sweep:
    """A sweep from its YAML file.

    Raises:
        ConfigError: if it is absent or unusable; every problem is listed.
    """
    sweep = from_mapping(Sweep, {"name": path.stem, **read_yaml(path)}, str(path))
    problems = dict.fromkeys(problem for label in sweep.methods for problem in _run_problems(sweep, label))
    if problems:
        raise ConfigError(str(path), problems)
    return sweep


def _run_problems(sweep: Sweep, label: str) -> Iterator[Problem]:
    """What is wrong with a method's runs: its first one, and those that differ from it in one value."""
    candidates = sweep.candidates(label)
    first = {**next(sweep.cells(label)), **{axis: values[0] for axis, values in candidates.items()}}
    others = [{**first, axis: cell[axis]} for cell in sweep.cells(label) for axis in cell]
    others += [{**first, axis: value} for axis, values in candidates.items() for value in values]
    phase: Phase = "final" if sweep.choose is None else "choose"
    for point in {str(point): point for point in (first, *others)}.values():
        try:
            make_task(sweep, label, phase, {}, point, sweep.seeds[0])
        except ConfigError as error:
            yield from (Problem(f"{label}: {problem}") for problem in error.problems)


def plan(sweep: Sweep, results: Results) -> tuple[list[Task], list[Choice]]:
    """The runs that can be done next, in order, and what has been chosen so far."""
    found = whole_plan(sweep, results)
    return found.missing(results), list(found.choices)


def whole_plan(sweep: Sweep, results: Results) -> Plan:
    """All runs that count, what has been chosen so far, and what cannot be.

    What is chosen is tested before more is tried, so that a sweep that is stopped has whole rows.
    """
    tried: list[Task] = []
    choices: list[Choice] = []
    held: list[Held] = []
    for cell in sweep.cells():
        for label in sweep.methods:
            if cell not in list(sweep.cells(label)):
                continue
            tasks, outcome = _choosing(sweep, label, cell, results)
            tried += tasks
            if isinstance(outcome, Choice):
                choices.append(outcome)
            elif outcome is not None:
                held.append(outcome)
    tests = [make_task(sweep, c.label, "final", c.cell, c.point, seed) for seed in sweep.seeds for c in choices]
    return Plan((*tests, *tried), tuple(choices), tuple(held))


# ------------------------------------------------------------------------------------------------------- the choosing


def _choosing(sweep: Sweep, label: str, cell: Point, results: Results) -> tuple[list[Task], Choice | Held | None]:
    """All choosing runs of a method in a cell that are due, and once they are done the choice, or why there is none."""
    if sweep.choose is None:
        return [], Choice(label, cell, cell, math.nan, 1, at_edge=False)
    values, tasks = sweep.candidates(label), []
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    for extension in range(sweep.choose.extend + 1):
        due = [[make_task(sweep, label, "choose", cell, {**cell, **p}, s) for s in sweep.choose.seeds] for p in points]
        tasks = [task for of_point in due for task in of_point]
        records = {task.name: task.record_in(results) for task in tasks}
        if None in records.values():
            return tasks, None
        done = {name: record for name, record in records.items() if record is not None}
        if why := _no_choice(done):
            return tasks, Held(label, cell, why)
        means = [statistics.fmean(_score(done[task.name]) for task in of_point) for of_point in due]
        highest = max(means)
        best = points[means.index(highest)]  # of equal ones the first
        edges = [axis for axis, tried in values.items() if len(tried) > 1 and best[axis] in (tried[0], tried[-1])]
        if not edges or extension == sweep.choose.extend:
            at = tuple(edges)
            return tasks, Choice(label, cell, {**cell, **best}, highest, len(points), at_edge=bool(at), edges=at)
        for axis in edges:  # beyond the best one only: all others of that value would be lower still, or by chance
            further = _beyond(values[axis], best[axis])
            if _is_usable(sweep, label, cell, {**cell, **best, axis: further}):
                values[axis] = sorted([*values[axis], further])
                points.append({**best, axis: further})
    raise AssertionError("the last extension returns")


def _no_choice(records: Results) -> str | None:
    """Why these records allow no choice: a failure of the machine says nothing of a rate; None if they allow one."""
    failed = [record for record in records.values() if record["status"] == "failed" and not diverged(record)]
    if failed:
        reason = failed[0]["error"].strip().splitlines()[-1] if failed[0]["error"].strip() else "no reason recorded"
        return f"{len(failed)} of {len(records)} runs to choose by failed ({reason}). --retry-failed runs them again."
    if all(record["status"] == "failed" for record in records.values()):
        return f"in all {len(records)} runs to choose by the loss or gradient was not finite. Give smaller candidates."
    return None


def diverged(record: Mapping[str, Any]) -> bool:
    """Whether a run failed by numbers that were not finite, and not by what the machine or the method lacks."""
    if "error_type" in record:
        return record["error_type"] == NotFiniteError.__name__
    return _NOT_FINITE.search(record["error"]) is not None


def _score(record: Mapping[str, Any]) -> float:
    """Validation top-1; a run whose numbers were not finite loses to every other."""
    return record["metrics"]["val_top1_percent"] if record["status"] == "done" else -math.inf


def _beyond(values: Sequence[float], edge: float) -> float:
    """The next value beyond the edge, by the ratio of the two there."""
    lowest = edge == values[0]
    further = float(f"{edge * edge / (values[1] if lowest else values[-2]):.3g}")
    if not all(isinstance(value, int) for value in values):
        return further
    return min(round(further), edge - 1) if lowest else max(round(further), edge + 1)


def _is_usable(sweep: Sweep, label: str, cell: Point, point: Point) -> bool:
    """Whether a candidate that was not asked for is one at all: there is no rank below 1, no smoothing above."""
    try:
        make_task(sweep, label, "choose", cell, point, sweep.seeds[0])
    except ConfigError:
        return False
    return True
