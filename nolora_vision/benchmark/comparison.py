"""Methods compared within cells: the same dataset, model, rank and number of images, seed by seed with the baseline."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nolora_vision.benchmark.intervals import Difference, paired
from nolora_vision.benchmark.published import dataset_title
from nolora_vision.benchmark.results import Results, Run
from nolora_vision.benchmark.settings import ELSEWHERE, OF_THE_MACHINE, OF_THE_METHOD, Axes, own_fields

RANK = "adapter.rank"
TRAIN_SIZE = ("max_train_samples", "shots", "train_fraction")
"""Axes that say how many images are trained on."""


@dataclass(frozen=True, order=True)
class Cell:
    """Where methods are compared."""

    dataset: str
    model: str
    axes: Axes

    @property
    def conditions(self) -> str:
        """rank 8, 1,000 training images."""
        return ", ".join(axis_words(name, value) for name, value in self.axes)

    @property
    def title(self) -> str:
        """Dataset, model and conditions."""
        return " · ".join(part for part in (dataset_title(self.dataset), self.model, self.conditions) if part)

    def without(self, *names: str) -> Axes:
        """The axes but these."""
        return tuple(axis for axis in self.axes if axis[0] not in names)


def axis_words(name: str, value: Any) -> str:
    """One axis as a person says it: rank 8, 1,000 training images, epochs 5."""
    if name == RANK:
        return f"rank {value}"
    if name == "max_train_samples":
        return "all training images" if value is None else f"{value:,} training images"
    if isinstance(value, tuple):
        value = "+".join(map(str, value))
    return f"{name.removeprefix('adapter.').replace('_', ' ')} {value}"


@dataclass(frozen=True)
class Outcome:
    """A method in a cell: its final runs at the point that was chosen for it."""

    label: str
    point: Axes
    """Values of the axes that were chosen."""
    runs: tuple[Run, ...]
    """Final and done, by seed."""
    failures: tuple[Run, ...]
    at_edge: bool = False
    """The choice is at the edge of its grid: a better one may lie beyond."""
    edges: tuple[str, ...] | None = None
    """The axes at whose edge it is; None: the sweep, being older, does not say."""
    difference: Difference | None = None
    """To the baseline, over the seeds that both have; None for itself."""
    loss_difference: Difference | None = None
    """The same of the test loss, where less is better."""
    val_difference: Difference | None = None
    """The same of validation top-1 of the models that were tested: on the images by which their rates were chosen."""

    @cached_property
    def tests(self) -> dict[int, float]:
        """Test top-1 in percent by seed."""
        return {run.seed: run.test for run in self.runs if run.test is not None}

    @cached_property
    def vals(self) -> dict[int, float]:
        """Validation top-1 in percent by seed, of the runs that were tested."""
        return {run.seed: run.val for run in self.runs if run.test is not None and run.val is not None}

    @cached_property
    def losses(self) -> dict[int, float]:
        """Test cross-entropy in nats by seed."""
        found = {run.seed: run.number("metrics", "test_loss") for run in self.runs}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def mean(self) -> float | None:
        """Of test top-1."""
        return statistics.fmean(self.tests.values()) if self.tests else None

    def average(self, group: str, name: str) -> float | None:
        """Mean over the seeds of a number of the record; None where no run has it."""
        found = [value for run in self.runs if (value := run.number(group, name)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def parameters(self) -> float | None:
        """Trained parameters, the head's apart."""
        return self.average("parameters", "trainable_without_head")

    @cached_property
    def lost(self) -> tuple[int, int]:
        """How many of its seeds failed when they were to be tested, and of how many."""
        failed = {run.seed for run in self.failures if run.phase == "final"} - {run.seed for run in self.runs}
        return len(failed), len(failed) + len({run.seed for run in self.runs})

    def failed(self) -> str:
        """Why runs failed, each reason once with its count."""
        reasons = Counter(f"{run.phase}: {(run.error or '').strip().splitlines()[-1]}" for run in self.failures)
        return "; ".join(f"{reason} ({count}×)" if count > 1 else reason for reason, count in reasons.items())


@dataclass(frozen=True)
class Comparison:
    """All methods in one cell, the baseline first."""

    cell: Cell
    baseline: str
    outcomes: tuple[Outcome, ...]
    tried: tuple[Run, ...]
    """Runs of the choose phase that are done."""

    @property
    def differences(self) -> list[tuple[Outcome, Difference]]:
        """The outcomes that are compared with the baseline."""
        return [(o, o.difference) for o in self.outcomes if o.difference is not None]

    @property
    def intervals(self) -> int:
        """How many comparisons the cell makes: differences that have an interval."""
        return sum(difference.interval is not None for _, difference in self.differences)


def compare(results: Results) -> tuple[list[Comparison], list[str]]:
    """Every cell with its methods, and warnings of what was left out."""
    cells: dict[Cell, list[Run]] = {}
    for run, cell in _placed(results.runs):
        cells.setdefault(cell, []).append(run)
    order = method_order(results)
    warnings: list[str] = []
    found = [
        _compare_cell(cell, cells[cell], order, results.baseline, warnings) for cell in sorted(cells, key=_sort_key)
    ]
    return found, warnings


def method_order(results: Results) -> list[str]:
    """Labels: the baseline, then in the sweeps' order, then by name."""
    listed = [name for sweep in results.sweeps for name in sweep.named]
    present = {run.label for run in results.runs}
    return [name for name in dict.fromkeys((results.baseline, *listed, *sorted(present))) if name in present]


