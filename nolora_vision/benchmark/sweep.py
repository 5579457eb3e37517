"""`sweep config.yaml`: runs what is missing of a sweep, one JSON each; several processes share the work."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from filelock import FileLock, Timeout

from nolora_vision import CheckpointError, ConfigError, InjectionError
from nolora_vision.benchmark.sweep_plan import Plan, Sweep, diverged, plan, read_sweep, whole_plan
from nolora_vision.benchmark.sweep_processes import end_with_parent, in_processes, is_orphaned
from nolora_vision.benchmark.sweep_task import Task
from nolora_vision.training.config_file import as_plain
from nolora_vision.training.engine import slow_precision
from nolora_vision.training.errors import RunError
from nolora_vision.training.progress import RunsProgress, print_anything, print_columns
from nolora_vision.training.record import code_state, environment, write_atomic, write_record
from nolora_vision.training.run import run
from nolora_vision.training.shelf import Shelf

USUAL_ERRORS = (RunError, ConfigError, InjectionError, CheckpointError)
"""What a method or a setting may be refused with; anything else is recorded too, by its type."""
WAIT_SECONDS = 2.0
"""Between looks at the results of other processes."""


def main(
    sweep_file: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    output: Path | None = None,
    processes: int = 1,
    max_hours: float | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run what is missing of a sweep: candidates of each method on validation images, then the chosen ones on the test.

    Kill it at any moment and call it again; call it several times at once to share the work. Exits with 0, or with 1
    if a method could not be chosen for, as runs of it failed, or a run to test failed by more than divergence.

    Args:
        sweep_file: YAML with base, methods, axes, choose and seeds.
        output: Folder of the results; output/sweeps/NAME if not given.
        processes: Start so many; each takes the next GPU, if there are any.
        max_hours: Begin no run that would not end within this time.
        retry_failed: Run again what failed.
        dry_run: Only say what is missing.
    """
    print_anything()
    try:
        if processes < 1 or not (max_hours is None or 0 <= max_hours < math.inf):
            wanted = "processes must be at least 1, and max_hours a number of at least 0"
            raise ConfigError("The command line", [f"{wanted}, got {processes} and {max_hours}."])
        sweep = read_sweep(sweep_file)
        folder = output or Path("output/sweeps") / sweep.name
        results = read_results(folder)
        now = whole_plan(sweep, results)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if dry_run:
        missing, choices = len(now.missing(results)), len(now.choices)
        print(f"{sweep.name}: {missing} runs can be done next, {choices} choices are made ({folder}).")
        say_held(now)
        return 0
    if retry_failed:
        forget_failed(folder)
    if processes > 1:
        command = [sys.executable, "-m", "nolora_vision.benchmark.sweep", str(sweep_file), "--output", str(folder)]
        return in_processes([*command, *([] if max_hours is None else ["--max-hours", str(max_hours)])], processes)
    end_with_parent()
    now = conduct(sweep, folder, deadline=None if max_hours is None else time.monotonic() + 3600 * max_hours)
    return 1 if now.held or any(not diverged(record) for record in untested(now, read_results(folder))) else 0


def conduct(sweep: Sweep, folder: Path, *, deadline: float | None = None) -> Plan:
    """Do what is missing until nothing is, or until the next run would not end before the deadline; the plan then.

    Args:
        folder: of the results.
        deadline: of `time.monotonic`.
    """
    code_state()  # of what is in memory now
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    shelf, seconds = Shelf(), [0.0]
    with RunsProgress(expected(sweep, plan(sweep, read_results(folder))[0])) as progress:
        if slow := slow_precision(sweep.base.get("amp_dtype", "none")):
            progress.say(f"warning: {slow}")
        while True:
            results = read_results(folder)
            now = whole_plan(sweep, results)
            missing = now.missing(results)
            text = json.dumps(summary(sweep, now, results), indent=2, ensure_ascii=False, allow_nan=False)
            write_atomic(folder / "sweep.json", text + "\n")
            if not missing:
                break
            if is_orphaned():
                return now
            if deadline is not None and time.monotonic() + statistics.median(seconds) > deadline:
                progress.say(f"The time is up; at least {len(missing)} runs are left. Call it again to go on.")
                return now
            started = time.monotonic()
            if not any(claim_and_run(task, sweep, folder, shelf, progress) for task in missing):
                time.sleep(WAIT_SECONDS)  # others do what is left
                continue
            seconds = [*seconds, time.monotonic() - started][-20:]
    show(now, results)
    return now


def claim_and_run(task: Task, sweep: Sweep, folder: Path, shelf: Shelf, progress: RunsProgress) -> bool:
    """Do one run, unless another process does it or has done it; the lock dies with its process."""
    file = folder / "runs" / f"{task.name}.json"
    lock = FileLock(folder / "runs" / f".{task.name}.lock")
    try:
        with lock.acquire(timeout=0):
            if file.exists() and task.record_in({task.name: json.loads(file.read_text())}) is not None:
                return True
            what = ", ".join(f"{axis} {value}" for axis, value in task.point.items())
            progress.begin(f"{task.label} · {task.phase} · {what} · seed {task.seed}")
            record = attempt(task, sweep, folder, shelf, progress)
            write_record(file, record)
            progress.say(f"{task.label:16} {task.phase:6} {what}  seed {task.seed}  {said(record)}")
            return True
    except Timeout:
        return False


