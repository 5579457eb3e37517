"""A sweep on digits from its file: results, what a kill leaves, failures, two processes, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nolora_vision.benchmark import results as report_results
from nolora_vision.benchmark import sweep as sweeping
from nolora_vision.benchmark.report import write_report
from nolora_vision.benchmark.sweep import claim_and_run, conduct, main, read_results
from nolora_vision.benchmark.sweep_plan import Sweep, plan, read_sweep
from nolora_vision.training.errors import NotFiniteError
from nolora_vision.training.progress import RunsProgress
from nolora_vision.training.shelf import Shelf
from tests.training.forked_start import finished

SWEEP = """
base:
  model: vit_tiny_patch16_224
  pretrained: false
  dataset: digits:0-4
  img_size: 16
  model_kwargs: {patch_size: 8, depth: 1, embed_dim: 16, num_heads: 1}
  epochs: 1
  batch_size: 64
  max_train_samples: 64
  max_eval_samples: 20
  workers: 0
methods:
  lora: {method: lora}
  tanh: {method: nolora, adapter: {nonlinearity: tanh, modulation: vector}}
choose: {axes: {lr: [1e-3, 4e-3]}, seeds: [100], extend: 0}
seeds: [0, 1]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "s.yaml").write_text(SWEEP)
    return read_sweep(tmp_path / "s.yaml")


def test_a_sweep_runs_what_is_missing_and_nothing_twice(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "out", []
    real = sweeping.run

    def counted(config: Any, **options: Any) -> Any:
        ran.append(config)
        return real(config, **options)

    monkeypatch.setattr(sweeping, "run", counted)
    conduct(sweep, folder)
    results = read_results(folder)
    assert len(ran) == len(results) == 2 * 2 + 2 * 2
    choosing = [r for r in results.values() if r["phase"] == "choose"]
    assert len(choosing) == 4 and not any("test_top1_percent" in r["metrics"] for r in choosing)
    assert all("test_top1_percent" in r["metrics"] for r in results.values() if r["phase"] == "final")
    summary = json.loads((folder / "sweep.json").read_text())
    assert [c["label"] for c in summary["chosen"].values()] == ["lora", "tanh"] and summary["runs"] == {
        "done": 8,
        "failed": 0,
    }
    victim = sorted((folder / "runs").glob("*.json"))[0]
    before = json.loads(victim.read_text())
    victim.unlink()
    conduct(sweep, folder)
    assert len(ran) == 9
    again = json.loads(victim.read_text())
    assert again["metrics"]["val_top1_percent"] == before["metrics"]["val_top1_percent"]


def test_a_run_without_a_result_leaves_nothing_half(sweep: Sweep, tmp_path: Path) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            conduct(sweep, tmp_path / "out")
    assert not read_results(tmp_path / "out")
    conduct(sweep, tmp_path / "out")
    assert len(read_results(tmp_path / "out")) == 8


def test_a_failure_is_recorded_and_the_rest_goes_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real = tmp_path / "out", sweeping.run

    def picky(config: Any, **options: Any) -> Any:
        if config.method == "nolora":
            raise RuntimeError("no room")
        return real(config, **options)

    monkeypatch.setattr(sweeping, "run", picky)
    assert main(tmp_path / "s.yaml", output=folder) == 1
    results = read_results(folder)
    failures = [r for r in results.values() if r["status"] == "failed"]
    assert len(results) == 6 and {(r["error"], r["error_type"]) for r in failures} == {
        ("RuntimeError: no room", "RuntimeError")
    }
    printed, held = capsys.readouterr().out, "tanh: nothing is chosen and tested, as 2 of 2 runs to choose by failed"
    assert {r["label"] for r in failures} == {"tanh"} and "failed: RuntimeError: no room" in printed
    assert held in printed and any(held in line for line in report_results.read_results([folder]).warnings)
    monkeypatch.setattr(sweeping, "run", real)
    assert main(tmp_path / "s.yaml", output=folder, retry_failed=True, dry_run=True) == 0
    assert len(read_results(folder)) == 6  # it only says what it would do
    assert held in capsys.readouterr().out
    assert main(tmp_path / "s.yaml", output=folder, retry_failed=True) == 0
    assert len(read_results(folder)) == 8 and all(r["status"] == "done" for r in read_results(folder).values())
    assert not report_results.read_results([folder]).warnings


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("no room"), 1), (NotFiniteError("loss", math.nan, step=1, epoch=1, rates="lr 1"), 0)],
)
def test_a_run_to_test_that_failed_is_told(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception,
    code: int,
) -> None:  # fmt: skip
    def fake(config: Any, **options: Any) -> Any:
        if options["score_test"] and config.seed == 1 and config.method == "nolora":
            raise error
        metrics = {"val_top1_percent": 50.0, "test_top1_percent": 50.0, "total_seconds": 1.0}
        return {"metrics": metrics, "dataset": {"id": "digits"}, "model": "vit"}

    monkeypatch.setattr(sweeping, "run", fake)
    assert main(tmp_path / "s.yaml", output=tmp_path / "out") == code
    assert "tanh, seed 1: not tested, as its run failed (" in capsys.readouterr().out
    assert main(tmp_path / "s.yaml", output=tmp_path / "out") == code  # nothing is left to do, and it still failed


