"""The tables of a report, as text with what to sort by: one for each cell, one over datasets, and what failed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nolora_vision.benchmark.comparison import Comparison, Outcome, recipe_notes
from nolora_vision.benchmark.intervals import LEVEL, Difference, not_counted, signed
from nolora_vision.benchmark.published import vtab_task
from nolora_vision.benchmark.settings import Axes


@dataclass(frozen=True)
class Value:
    """What stands in a table."""

    text: str
    sort: float | str | None = None
    """What to sort by; None: the text."""


@dataclass(frozen=True)
class Table:
    """Columns without any text are left out of `rows`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    published: tuple[bool, ...] = ()
    """For each row whether it is of somebody else's paper; empty: none is."""


EMPTY = Value("", float("-inf"))
Column = tuple[str, Callable[[Outcome], Value]]


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Value]],
    *,
    notes: Iterable[str] = (),
    published: Sequence[bool] = (),
) -> Table:
    """A table of the columns that have a text anywhere."""
    kept = [i for i in range(len(columns)) if any(row[i].text for row in rows)]
    cut = tuple(tuple(row[i] for i in kept) for row in rows)
    return Table(title, tuple(columns[i] for i in kept), cut, tuple(notes), tuple(published))


def number(value: float | None, form: str, per: float = 1) -> Value:
    """A number divided by its unit, or nothing."""
    return EMPTY if value is None else Value(format(value / per, form), value)


def mean_and_spread(tests: Sequence[float], digits: int = 2) -> Value:
    """86.07 ± 0.53: mean and standard deviation; one value has no deviation."""
    if not tests:
        return EMPTY
    mean = statistics.fmean(tests)
    return Value(f"{mean:.{digits}f}" + (f" ± {statistics.stdev(tests):.{digits}f}" if len(tests) > 1 else ""), mean)


def difference_value(difference: Difference | None, digits: int = 2) -> Value:
    """+0.30 (−0.50 to +1.10): mean and interval, as far as there is one."""
    if difference is None:
        return EMPTY
    found = difference.interval
    reach = "" if found is None else f" ({signed(found[0], digits)} to {signed(found[1], digits)})"
    return Value(signed(difference.mean, digits) + reach, difference.mean)


def outcomes_value(difference: Difference | None) -> Value:
    """2 / 0 / 1: won, tied, lost."""
    if difference is None:
        return EMPTY
    wins, ties, losses = difference.outcomes
    return Value(f"{wins} / {ties} / {losses}", wins - losses)


def verdict(outcome: Outcome) -> str:
    """What may be said of an outcome."""
    if outcome.difference is not None:
        return outcome.difference.verdict
    if outcome.tests:
        return not_counted(*outcome.lost)
    return "failed" if outcome.failures else "not tested yet"


def cell_table(comparison: Comparison, title: str = "") -> Table:
    """All methods of a cell with accuracy, difference to the baseline, and costs."""
    axes = dict.fromkeys(name for outcome in comparison.outcomes for name, _ in outcome.point)
    columns: list[Column] = [
        ("method", lambda o: Value(o.label + (" (baseline)" if o.label == comparison.baseline else ""), o.label)),
        ("test top-1 (%)", lambda o: mean_and_spread(list(o.tests.values()))),
        ("seeds", lambda o: number(len(o.tests) or None, ".0f")),
        (
            f"minus {comparison.baseline} ({LEVEL:.0%} interval)".replace("%", " %"),
            lambda o: difference_value(o.difference),
        ),
        ("seeds won / tied / lost", lambda o: outcomes_value(o.difference)),
        ("what is shown", lambda o: Value(verdict(o))),
        ("test loss", lambda o: mean_and_spread(list(o.losses.values()), 3)),
        (f"test loss minus {comparison.baseline}'s", lambda o: difference_value(o.loss_difference, 3)),
        *((name.replace("_", " "), _chosen_value(name)) for name in sorted(axes, key=_by_sweep(comparison))),
        (f"minus {comparison.baseline} on validation images", lambda o: difference_value(o.val_difference)),
        ("validation top-1 (%)", lambda o: number(o.average("metrics", "val_top1_percent"), ".2f")),
        ("parameters without head", lambda o: number(o.parameters, ",.0f")),
        ("training (s)", lambda o: number(o.average("metrics", "train_seconds"), ",.1f")),
        ("peak memory (MiB)", lambda o: number(o.average("metrics", "peak_memory_bytes"), ",.0f", 2**20)),
        ("adapter (MiB)", lambda o: number(o.average("metrics", "adapter_bytes"), ",.2f", 2**20)),
        ("training (images/s)", lambda o: number(o.average("metrics", "train_images_per_s"), ",.0f")),
        ("test (images/s)", lambda o: number(o.average("metrics", "test_images_per_s"), ",.0f")),
        ("failed", lambda o: Value(o.failed())),
    ]
    rows = [[value(outcome) for _, value in columns] for outcome in comparison.outcomes]
    notes = [*_counting_notes(comparison), *_cost_notes(comparison), *recipe_notes(comparison)]
    return make_table(title or comparison.cell.title, [name for name, _ in columns], rows, notes=notes)