def attempt(task: Task, sweep: Sweep, folder: Path, shelf: Shelf, progress: RunsProgress) -> dict[str, Any]:
    """The record of a run; of one that failed, why."""
    facts = {"key": task.name, "label": task.label, "phase": task.phase, "point": dict(task.point), "seed": task.seed}
    keeps = sweep.keep_adapters and task.phase == "final"
    config = replace(task.config, output=folder / "adapters", experiment=task.name)
    if keeps:
        shutil.rmtree(config.output / task.name, ignore_errors=True)  # of a run that was killed
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        record = run(config, progress=progress, shelf=shelf, keep=keeps, score_test=task.phase == "final")
    except Exception as error:
        why = str(error) if isinstance(error, USUAL_ERRORS) else f"{type(error).__name__}: {error}"
        facts |= {"status": "failed", "error": why, "error_type": type(error).__name__, "method": task.config.method}
        return {**facts, "config": task.stated, "environment": environment()}
    if not torch.cuda.is_available():  # the process's own peak is that of all its runs so far
        record["metrics"] = {k: v for k, v in record["metrics"].items() if not k.startswith("peak_memory")}
    record["config"] = task.stated
    return {**facts, "status": "done", "error": None, **{k: v for k, v in record.items() if k != "folder"}}


# --------------------------------------------------------------------------------------------------------- the results


def read_results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Records by their task's name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))}


def forget_failed(folder: Path) -> None:
    """Remove the records of failed runs."""
    for name, record in read_results(folder).items():
        if record["status"] == "failed":
            (folder / "runs" / f"{name}.json").unlink()


def summary(sweep: Sweep, now: Plan, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the sweep is, what has been chosen and what cannot be, and the names of the records that count."""
    counted = now.counted(results)
    chosen = {f"{c.label}: {json.dumps(dict(c.cell))}": as_plain(asdict(c)) for c in now.choices if sweep.choose}
    return {
        "name": sweep.name,
        "description": sweep.description,
        "baseline": sweep.baseline,
        "methods": {label: as_plain(dict(own)) for label, own in sweep.methods.items()},
        "base": as_plain(dict(sweep.base)),
        "axes": as_plain(dict(sweep.axes)),
        "choose": None if sweep.choose is None else as_plain(asdict(sweep.choose)),
        "seeds": list(sweep.seeds),
        "chosen": chosen,
        "held": [str(held) for held in now.held],
        "runs": {status: sum(r["status"] == status for r in counted.values()) for status in ("done", "failed")},
        "tasks": [task.name for task in now.tasks if task.name in counted or task.name not in results],
    }


def untested(now: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of runs that were to be tested and failed."""
    counted = now.counted(results).values()
    return [record for record in counted if record["phase"] == "final" and record["status"] == "failed"]


def expected(sweep: Sweep, missing: Sequence[Task]) -> int:
    """Runs that are left, should no candidates be extended."""
    final = sum(len(sweep.seeds) for label in sweep.methods for _ in sweep.cells(label))
    due = sum(task.phase == "final" for task in missing)
    return max(1, len(missing) + (final - due if len(missing) > due else 0))


def said(record: Mapping[str, Any]) -> str:
    """How a run ended, in a line."""
    if record["status"] == "failed":
        return f"failed: {record['error'].splitlines()[0]}"
    metrics = record["metrics"]
    scores = [
        f"{split} {metrics[key]:.2f} %  " for split in ("test", "val") if (key := f"{split}_top1_percent") in metrics
    ]
    return f"{''.join(scores)}{metrics['total_seconds']:.0f} s"


def show(now: Plan, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each method in each cell: what was chosen, and its test scores; and for which there is no choice."""
    rows = []
    tested = [record for record in now.counted(results).values() if record["phase"] == "final"]
    for choice in now.choices:
        scores = [
            record["metrics"]["test_top1_percent"]
            for record in tested
            if record["status"] == "done" and record["label"] == choice.label and record["point"] == dict(choice.point)
        ]
        mean = f"{statistics.fmean(scores):.2f}" if scores else "–"
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–"
        where = ", ".join(f"{axis} {value}" for axis, value in choice.point.items())
        edge = " (at an edge)" if choice.at_edge else ""
        chosen_by = f"{choice.val_top1_percent:.2f}" if math.isfinite(choice.val_top1_percent) else "–"
        rows.append((choice.label, where + edge, chosen_by, mean, spread, str(len(scores))))
    title = "chosen on validation" if any(row[2] != "–" for row in rows) else "as given"
    print_columns(title, ("method", "at", "val (%)", "test (%)", "std", "seeds"), rows)
    for record in untested(now, results):
        reason = (record["error"].strip() or "no reason recorded").splitlines()[-1]
        print(f"{record['label']}, seed {record['seed']}: not tested, as its run failed ({reason}).")
    say_held(now)


def say_held(now: Plan) -> None:
    """A line for each method and cell without a choice."""
    for held in now.held:
        print(held)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