def test_a_sweep_whose_runs_all_diverge_leaves_strict_json(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> Any:
        raise NotFiniteError("loss", math.nan, step=1, epoch=1, rates="lr 1")

    monkeypatch.setattr(sweeping, "run", diverging)
    conduct(sweep, tmp_path / "out")
    text = (tmp_path / "out" / "sweep.json").read_text()
    said = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["chosen"] == {} and len(said["held"]) == 2 and said["runs"] == {"done": 0, "failed": 4}


def test_a_changed_base_leaves_the_runs_of_before_out(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake run tells its epochs by its score."""

    def fake(config: Any, **_: Any) -> Any:
        metrics = {"val_top1_percent": 50.0, "test_top1_percent": 50.0 + config.epochs, "total_seconds": 1.0}
        return {"metrics": metrics, "dataset": {"id": "digits"}, "model": "vit"}

    folder = tmp_path / "out"
    monkeypatch.setattr(sweeping, "run", fake)
    conduct(sweep, folder)
    before = set(read_results(folder))
    (tmp_path / "s.yaml").write_text(SWEEP.replace("epochs: 1", "epochs: 2"))
    rows: list[Any] = []
    monkeypatch.setattr(sweeping, "print_columns", lambda title, names, found: rows.extend(found))
    conduct(read_sweep(tmp_path / "s.yaml"), folder)
    assert len(read_results(folder)) == 16
    assert [(row[0], *row[-3:]) for row in rows] == [(name, "52.00", "0.00", "2") for name in ("lora", "tanh")]
    read = report_results.read_results([folder])
    assert len(read.runs) == 8 and not before & {run.key for run in read.runs}
    assert {run.test for run in read.runs if run.phase == "final"} == {52.0}
    assert "8 records are left out: sweep.json does not list them among its tasks" in read.warnings[0]
    assert json.loads((folder / "sweep.json").read_text())["runs"] == {"done": 8, "failed": 0}


def test_what_another_process_does_is_left_to_it(sweep: Sweep, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "runs").mkdir(parents=True)
    task = plan(sweep, {})[0][0]
    with FileLock(folder / "runs" / f".{task.name}.lock", is_singleton=False):
        assert not claim_and_run(task, sweep, folder, Shelf(), RunsProgress(1))
    assert not read_results(folder)
    assert claim_and_run(task, sweep, folder, Shelf(), RunsProgress(1))
    assert list(read_results(folder)) == [task.name]


def test_no_run_begins_that_would_end_too_late(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conduct(sweep, tmp_path / "out", deadline=0.0)
    assert not read_results(tmp_path / "out") and "at least 4 runs are left" in capsys.readouterr().out


def test_adapters_of_tested_runs_are_kept_if_asked(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP + "keep_adapters: true\n")
    conduct(read_sweep(tmp_path / "s.yaml"), tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out" / "adapters").iterdir()}
    finals = {name for name, record in read_results(tmp_path / "out").items() if record["phase"] == "final"}
    assert kept == finals and all((tmp_path / "out" / "adapters" / name / "adapter").is_dir() for name in kept)


def test_a_report_reads_what_a_sweep_leaves(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP + "keep_adapters: true\n")
    conduct(read_sweep(tmp_path / "s.yaml"), tmp_path / "out")
    results = report_results.read_results([tmp_path / "out"])
    assert not results.warnings and len(results.runs) == 8
    write_report([tmp_path / "out"], output=tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "lora" in text and "tanh" in text and "warning" not in text.lower()


def test_a_run_on_all_images_has_no_validation_score_to_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SWEEP.replace("  workers: 0", "  workers: 0\n  train_on: train_val\n  keep_epoch: last")
    (tmp_path / "s.yaml").write_text("\n".join(line for line in text.splitlines() if not line.startswith("choose")))
    conduct(read_sweep(tmp_path / "s.yaml"), tmp_path / "out")
    out = capsys.readouterr().out
    printed = [line for line in out.splitlines() if "seed 0" in line]
    assert len(printed) == 2 and all("test " in line and "val " not in line for line in printed)
    assert "as given" in out and "nan" not in out and "chosen on validation" not in out


def test_two_processes_share_the_work(sweep: Sweep, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nolora_vision.benchmark.sweep", str(tmp_path / "s.yaml")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--processes", "2"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_results(tmp_path / "out")) == 8
    assert sum("val " in line for line in done.stdout.splitlines()) >= 8
    assert "chosen on validation" in done.stdout


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path / "none.yaml") == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(SWEEP)
    assert main(tmp_path / "s.yaml", output=tmp_path / "out", dry_run=True) == 0
    assert "4 runs can be done next, 0 choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("methods: {lora: {epohcs: 3}}", [], "lora: epohcs is not a field. Did you mean 'epochs'"),
        (
            "methods: {lora: {method: lora}}\naxes: {epochs: [1, 0]}",
            [],
            "lora: epochs must be a whole number of at least 1",
        ),
        ("methods: {lora: {method: lora}}\nbase: &b {adapter: *b}", [], "is not YAML"),
        (SWEEP, ["--processes", "0"], "processes must be at least 1"),
        (SWEEP, ["--max-hours", "nan"], "max_hours a number of at least 0, got 1 and nan"),
    ],
)
def test_nothing_is_made_on_disk_before_a_sweep_is_valid(
    tmp_path: Path, text: str, args: list[str], message: str
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    done = finished("-m", "nolora_vision.benchmark.sweep", "s.yaml", *args, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert message in done.stderr and [path.name for path in tmp_path.rglob("*")] == ["s.yaml"]
