"""What a sweep consists of: methods × cells, rates chosen by validation, seeds; and which runs are still missing."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from nolora_vision.benchmark.sweep_checks import problems_of
from nolora_vision.config import ConfigError, Problem, shown
from nolora_vision.training.config_file import as_plain, make_run_config, read_yaml
from nolora_vision.training.kinds import Text, Whole, from_mapping, settle, unaffected
from nolora_vision.training.neutral import NEUTRAL
from nolora_vision.training.run_config import RunConfig

Point = Mapping[str, Any]
"""Values of axes by their dotted names: `{"lr": 2e-3, "adapter.rank": 8}`."""
Phase = Literal["choose", "final"]
Results = Mapping[str, Mapping[str, Any]]
"""Records by the name of their task."""


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
class Task:
    """One run."""

    label: str
    phase: Phase
    cell: Point
    point: Point
    """The cell's values and the candidate."""
    seed: int
    config: RunConfig

    @cached_property
    def name(self) -> str:
        """Of its result's file: made of what differs from the defaults, so that new fields leave it as it is."""
        usual = _usual()
        facts = {k: v for k, v in self._settings.items() if v != usual.get(k)}
        text = json.dumps({"phase": self.phase, **facts}, sort_keys=True)
        slug = "".join(c if c.isalnum() else "-" for c in self.label)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def record_in(self, results: Results) -> Mapping[str, Any] | None:
        """Its record, unless that was made under other defaults."""
        record = results.get(self.name)
        if record is None:
            return None
        then, now = _flat(record["config"]), self._settings
        return record if all(then[key] == now[key] for key in then.keys() & now.keys()) else None

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return _flat(as_plain(asdict(self.config)))


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
    """The runs that can be done next, in order, and what has been chosen so far.

    What is chosen is tested before more is tried, so that a sweep that is stopped has whole rows.
    """
    missing: list[Task] = []
    choices: list[Choice] = []
    for cell in sweep.cells():
        for label in sweep.methods:
            if cell not in list(sweep.cells(label)):
                continue
            tasks, choice = _choosing(sweep, label, cell, results)
            missing += [task for task in tasks if task.record_in(results) is None]
            if choice is not None:
                choices.append(choice)
    tests = [make_task(sweep, c.label, "final", c.cell, c.point, seed) for seed in sweep.seeds for c in choices]
    return [*(task for task in tests if task.record_in(results) is None), *missing], choices


def make_task(sweep: Sweep, label: str, phase: Phase, cell: Point, point: Point, seed: int) -> Task:
    """The run of a method at a point, its config made and checked."""
    own = {name: value for name, value in sweep.methods[label].items() if name not in ("choose", "only")}
    settings: dict[str, Any] = {}
    for layer in (sweep.base, own, point, {"seed": seed}):
        _merge(settings, layer)
    owner = f"{label} of {sweep.name or 'the sweep'}"
    config = make_run_config(settings, owner=owner).resolved()
    if phase == "choose" and config.train_on == "train_val":
        raise ConfigError(
            owner, ["train_on is train_val, so no validation images are left to choose by: set it to train."]
        )
    return Task(label, phase, cell, point, seed, config)


# ------------------------------------------------------------------------------------------------------- the choosing


def _choosing(sweep: Sweep, label: str, cell: Point, results: Results) -> tuple[list[Task], Choice | None]:
    """All choosing runs of a method in a cell that are due, and the choice once they are done."""
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
        means = [statistics.fmean(_score(records[task.name]) for task in of_point) for of_point in due]
        highest = max(means)
        best = points[means.index(highest)]  # of equal ones the first
        edges = [axis for axis, tried in values.items() if len(tried) > 1 and best[axis] in (tried[0], tried[-1])]
        if not edges or extension == sweep.choose.extend or highest == -math.inf:
            return tasks, Choice(label, cell, {**cell, **best}, highest, len(points), at_edge=bool(edges))
        for axis in edges:  # beyond the best one only: all others of that value would be lower still, or by chance
            further = _beyond(values[axis], best[axis])
            if _is_usable(sweep, label, cell, {**cell, **best, axis: further}):
                values[axis] = sorted([*values[axis], further])
                points.append({**best, axis: further})
    raise AssertionError("the last extension returns")


def _score(record: Mapping[str, Any] | None) -> float:
    """Validation top-1; a run that failed, as by a loss that is not finite, loses to every other."""
    assert record is not None
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


# ---------------------------------------------------------------------------------------------------------- the values


@cache
def _usual() -> Mapping[str, Any]:
    return _flat(as_plain(asdict(RunConfig())))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names → values, without what changes no result; a mapping that may hold anything stays one value."""
    found = {}
    for name, value in values.items():
        if name == "adapter" and isinstance(value, Mapping):
            found |= _flat(value, "adapter.")
        elif name not in NEUTRAL:
            found[prefix + name] = value
    return found


def _merge(settings: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put values into nested settings; a dotted name reaches into a nested one."""
    for name, value in layer.items():
        head, _, rest = name.partition(".") if isinstance(name, str) else (name, "", "")
        if not rest and not isinstance(value, Mapping):
            settings[head] = value
            continue
        inner = settings.setdefault(head, {})
        if not isinstance(inner, dict):
            raise ConfigError("The sweep", [f"{name} reaches into {head}, and that is {shown(inner)}."])
        _merge(inner, {rest: value} if rest else value)
