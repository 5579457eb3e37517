"""Results of sweeps → tables, figures and one page: `python -m nolora_vision.benchmark.report`; imports no torch."""

from __future__ import annotations

import csv
import io
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import tyro

from nolora_vision.benchmark.comparison import Outcome
from nolora_vision.benchmark.intervals import Difference, interval
from nolora_vision.benchmark.report_content import Report, build_report
from nolora_vision.benchmark.report_html import page
from nolora_vision.benchmark.report_pictures import Picture, draw_pictures
from nolora_vision.benchmark.report_tables import Table, verdict
from nolora_vision.benchmark.results import Run, read_results
from nolora_vision.training.errors import RunError

COSTS = (
    ("metrics", ("val_top1_percent", "train_seconds", "total_seconds", "peak_memory_bytes", "adapter_bytes",
                 "train_images_per_s", "test_images_per_s")),
    ("parameters", ("trainable_without_head", "adapter", "head", "total")),
)  # fmt: skip


def main(
    results_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS_DIR")],
    *,
    output: Path | None = None,
    baseline: str | None = None,
) -> None:
    """Report on sweeps: report.md, results.csv, runs.csv, figures/ and report.html.

    Args:
        results_dirs: Outputs of sweeps, each with runs/ and sweep.json.
        output: Folder of the report; RESULTS_DIR/report by default.
        baseline: Method that the others are compared with, instead of the sweeps' own.
    """
    try:
        folder = write_report(results_dirs, output=output, baseline=baseline)
    except RunError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{folder}: {', '.join(sorted(path.name + '/' * path.is_dir() for path in folder.iterdir()))}")


def write_report(results_dirs: Sequence[Path], *, output: Path | None = None, baseline: str | None = None) -> Path:
    """Write the report of one or several sweeps, and return its folder.

    Raises:
        RunError: if there is nothing to report on, or the folder cannot be written.
    """
    if not results_dirs:
        raise RunError("No results were named. Name the output of a sweep, which holds runs/<key>.json.")
    report = build_report(read_results(results_dirs, baseline=baseline))
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    folder = output or results_dirs[0] / "report"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        pictures = draw_pictures(report, folder)
        _write(folder / "results.csv", as_csv(result_rows(report)))
        _write(folder / "runs.csv", as_csv(run_rows(report.results.runs)))
        _write(folder / "report.md", markdown(report, pictures))
        made = f"Made {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by python -m nolora_vision.benchmark.report."
        _write(folder / "report.html", page(report, pictures, made=made))
    except OSError as error:
        raise RunError(f"The report cannot be written to {folder} ({error.strerror}). Choose an --output.") from error
    return folder


def markdown(report: Report, pictures: Sequence[Picture]) -> str:
    """The report as Markdown, its figures beside it."""
    parts = [f"# {report.title}", report.description, *report.summary]
    parts += ["\n".join(f"- {line}" for line in report.by_method or report.in_words), report.rule]
    if pictures:
        parts.append("## Figures")
    for picture in pictures:
        parts += [f"![{picture.title}]({picture.file})", f"{picture.title}. {picture.caption}"]
    for section in report.sections:
        parts += [f"## {section.title}", *(_markdown_table(table) for table in section.tables)]
    if report.by_method:
        parts += ["## All comparisons in words", "\n".join(f"- {line}" for line in report.in_words)]
    parts += ["## Provenance", _markdown_table(report.provenance, heading=False)]
    if report.warnings:
        parts += ["## Warnings", "\n".join(f"- {line}" for line in report.warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table, *, heading: bool = True) -> str:
    lines = [[value.text for value in row] for row in table.rows]
    body = [table.columns, ["---"] * len(table.columns), *lines]
    text = "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in body)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return "\n\n".join(part for part in (f"### {table.title}" * heading, text, notes) if part)


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def result_rows(report: Report) -> Iterator[dict[str, Any]]:
    """One row for each method in each cell, numbers unrounded."""
    for comparison in report.comparisons:
        cell = {"dataset": comparison.cell.dataset, "model": comparison.cell.model, **dict(comparison.cell.axes)}
        for outcome in comparison.outcomes:
            yield {
                **cell,
                "method": outcome.label,
                **dict(outcome.point),
                "at_edge": outcome.at_edge,
                **_accuracy(list(outcome.tests.values())),
                "baseline": comparison.baseline,
                **_apart(outcome.difference),
                **_validation(outcome),
                **_loss(outcome),
                "verdict": verdict(outcome),
                **{name: outcome.average(group, name) for group, names in COSTS for name in names},
                "failed": outcome.failed(),
            }


def _accuracy(tests: Sequence[float]) -> dict[str, Any]:
    low, high = interval(tests) or (None, None)
    return {
        "seeds": len(tests),
        "test_top1_percent_mean": statistics.fmean(tests) if tests else None,
        "test_top1_percent_std": statistics.stdev(tests) if len(tests) > 1 else None,
        "test_top1_percent_low": low,
        "test_top1_percent_high": high,
    }


def _loss(outcome: Outcome) -> dict[str, Any]:
    losses, apart = list(outcome.losses.values()), outcome.loss_difference
    low, high = (apart and apart.interval) or (None, None)
    return {
        "test_loss_mean": statistics.fmean(losses) if losses else None,
        "test_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        **{"test_loss_difference": apart and apart.mean, "test_loss_low": low, "test_loss_high": high},
    }


def _validation(outcome: Outcome) -> dict[str, Any]:
    apart = outcome.val_difference
    low, high = (apart and apart.interval) or (None, None)
    return {"val_difference_points": apart and apart.mean, "val_difference_low": low, "val_difference_high": high}


def _apart(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {}
    low, high = difference.interval or (None, None)
    wins, ties, losses = difference.outcomes
    return {
        "difference_points": difference.mean,
        "difference_pairs": len(difference.pairs),
        "difference_low": low,
        "difference_high": high,
        **{"wins": wins, "ties": ties, "losses": losses},
    }


def run_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """One row for each run, with its point, metrics, parameters and what its last epoch gave."""
    for run in runs:
        history = run.record.get("history")
        last = history[-1] if isinstance(history, list) and history and isinstance(history[-1], dict) else {}
        yield {
            **{"sweep": run.sweep.name, "key": run.key, "method": run.label, "phase": run.phase, "seed": run.seed},
            **{"dataset": run.dataset, "model": run.model, **run.point, "error": run.error},
            **(run.record.get("metrics") or {}), **(run.record.get("parameters") or {}),
            **{f"last_epoch_{name}": last.get(name) for name in ("train_loss", "train_top1_percent", "val_loss")},
        }  # fmt: skip


def as_csv(rows: Iterator[dict[str, Any]]) -> str:
    """Rows with all columns that any of them has; those without a value anywhere are left out."""
    found = list(rows)
    names = [name for name in dict.fromkeys(name for row in found for name in row)
             if any(row.get(name) not in (None, "") for row in found)]  # fmt: skip
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    tyro.cli(main)
