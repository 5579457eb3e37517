"""What sweeps left behind: their runs and what they chose, read from disk; a damaged file is a warning, no crash"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from nolora_vision.benchmark.settings import (
    ELSEWHERE,
    Axes,
    axes_of,
    filled,
    names_in,
    settings_of,
    told_apart,
    with_rows,
)
from nolora_vision.training.errors import RunError

PHASES = ("choose", "final")
STATUSES = ("done", "failed")
NAMELESS = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
"""Names that weight files of the Hub have whatever they hold."""
DEFAULT_BASELINE, DEFAULT_CHOOSE_AXES = "lora", ("lr", "head_lr")


@dataclass(frozen=True)
class Sweep:
    """What `sweep.json` says."""

    folder: Path
    name: str
    description: str
    baseline: str
    choose_axes: tuple[str, ...]
    chosen: tuple[Mapping[str, Any], ...]
    """label, cell, point, val_top1_percent, at_edge and edges of each choice."""
    base: frozenset[str]
    """Fields that it gives to all runs."""
    named: Mapping[str, frozenset[str] | None]
    """Labels in the sweep's order, as far as it says, each with the fields that are the method's own, if it tells."""
    tasks: frozenset[str] | None
    """Keys of the runs that count; None: all do, as the sweep does not say."""
    held: tuple[str, ...]
    """For which methods it has no choice, and why."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep, done or failed."""

    key: str
    sweep: Sweep
    label: str
    phase: str
    seed: int
    point: Mapping[str, Any]
    error: str | None
    """Why it failed; None: it is done."""
    dataset: str
    model: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Fields of its config that decide about its result, by dotted names."""
    apart: Axes = ()
    """Fields besides the method's own in which others differ that were read with it."""

    def number(self, group: str, name: str) -> float | None:
        """A finite number of the record, such as `number("metrics", "test_loss")`; None where it is absent."""
        value = (self.record.get(group) or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    @property
    def test(self) -> float | None:
        """Test top-1 in percent."""
        return self.number("metrics", "test_top1_percent")

    @property
    def val(self) -> float | None:
        """Validation top-1 in percent, of the best epoch."""
        return self.number("metrics", "val_top1_percent")

    @property
    def chosen_axes(self) -> Axes:
        """Values of the axes that the sweep chooses on validation."""
        return axes_of((name, value) for name, value in self.point.items() if name in self.sweep.choose_axes)

    @property
    def cell_axes(self) -> Axes:
        """Values of all other axes, and of what sets it apart: where it is compared, besides dataset and model."""
        beside = (*self.sweep.choose_axes, *ELSEWHERE)
        axes = {name: value for name, value in self.point.items() if name not in beside}
        return axes_of({**axes, **dict(self.apart)}.items())


@dataclass(frozen=True)
class Results:
    """Everything that was read, and what could not be."""

    sweeps: tuple[Sweep, ...]
    runs: tuple[Run, ...]
    warnings: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The method that all are compared with."""
        return self.sweeps[0].baseline


def read_results(folders: Sequence[Path], *, baseline: str | None = None) -> Results:
    """The runs of all result folders, each one once.

    Args:
        baseline: label of the method to compare with, instead of the sweeps' own.

    Raises:
        RunError: if a folder is none, there is no run in all of them, or none of the baseline, or several kinds of it.
    """
    warnings: list[str] = []
    for folder in folders:
        if not (folder / "runs").is_dir():
            raise RunError(f"{folder} has no folder runs/. Name the output of a sweep, which holds runs/<key>.json.")
    sweeps = tuple(_read_sweep(folder, warnings) for folder in folders)
    if baseline is not None:
        sweeps = tuple(replace(sweep, baseline=baseline) for sweep in sweeps)
    read = [run for sweep in sweeps for run in _read_runs(sweep, warnings)]
    warnings += [f"{sweep.folder.name}: {line}" for sweep in sweeps for line in sweep.held]
    runs = tuple(told_apart(list(_once(with_rows(filled(read)), warnings)), sweeps[0].baseline, warnings))
    if not runs:
        found = "".join(f"\n  {line}" for line in warnings)
        raise RunError(f"No readable run in {', '.join(map(str, folders))}. Run the sweep first.{found}")
    if baseline is not None and baseline not in (labels := sorted({run.label for run in runs})):
        raise RunError(f"No run is of the baseline {baseline!r}. Give one of: {', '.join(labels)}.")
    if others := sorted({sweep.baseline for sweep in sweeps} - {sweeps[0].baseline}):
        warnings.append(f"baseline is {sweeps[0].baseline!r}, as in {folders[0].name}; others name {', '.join(others)}")
    return Results(sweeps, runs, tuple(warnings))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error


def _read_sweep(folder: Path, warnings: list[str]) -> Sweep:
    path = folder / "sweep.json"
    try:
        said = _read_json(path)
        if not isinstance(said, dict):
            raise ValueError(f"must hold an object, holds {type(said).__name__}")
    except ValueError as error:
        warnings.append(f"{path}: {error}; taken as a sweep with baseline {DEFAULT_BASELINE!r}")
        said = {}
    choose, chosen, methods = (said.get(name) or {} for name in ("choose", "chosen", "methods"))
    axes = choose.get("axes") if isinstance(choose, dict) else None
    entries = list(chosen.values()) if isinstance(chosen, dict) else []
    return Sweep(
        folder,
        str(said.get("name") or folder.name),
        str(said.get("description") or ""),
        str(said.get("baseline") or DEFAULT_BASELINE),
        tuple(DEFAULT_CHOOSE_AXES if axes is None else map(str, axes)),
        tuple(entry for entry in entries if _is_choice(entry)),
        names_in(said.get("base")),
        {str(name): names_in(methods[name]) if isinstance(methods, dict) else None for name in methods},
        frozenset(map(str, tasks)) if isinstance(tasks := said.get("tasks"), list) else None,
        tuple(map(str, held)) if isinstance(held := said.get("held"), list) else (),
    )


def _is_choice(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name) or {}, dict) for name in ("cell", "point"))


def _read_runs(sweep: Sweep, warnings: list[str]) -> Iterator[Run]:
    records: list[tuple[str, dict[str, Any]]] = []
    paths = sorted((sweep.folder / "runs").glob("*.json"))
    counted = [path for path in paths if sweep.tasks is None or path.stem in sweep.tasks]
    if others := len(paths) - len(counted):
        are = "record is" if others == 1 else "records are"
        warnings.append(f"{sweep.folder}: {others} {are} left out: sweep.json does not list them among its tasks")
    for path in counted:
        try:
            record = _read_json(path)
            if problem := _problem(record):
                raise ValueError(problem)
            records.append((path.stem, record))
        except ValueError as error:
            warnings.append(f"{path}: skipped: {error}")
    known: dict[tuple[Any, Any], set[tuple[str, str]]] = {}
    for _, record in records:
        if record["status"] == "done":
            known.setdefault(_asked(record), set()).add((str(record["dataset"]["id"]), _model(record)))
    for key, record in records:
        done, asked = record["status"] == "done", _asked(record)
        places = known.get(asked, set())
        if done:
            dataset, model = str(record["dataset"]["id"]), _model(record)
        elif len(places) == 1:  # it may have failed before it knew: as others that were asked for the same
            ((dataset, model),) = places
        else:
            dataset, model = (str(value or "unknown") for value in asked)
        error = None if done else str(record.get("error") or "").strip() or "no reason recorded"
        named = {name: record[name] for name in ("label", "phase", "seed", "point")}
        named |= {"record": record, "settings": settings_of(record.get("config") or {})}
        yield Run(key=key, sweep=sweep, error=error, dataset=dataset, model=model, **named)


def _model(record: Mapping[str, Any]) -> str:
    """As timm spells it; by the tag that was asked for where the weights are of a file whose name says nothing."""
    config = record.get("config") or {}
    asked, path = str(config.get("model") or ""), config.get("pretrained_path")
    return asked if path and PurePath(str(path)).stem in NAMELESS and "." in asked else str(record["model"])


def _asked(record: Mapping[str, Any]) -> tuple[Any, Any]:
    """Dataset and model as the grid names them; None where they are no axes of it."""
    return record["point"].get("dataset"), record["point"].get("model")


def _problem(record: Any) -> str | None:
    """What makes a record unusable; None if it can be used."""
    if not isinstance(record, dict):
        return f"must hold an object, holds {type(record).__name__}"
    kinds = {"label": str, "phase": str, "point": dict, "seed": int, "status": str}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            return f"{name} must be {kind.__name__}, got {record.get(name)!r}"
    for name, choices in (("phase", PHASES), ("status", STATUSES)):
        if record[name] not in choices:
            return f"{name} must be one of {', '.join(choices)}, got {record[name]!r}"
    for name in ("metrics", "parameters", "config", "environment"):
        if not isinstance(record.get(name) or {}, dict):
            return f"{name} must be dict, got {record[name]!r}"
    if record["status"] == "failed":
        return None
    for name in ("dataset", "metrics"):
        if not isinstance(record.get(name), dict):
            return f"{name} must be dict, got {record.get(name)!r}"
    wanted = "test_top1_percent" if record["phase"] == "final" else "val_top1_percent"
    value = record["metrics"].get(wanted)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"metrics.{wanted} must be a finite number, got {value!r}"
    if not record.get("model") or not record["dataset"].get("id"):
        return "model and dataset.id must be named"
    return None


def _once(runs: Sequence[Run], warnings: list[str]) -> Iterator[Run]:
    """Each run once, though several folders may hold it: the first that is done, or else the first."""
    same: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        told = (axes_of(run.point.items()), axes_of(run.settings.items()))
        name = (run.label, run.phase, run.dataset, run.model, *told, run.seed)
        same.setdefault(name, []).append(run)
    for group in same.values():
        kept = next((run for run in group if run.error is None), group[0])
        for run in group:
            if run is not kept and run.record != kept.record:
                there = f"{kept.sweep.folder.name}/runs/{kept.key}.json"
                warnings.append(f"{run.sweep.folder / 'runs' / run.key}.json: skipped: the same run as {there}")
        yield kept