def _by_sweep(comparison: Comparison) -> Callable[[str], int]:
    """Sorts axes as the sweep names them."""
    named = [axis for outcome in comparison.outcomes for run in outcome.runs for axis in run.sweep.choose_axes]
    order = {axis: i for i, axis in enumerate(dict.fromkeys(named))}
    return lambda axis: order.get(axis, len(order))


def _chosen_value(axis: str) -> Callable[[Outcome], Value]:
    def value(outcome: Outcome) -> Value:
        found = dict(outcome.point).get(axis)
        if found is None:
            return EMPTY
        edge = " (edge)" if outcome.at_edge and (outcome.edges is None or axis in outcome.edges) else ""
        return Value(f"{found:g}{edge}", found) if isinstance(found, (int, float)) else Value(f"{found}{edge}")

    return value


def _counting_notes(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.intervals:
        notes.append(multiplicity([difference for _, difference in comparison.differences], "This table"))
    if any(o.loss_difference and o.loss_difference.interval for o in comparison.outcomes):
        notes.append("The test loss is the cross-entropy in nats, less is better; its intervals are not counted above.")
    if any(o.val_difference and o.val_difference.interval for o in comparison.outcomes):
        which = "the validation images" + (", which chose their rates with other seeds" if comparison.tried else "")
        notes.append(
            f"All seeds are tested on the same images. The same models on {which}: what is not there hangs on which "
            "images are looked at. Not counted above either."
        )
    if edges := [outcome.label for outcome in comparison.outcomes if outcome.at_edge]:
        notes.append(f"Chosen at the edge of the grid, so a better choice may lie beyond it: {', '.join(edges)}.")
    if not any(outcome.label == comparison.baseline and outcome.tests for outcome in comparison.outcomes):
        notes.append(f"{comparison.baseline}, the baseline, has no test result here, so nothing is compared.")
    return notes


UNNAMED = frozenset({"x86_64", "AMD64", "aarch64", "arm64"})
"""What older records call every processor of a kind."""


def _cost_notes(comparison: Comparison) -> list[str]:
    runs = [run for outcome in comparison.outcomes for run in outcome.runs]
    notes = []
    devices = sorted({str(device) for run in runs if (device := (run.record.get("environment") or {}).get("device"))})
    if len(devices) > 1:
        notes.append(f"Times come from different devices and are not to be compared: {', '.join(devices)}.")
    elif set(devices) & UNNAMED:
        notes.append(f"The records do not say which processor, but {devices[0]}: times may be of several.")
    if any((run.record.get("metrics") or {}).get("peak_memory_of") == "process, resident" for run in runs):
        notes.append(
            "Peak memory is what the whole process held at most until the run's end; where one process makes several "
            "runs, those before count, too."
        )
    return notes


def multiplicity(differences: Sequence[Difference], subject: str) -> str:
    """How many comparisons are made, how many exclude 0, by chance, and after Bonferroni's correction."""
    tested = [difference for difference in differences if difference.interval is not None]
    n, shown = len(tested), sum(difference.excludes_zero() for difference in tested)
    strict = sum(difference.excludes_zero(n) for difference in tested)
    comparisons = "1 comparison" if n == 1 else f"{n} comparisons"
    text = f"{subject} makes {comparisons} at {LEVEL:.0%}".replace("%", " %")
    if n < 2:
        return f"{text}."
    if not shown:
        return f"{text}; none of the intervals excludes 0."
    return (
        f"{text}: {shown} of the intervals {'excludes' if shown == 1 else 'exclude'} 0, where {n * (1 - LEVEL):.1f} "
        "would by chance if no method differed; "
        f"{strict} still {'does' if strict == 1 else 'do'} after Bonferroni's correction for {n}."
    )


def failed_notes(comparisons: Iterable[Comparison]) -> list[str]:
    """Which seeds failed and so are in no mean."""
    lost = [
        f"{o.label} on {c.cell.dataset}: {not_counted(*o.lost)}" for c in comparisons for o in c.outcomes if o.lost[0]
    ]
    return [f"{'; '.join(lost)}."] if lost else []


def across_datasets(comparisons: Sequence[Comparison]) -> list[Table]:
    """For each model and conditions with several datasets: averages, mean differences, datasets won."""
    tables = []
    for (model, _), group in by_conditions(comparisons).items():
        for vtab in (False, True):
            part = [comparison for comparison in group if bool(vtab_task(comparison.cell.dataset)) == vtab]
            if len(part) > 1:
                tables.append(_across(f"{len(part)} {'tasks of VTAB-1k' if vtab else 'datasets'}", model, part))
    return tables


def by_conditions(comparisons: Sequence[Comparison]) -> Mapping[tuple[str, Axes], list[Comparison]]:
    """Comparisons of the same model and conditions, whatever the dataset."""
    groups: dict[tuple[str, Axes], list[Comparison]] = {}
    for comparison in comparisons:
        if any(outcome.tests for outcome in comparison.outcomes):
            groups.setdefault((comparison.cell.model, comparison.cell.axes), []).append(comparison)
    return groups


def mean_differences(label: str, group: Sequence[Comparison]) -> Difference | None:
    """A method's mean difference in each dataset where it and the baseline have been tested."""
    pairs = (d.mean for comparison in group for o, d in comparison.differences if o.label == label)
    found = tuple(pairs)
    return Difference(found) if found else None


def _across(what: str, model: str, group: Sequence[Comparison]) -> Table:
    labels = list(dict.fromkeys(outcome.label for comparison in group for outcome in comparison.outcomes))
    rows, differences = [], []
    for label in labels:
        outcomes = [o for comparison in group for o in comparison.outcomes if o.label == label and o.mean is not None]
        means = [outcome.mean for outcome in outcomes if outcome.mean is not None]
        difference = mean_differences(label, group)
        differences += [difference] if difference else []
        complete = len(means) == len(group)
        parameters = [outcome.parameters for outcome in outcomes if outcome.parameters is not None]
        rows.append((
            Value(label + (" (baseline)" if label == group[0].baseline else ""), label),
            Value(f"{len(means)} of {len(group)}", len(means)),
            number(statistics.fmean(means) if complete else None, ".2f"),
            difference_value(difference),
            outcomes_value(difference),
            number(statistics.fmean(parameters) if parameters else None, ",.0f"),
        ))  # fmt: skip
    columns = ("method", "datasets", "average test top-1 (%)", f"minus {group[0].baseline}, mean over datasets "
               "(95 % interval over datasets)", "datasets won / tied / lost", "parameters without head")  # fmt: skip
    notes = ["The average stands only where a method was tested on every dataset."]
    if any(difference.interval for difference in differences):
        notes.append(multiplicity(differences, "This table"))
    notes += failed_notes(group)
    conditions = group[0].cell.conditions
    title = " · ".join(part for part in (what, model, conditions) if part)
    return make_table(title, columns, rows, notes=notes)
