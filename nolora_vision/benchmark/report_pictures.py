"""Which figures a report has, drawn from its comparisons and written as files; each with its caption."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nolora_vision.benchmark import curves, report_figures
from nolora_vision.benchmark.comparison import Comparison
from nolora_vision.benchmark.report_content import Report
from nolora_vision.benchmark.report_multiples import crowded, multiples_figure
from nolora_vision.benchmark.results import Run

MOST_FUNCTIONS = 9
"""Adapters whose learned f is drawn, one for each method."""
SEEDS = f"Means, with 95 % intervals from {report_figures.FEWEST_FOR_INTERVALS} seeds on; dots are seeds."
Drawn = tuple[str, str, str, Any]
"""Name of the file, title, caption, figure."""


@dataclass(frozen=True)
class Picture:
    """A figure of a report: its file beside the page, and the same as SVG."""

    title: str
    caption: str
    file: str
    svg: str


def draw_pictures(report: Report, folder: Path) -> list[Picture]:
    """Every figure that the results allow, as figures/<name>.png; none without matplotlib."""
    if not report_figures.matplotlib_installed():
        print("No figures: pip install 'nolora-vision[plots]' for matplotlib.")
        return []
    pictures = []
    for name, title, caption, figure in figures_of(report):
        file = f"figures/{name}.png"
        pictures.append(Picture(title, caption, file, report_figures.save_figure(figure, folder / file, title=title)))
    return pictures


def figures_of(report: Report) -> Iterator[Drawn]:
    """The figures in the report's order, one model after the other."""
    look = report_figures.Look(report.labels)
    models = list(dict.fromkeys(comparison.cell.model for comparison in report.comparisons))
    for i, model in enumerate(models):
        cells = [comparison for comparison in report.comparisons if comparison.cell.model == model]
        axes = dict.fromkeys(axis for sweep in report.results.sweeps for axis in sweep.choose_axes)
        for name, title, caption, figure in _figures_of_model(cells, look, tuple(axes)):
            yield f"{name}_{i + 1}" if len(models) > 1 else name, f"{title} · {model}", caption, figure
    if functions := learned_functions(report.results.runs):
        caption = "One run of each method: a line for each rank unit of each block, from the first (dark) to the last."
        yield "learned_functions", "Learned nonlinearities", caption, report_figures.functions_figure(functions)


def _figures_of_model(cells: Sequence[Comparison], look: report_figures.Look, axes: Sequence[str]) -> Iterator[Drawn]:
    baseline = cells[0].baseline
    if bars := curves.difference_bars(cells):
        caption = f"{SEEDS} Grey: the interval includes 0, or there is none."
        yield "differences", f"Difference to {baseline}", caption, report_figures.differences_figure(bars, baseline)
    for name, title, panels, xlabel, scale in (
        ("accuracy_by_parameters", "Accuracy against parameters", curves.by_parameters(cells),
         "trained parameters, without the head", "parameters"),
        ("rank", "Accuracy by rank", curves.by_rank(cells), "rank", "log2"),
        ("train_size", "Accuracy by training images", curves.by_train_size(cells), "training images", "log10"),
    ):  # fmt: skip
        if panels:
            labels = {"xlabel": xlabel, "ylabel": "test top-1 (%)", "scale": scale}
            yield name, title, SEEDS + behind(panels), drawn(panels, look, baseline, **labels)
    for axis in axes:
        if panels := curves.by_learning_rate(cells, axis):
            words = axis.replace("_", " ")
            caption = (
                f"Choose phase, the other chosen axes at their best for each {words}; a ring marks the best; "
                f"a line that leaves the figure goes on below it. {SEEDS}{behind(panels)}"
            )
            labels = {"xlabel": words, "ylabel": "validation top-1 (%)", "scale": "log10"}
            figure = drawn(panels, look, baseline, **labels)
            yield f"choose_{axis.replace('.', '_')}", f"Validation accuracy by {words}", caption, figure


def drawn(panels: Sequence[curves.Panel], look: report_figures.Look, baseline: str, **labels: str) -> Any:
    """The curves together, or each apart where they are too many."""
    if crowded(panels):
        return multiples_figure(panels, look, baseline=baseline, **labels)
    return report_figures.curves_figure(panels, look, **labels)


def behind(panels: Sequence[curves.Panel]) -> str:
    """What a caption says of curves that are drawn apart."""
    return " Dashed: the baseline; grey: the other methods." if crowded(panels) else ""


def learned_functions(runs: Sequence[Run]) -> dict[str, Any]:
    """Curves of the learned f of each method's first final run that left an adapter; {} without any.

    Adapters are read by another process, as that takes torch.
    """
    found: dict[str, str] = {}
    for run in runs:
        places = (run.sweep.folder / "adapters" / run.key / "adapter", run.sweep.folder / "adapters" / run.key)
        place = next((place for place in places if place.is_dir()), None)
        if place and run.phase == "final" and run.error is None and len(found) < MOST_FUNCTIONS:
            found.setdefault(run.label, str(place))
    if not found:
        return {}
    command = [sys.executable, "-m", "nolora_vision.benchmark.learned", json.dumps(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        print(f"warning: learned nonlinearities: {done.stderr.strip()}", file=sys.stderr)
    return json.loads(done.stdout) if done.returncode == 0 else {}