def _placed(runs: Sequence[Run]) -> Iterator[tuple[Run, Cell]]:
    """Each run with its cell; a method without an axis of adapters that its sweep has is in the cells of all values.

    So it is with an axis whose value the method sets itself.
    """
    places: dict[tuple[Any, ...], set[Axes]] = {}
    for run in runs:
        places.setdefault((run.sweep.folder, run.dataset, run.model), set()).add(run.cell_axes)
    for run in runs:
        here = places[run.sweep.folder, run.dataset, run.model]
        wider = {axes for axes in here if _is_wider(axes, run.cell_axes, own_fields(run))}
        for axes in wider or {run.cell_axes}:
            yield run, Cell(run.dataset, run.model, axes)


def _is_wider(other: Axes, axes: Axes, own: Set[str]) -> bool:
    """Whether the other has all of these values, and besides them only axes of adapters or the method's own."""
    more = set(other) - set(axes)
    only = all(name.startswith("adapter.") or name in own for name, _ in more)
    return len(other) == len(axes) + len(more) > len(axes) and only


def _sort_key(cell: Cell) -> tuple[Any, ...]:
    return cell.model, dataset_title(cell.dataset), [(name, *_by_size(value)) for name, value in cell.axes]


def _by_size(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by size, then texts, then None, which is no limit."""
    if isinstance(value, (int, float)):
        return 0, value, ""
    return (2, 0, "") if value is None else (1, 0, str(value))


def _compare_cell(
    cell: Cell, runs: Sequence[Run], order: Sequence[str], baseline: str, warnings: list[str]
) -> Comparison:
    labels = [label for label in order if any(run.label == label for run in runs)]
    outcomes = [_outcome(cell, label, [run for run in runs if run.label == label], warnings) for label in labels]
    reference = next((o for o in outcomes if o.label == baseline), None)
    compared = (o if o is reference or reference is None else _compared(o, reference) for o in outcomes)
    tried = tuple(run for run in runs if run.phase == "choose" and run.error is None)
    return Comparison(cell, baseline, tuple(compared), tried)


def _compared(outcome: Outcome, reference: Outcome) -> Outcome:
    top1, loss = paired(outcome.tests, reference.tests), paired(outcome.losses, reference.losses)
    top1 = top1 and replace(top1, failed=outcome.lost, baseline_failed=reference.lost)
    return replace(outcome, difference=top1, loss_difference=loss, val_difference=paired(outcome.vals, reference.vals))


def _outcome(cell: Cell, label: str, runs: Sequence[Run], warnings: list[str]) -> Outcome:
    finals = [run for run in runs if run.phase == "final"]
    points: dict[Axes, list[Run]] = {}
    for run in finals:
        points.setdefault(run.chosen_axes, []).append(run)
    if not points:
        return Outcome(label, (), (), tuple(run for run in runs if run.error))
    picked = {point: entry for point, found in points.items() if (entry := _chosen(found[0])) is not None}
    candidates = picked or points
    point = max(candidates, key=lambda p: (_mean_val(points[p]), str(p)))
    if len(points) > 1:
        why = "the sweep chose" if picked else "validation prefers"
        warnings.append(
            f"{label} in {cell.title}: final runs at {len(points)} points; only those at the one that {why} count"
        )
    here = points[point]
    done = sorted((run for run in here if run.error is None), key=lambda run: run.seed)
    entry = picked.get(point, {})
    edges = tuple(map(str, said)) if isinstance(said := entry.get("edges"), list) else None
    failures = [run for run in here if run.error] + [run for run in runs if run.phase == "choose" and run.error]
    return Outcome(label, point, tuple(done), tuple(failures), bool(entry.get("at_edge")), edges)


def _mean_val(runs: Sequence[Run]) -> float:
    found = [run.val for run in runs if run.val is not None]
    return statistics.fmean(found) if found else float("-inf")


def _chosen(run: Run) -> Mapping[str, Any] | None:
    """The sweep's choice that a run follows, if any."""
    for entry in run.sweep.chosen:
        wanted = {**(entry.get("cell") or {}), **(entry.get("point") or {})}
        if entry.get("label") == run.record["label"] and all(
            run.point[name] == value for name, value in wanted.items() if name in run.point
        ):
            return entry
    return None


def recipe_notes(comparison: Comparison) -> list[str]:
    """Fields of the recipe in which the final runs of a cell differ, besides what is the method's own or was chosen."""
    values: dict[str, dict[str, set[str]]] = {}
    for outcome in comparison.outcomes:
        for run in outcome.runs:
            apart = {*run.point, *run.sweep.choose_axes, *ELSEWHERE, *OF_THE_METHOD, *OF_THE_MACHINE}
            for name, value in (run.record.get("config") or {}).items():
                if name not in apart and not name.startswith("adapter"):
                    values.setdefault(name, {}).setdefault(outcome.label, set()).add(json.dumps(value, sort_keys=True))
    notes = []
    for name, by_label in sorted(values.items()):
        if len(set().union(*by_label.values())) > 1:
            of_value: dict[str, list[str]] = {}
            for label, found in by_label.items():
                of_value.setdefault(" and ".join(sorted(found)), []).append(label)
            *fewer, most = sorted(of_value.items(), key=lambda item: len(item[1]))
            rest = "the others" if len(most[1]) > 2 else ", ".join(most[1])
            said = "; ".join(f"{', '.join(labels)} {value}" for value, labels in [*fewer, (most[0], [rest])])
            notes.append(f"The recipes differ in {name}: {said}.")
    return notes
