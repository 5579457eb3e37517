"""What is wrong with a sweep: methods, axes, candidates and seeds that do not go together; every problem at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nolora_vision.config import LARGEST_FLOAT, Problem, shown
from nolora_vision.training.run_checks import is_file_name

if TYPE_CHECKING:
    from nolora_vision.benchmark.sweep_plan import Sweep

OWN = ("seed", "output", "experiment", "resume", "resume_changed", "eval_only", "adapter_dir")
"""Fields of RunConfig that a sweep sets itself, or has no use for."""


def problems_of(sweep: Sweep) -> Iterator[Problem]:
    """A sentence for each; whether the runs themselves can be configured is another question."""
    if not sweep.methods:
        yield Problem("methods is empty.", "methods")
    if sweep.baseline not in sweep.methods:
        text = f"baseline must be one of the methods, {', '.join(sweep.methods)}; got {shown(sweep.baseline)}."
        yield Problem(text, "baseline", "methods")
    if sweep.name and not is_file_name(sweep.name):
        yield Problem(f"name must be one for the folder of the results, got {shown(sweep.name)}.", "name")
    yield from _seed_problems(sweep)
    yield from _axis_problems(sweep)
    layers = {"base": sweep.base, "axes": sweep.axes, **{f"methods.{name}": own for name, own in sweep.methods.items()}}
    for where, layer in layers.items():
        for name in sorted(set(layer) & set(OWN)):
            yield Problem(
                f"{where}: {name} is no field of a run in a sweep, which decides about it: leave it out.", where
            )
    for label, own in sweep.methods.items():
        yield from _cell_problems(sweep, label, own.get("only", {}))
    if sweep.choose is not None:
        yield from _candidate_problems(sweep, sweep.choose.axes)


def _seed_problems(sweep: Sweep) -> Iterator[Problem]:
    groups = [("seeds", sweep.seeds)] + ([("choose.seeds", sweep.choose.seeds)] if sweep.choose else [])
    for name, seeds in groups:
        if not seeds:
            yield Problem(f"{name} is empty, so nothing would be {'tested' if name == 'seeds' else 'chosen'}.", name)
        if len(set(seeds)) < len(seeds):
            yield Problem(f"{name} has one twice: {shown(list(seeds))}.", name)
    if sweep.choose is not None and set(sweep.choose.seeds) & set(sweep.seeds):
        yield Problem("the seeds of choose must not be among the seeds that are tested.", "seeds", "choose.seeds")


def _axis_problems(sweep: Sweep) -> Iterator[Problem]:
    for axis, values in sweep.axes.items():
        if not values:
            yield Problem(f"axes: {axis} has no values, so there would be no runs.", "axes")
        if any(value in values[:place] for place, value in enumerate(values)):
            yield Problem(f"axes: {axis} has a value twice: {shown(list(values))}.", "axes")
        if sweep.choose is not None and axis in sweep.choose.axes:
            yield Problem(f"{axis} is in axes and in choose.", "axes", "choose.axes")


def _cell_problems(sweep: Sweep, label: str, only: Any) -> Iterator[Problem]:
    """Of the cells in which a method takes part."""
    if not isinstance(only, Mapping) or not all(_is_list(kept) for kept in only.values()):
        yield Problem(f"{label}: only must be axes with lists of their values, got {shown(only)}.", "methods")
        return
    for axis, kept in only.items():
        if axis not in sweep.axes:
            text = f"{label}: only {axis} is no axis. Axes: {', '.join(sweep.axes) or 'none'}."
            yield Problem(text, "methods", "axes")
        elif not kept or any(value not in sweep.axes[axis] for value in kept):
            text = (
                f"{label}: only {axis} must be some of its values, {shown(list(sweep.axes[axis]))}, got {shown(kept)}."
            )
            yield Problem(text, "methods", "axes")


def _candidate_problems(sweep: Sweep, axes: Mapping[str, Sequence[float]]) -> Iterator[Problem]:
    if not axes:
        yield Problem("choose.axes is empty, so there would be nothing to choose.", "choose.axes")
    for axis, values in axes.items():
        yield from _order_problems("choose", axis, values)
    trials = math.prod(map(len, axes.values()))
    for label, method in sweep.methods.items():
        own = method.get("choose", {})
        if not isinstance(own, Mapping) or not all(value is None or _is_list(value) for value in own.values()):
            text = f"{label}: choose must be axes with lists of candidates, or null, got {shown(own)}."
            yield Problem(text, "methods")
            continue
        for axis, values in own.items():
            if axis not in axes:
                yield Problem(f"{label}: choose {axis} is no axis of choose: {', '.join(axes)}.", "methods", "choose")
            elif values is not None:
                yield from _order_problems(label, axis, values)
        count = math.prod(map(len, sweep.candidates(label).values()))
        if count != trials:
            text = f"{label}: choose must give {trials} candidates, as all methods have, for equal trials; got {count}."
            yield Problem(text, "methods", "choose")


def _order_problems(owner: str, axis: str, values: Sequence[Any]) -> Iterator[Problem]:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    usable = len(numbers) == len(values) and all(0 < value <= LARGEST_FLOAT for value in numbers)
    if not usable or not numbers or sorted(set(numbers)) != numbers:
        text = f"{owner}: the candidates of {axis} must be positive and in rising order, got {shown(list(values))}."
        yield Problem(text, "methods" if owner != "choose" else "choose.axes")


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))
