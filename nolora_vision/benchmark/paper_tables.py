"""Our results in the form of the papers' tables, the published rows beside ours and marked as published."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from nolora_vision.benchmark.comparison import TRAIN_SIZE, Comparison, Outcome, axis_words
from nolora_vision.benchmark.published import EIGHT_SETS, SUITE, VTAB, vtab_task
from nolora_vision.benchmark.report_tables import (
    EMPTY,
    Table,
    Value,
    by_conditions,
    failed_notes,
    make_table,
    mean_and_spread,
    number,
)
from nolora_vision.training.vtab import VTAB_TASKS, vtab_averages

NO_CLAIM = "Published rows are quoted, not reproduced: other code, recipes, splits; no difference to them is claimed."
PUBLISHED_MODEL = "vit_base_patch16_224"
PUBLISHED_SIZE = 224
"""Height and width in pixels."""
PUBLISHED_TAGS = ("in21k",)


def paper_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """The eight sets and VTAB-1k, for each model and conditions under which enough of them were run."""
    tables = []
    for (model, _), group in by_conditions(comparisons).items():
        suite = {c.cell.dataset: c for c in group if c.cell.dataset in EIGHT_SETS.values()}
        if len(suite) > 1 or (suite and model.startswith(PUBLISHED_MODEL)):
            tables.append(_suite(suite))
        tasks = {task: c for c in group if (task := vtab_task(c.cell.dataset))}
        if tasks:
            tables.append(_vtab(tasks))
    return tables


def _by_label(comparisons: Mapping[str, Comparison]) -> dict[str, dict[str, Outcome]]:
    """Tested outcomes by label, then by the key of their comparison."""
    found: dict[str, dict[str, Outcome]] = {}
    for key, comparison in comparisons.items():
        for outcome in comparison.outcomes:
            if outcome.tests:
                found.setdefault(outcome.label, {})[key] = outcome
    return found


def _seeds(outcomes: Mapping[str, Outcome]) -> str:
    counts = sorted({len(outcome.tests) for outcome in outcomes.values()})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"ours, {span} {'seed' if span == '1' else 'seeds'}"


def _suite(comparisons: Mapping[str, Comparison]) -> Table:
    columns = ("method", "parameters without head", *EIGHT_SETS, "source")
    rows: list[tuple[Value, ...]] = [
        (Value(row.method), number(row.parameters, ",.0f"), *(number(v, ".2f") for v in row.top1_percent),
         Value(f"published: {row.source}"))
        for row in SUITE
    ]  # fmt: skip
    for label, outcomes in _by_label(comparisons).items():
        parameters = [o.parameters for o in outcomes.values() if o.parameters is not None]
        tested = (mean_and_spread(list(outcomes[i].tests.values())) if i in outcomes else EMPTY
                  for i in EIGHT_SETS.values())  # fmt: skip
        mean = number(statistics.fmean(parameters) if parameters else None, ",.0f")
        rows.append((Value(label), mean, *tested, Value(_seeds(outcomes))))
    published = [True] * len(SUITE) + [False] * (len(rows) - len(SUITE))
    cell = next(iter(comparisons.values())).cell
    title = f"The papers' eight sets, test top-1 (%) · ours: {cell.model}" + _conditions(cell.conditions)
    return make_table(title, columns, rows, notes=_notes(comparisons), published=published)


def _vtab(comparisons: Mapping[str, Comparison]) -> Table:
    columns = ("method", "mean of groups", "mean of 19 sets", *VTAB_TASKS, "source")
    nothing = [EMPTY] * len(VTAB_TASKS)
    rows: list[tuple[Value, ...]] = [
        (Value(row.method), number(row.mean_of_groups, ".1f"), number(row.mean_of_sets, ".1f"), *nothing,
         Value(f"published: {row.source}"))
        for row in VTAB
    ]  # fmt: skip
    for label, outcomes in _by_label(comparisons).items():
        means = {task: outcome.mean for task, outcome in outcomes.items() if outcome.mean is not None}
        averages = vtab_averages(means) if set(means) == set(VTAB_TASKS) else (None, None)
        tasks = (number(means.get(task), ".1f") for task in VTAB_TASKS)
        rows.append((Value(label), *(number(a, ".1f") for a in averages), *tasks, Value(_seeds(outcomes))))
    published = [True] * len(VTAB) + [False] * (len(rows) - len(VTAB))
    cell = next(iter(comparisons.values())).cell
    notes = [f"{len(comparisons)} of 19 tasks were run; ours have averages only where all are.", *_notes(comparisons)]
    title = f"VTAB-1k, test top-1 (%) · ours: {cell.model}" + _conditions(cell.conditions)
    return make_table(title, columns, rows, notes=notes, published=published)


def _conditions(conditions: str) -> str:
    return f", {conditions}" if conditions else ""


def _notes(comparisons: Mapping[str, Comparison]) -> list[str]:
    """What keeps our rows from being comparable with the published ones."""
    cell = next(iter(comparisons.values())).cell
    notes = [NO_CLAIM, *failed_notes(comparisons.values())]
    architecture, _, tag = cell.model.partition(".")
    if architecture != PUBLISHED_MODEL or not tag.endswith(PUBLISHED_TAGS):
        notes.append(f"The published rows are of ViT-B/16 with ImageNet-21k weights, ours of {cell.model}.")
    if part := _told(comparisons, *TRAIN_SIZE):
        notes.append(f"The published rows trained on all training images, ours on a part of them: {part}.")
    if part := _told(comparisons, "max_eval_samples"):
        notes.append(f"The published rows were tested on all test images, ours on a part of them: {part}.")
    if size := _told(comparisons, "img_size", usual=PUBLISHED_SIZE):
        notes.append(f"The published rows are of images of {PUBLISHED_SIZE} pixels, ours of others: {size}.")
    return notes


def _told(comparisons: Mapping[str, Comparison], *names: str, usual: int | None = None) -> str:
    """What our tested runs were told of these fields, wherever the sweep says it; empty where all have the usual."""
    runs = (run for c in comparisons.values() for outcome in c.outcomes for run in outcome.runs)
    told = ((name, {**run.settings, **run.point}.get(name)) for run in runs for name in names)
    found = {axis_words(name, value) for name, value in told if value not in (None, usual)}
    return " or ".join(sorted(found))
