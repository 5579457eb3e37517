"""What a report says, before it is Markdown, CSV or a page: summary in words, tables, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nolora_vision.benchmark.comparison import Comparison, Outcome, compare, method_order
from nolora_vision.benchmark.intervals import Difference, in_words, signed
from nolora_vision.benchmark.paper_tables import paper_tables
from nolora_vision.benchmark.published import dataset_title
from nolora_vision.benchmark.report_tables import (
    Table,
    Value,
    across_datasets,
    cell_table,
    make_table,
    multiplicity,
)
from nolora_vision.benchmark.results import Results, Run

FEW = 12
"""Up to so many comparisons are written out at the top; of more there is a sentence for each method."""
RULE = (
    "Differences are paired by seed, with Student's 95 % interval over at least three seeds. “Higher” or “lower” "
    "stands only where the interval excludes 0 and no seed of the better one failed; otherwise no difference is shown, "
    "which is not the same as none. Parameters are counted without the head; ± is the standard deviation over seeds."
)
CHOSEN = "Learning rates were chosen on validation images. "
GIVEN = "Learning rates are those that were given: nothing was chosen here. "


@dataclass(frozen=True)
class Section:
    """Tables under one heading."""

    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Report:
    """All that a report says in words and tables."""

    title: str
    description: str
    summary: tuple[str, ...]
    """How much was compared, and what it shows."""
    by_method: tuple[str, ...]
    """Where a method is higher, lower, or not shown to differ; empty where few comparisons say it all."""
    in_words: tuple[str, ...]
    """Every comparison, those whose interval excludes 0 first."""
    sections: tuple[Section, ...]
    provenance: Table
    warnings: tuple[str, ...]
    labels: tuple[str, ...]
    """Methods, in the order of colours."""
    comparisons: tuple[Comparison, ...]
    results: Results

    @property
    def rule(self) -> str:
        """What the words and numbers of the comparisons mean."""
        chosen = any(comparison.tried for comparison in self.comparisons)
        return (CHOSEN if chosen else GIVEN) + RULE


def build_report(results: Results) -> Report:
    """Compare all methods of the results and put it into words and tables."""
    comparisons, warnings = compare(results)
    compared = [(c, o, d) for c in comparisons for o, d in c.differences]
    compared.sort(key=lambda item: not item[2].sign)
    one_model = len({comparison.cell.model for comparison in comparisons}) == 1
    words = tuple(sentence(*item, with_model=not one_model) for item in compared)
    sections = (
        Section("Across datasets", tuple(across_datasets(comparisons))),
        Section("Beside the papers", tuple(paper_tables(comparisons))),
        Section("Cell by cell", tuple(cell_table(comparison) for comparison in comparisons)),
        Section("Failed runs", tuple(failed_runs(results.runs))),
    )
    return Report(
        title=", ".join(dict.fromkeys(sweep.name for sweep in results.sweeps)),
        description=" ".join(dict.fromkeys(sweep.description for sweep in results.sweeps if sweep.description)),
        summary=tuple(summary(results, comparisons, [difference for *_, difference in compared])),
        by_method=tuple(method_sentences(compared)) if len(words) > FEW and len(comparisons) > 1 else (),
        in_words=words,
        sections=tuple(section for section in sections if section.tables),
        provenance=provenance(results),
        warnings=(*results.warnings, *warnings),
        labels=tuple(method_order(results)),
        comparisons=tuple(comparisons),
        results=results,
    )


def sentence(comparison: Comparison, outcome: Outcome, difference: Difference, *, with_model: bool) -> str:
    """swish gate minus lora on CIFAR-10, rank 8, 1,000 training images: +0.30 points (…), 5 seeds: …."""
    cell = comparison.cell
    parts = (dataset_title(cell.dataset), cell.model * with_model, cell.conditions)
    where = ", ".join(part for part in parts if part)
    return f"{outcome.label} minus {comparison.baseline} on {where}: {in_words(difference)}."


def method_sentences(compared: Sequence[tuple[Comparison, Outcome, Difference]]) -> Iterable[str]:
    """For each method in how many cells it is higher, lower, or not shown to differ, and from where to where."""
    for label in dict.fromkeys(outcome.label for _, outcome, _ in compared):
        found = [(c.baseline, d) for c, outcome, d in compared if outcome.label == label]
        means = sorted(difference.mean for _, difference in found)
        signs = Counter(d.sign for _, d in found)
        without = sum(difference.interval is None for _, difference in found)
        lost = sum(difference.failed[0] > 0 for _, difference in found)
        unclear = len(found) - signs[1] - signs[-1] - without
        yield (
            f"{label} minus {found[0][0]}: higher in {signs[1]} of {_count(len(found), 'cell')}, lower in {signs[-1]}, "
            f"no difference shown in {unclear}{f', no interval in {without}' if without else ''}; "
            f"means from {signed(means[0])} to {signed(means[-1])} points"
            f"{f', seeds failed and are not counted in {lost}' if lost else ''}."
        )


def summary(results: Results, comparisons: Sequence[Comparison], differences: Sequence[Difference]) -> Iterable[str]:
    """What was run, and how many differences there are to be believed."""
    failed = sum(run.error is not None for run in results.runs)
    methods, cells = len({run.label for run in results.runs}), len(comparisons)
    finals = sum(run.phase == "final" and run.error is None for run in results.runs)
    yield (
        f"{_count(len(results.runs) - failed, 'run')} done, {finals} of them scored on the test images, and {failed} "
        f"failed: {_count(methods, 'method')} in {_count(cells, 'cell')} of dataset, model and conditions."
    )
    if any(difference.interval for difference in differences):
        yield multiplicity(differences, "The report")
    elif differences:
        yield "No comparison has the three differing seeds that an interval needs: nothing can be said of differences."
    else:
        yield f"Nothing is compared yet: no method has test results of the same seed and cell as {results.baseline}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def failed_runs(runs: Sequence[Run]) -> list[Table]:
    """Which runs failed, where, and why."""
    counts: Counter[tuple[str, ...]] = Counter()
    for run in runs:
        if run.error is not None:
            where = ", ".join(f"{name} {value}" for name, value in run.cell_axes)
            counts[run.label, dataset_title(run.dataset), run.model, where, run.phase, run.error] += 1
    if not counts:
        return []
    rows = [[*map(Value, key[:5]), Value(str(count), count), Value(key[5])] for key, count in sorted(counts.items())]
    columns = ("method", "dataset", "model", "conditions", "phase", "runs", "reason")
    return [make_table("Runs that failed, and why", columns, rows)]


def provenance(results: Results) -> Table:
    """Where the numbers come from: for each sweep its commits, devices, versions and dates."""
    rows = []
    for sweep in results.sweeps:
        runs = [run for run in results.runs if run.sweep is sweep]
        said = [run.record.get("environment") or {} for run in runs if run.error is None]
        times = sorted(str(env["time_utc"]) for env in said if env.get("time_utc"))
        dates = list(dict.fromkeys(time[:10] for time in (times[0], times[-1]))) if times else []
        versions: dict[str, set[str]] = {}
        for env in said:
            for name, version in {"python": env.get("python"), **(env.get("versions") or {})}.items():
                if version:
                    versions.setdefault(name, set()).add(str(version))
        rows.append((
            Value(sweep.name),
            Value(sweep.folder.name),
            Value(", ".join(sorted({_commit(env) for env in said} - {""}))),
            Value(", ".join(sorted({str(env.get("device") or "") for env in said} - {""}))),
            Value(", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in versions.items())),
            Value(" to ".join(dates)),
            Value(f"{len(said):,}", len(said)),
        ))  # fmt: skip
    columns = ("sweep", "folder", "commits", "devices", "versions", "dates (UTC)", "runs done")
    notes = []
    if any(_commit(run.record.get("environment") or {}).endswith("+") for run in results.runs):
        notes.append("+ marks a commit whose files had been changed.")
    return make_table("Where the numbers come from", columns, rows, notes=notes)


def _commit(environment: Mapping[str, Any]) -> str:
    git = environment.get("git") or {}
    commit = str(git.get("commit") or "")[:10]
    return commit + ("+" if commit and git.get("dirty") else "")
