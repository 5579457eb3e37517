"""Runs of different settings that a report reads together: never averaged, and paired only with their like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nolora_vision.benchmark.comparison import Comparison, compare
from nolora_vision.benchmark.results import read_results
from nolora_vision.training.errors import RunError
from tests.benchmark.sweep_files import SweepFiles

METHODS: dict[str, Any] = {"lora": {"method": "lora"}, "gate": {"method": "nolora", "adapter": {"modulation": "gate"}}}


def compared(*folders: Path) -> tuple[dict[str, Comparison], list[str]]:
    """Comparisons by their conditions, and warnings."""
    results = read_results(folders)
    comparisons, warnings = compare(results)
    return {c.cell.conditions: c for c in comparisons}, [*results.warnings, *warnings]


def scores_of(comparison: Comparison) -> dict[str, list[float]]:
    return {outcome.label: list(outcome.tests.values()) for outcome in comparison.outcomes}


def fill(sweep: SweepFiles, tests: dict[str, float], config: dict[str, Any], **point: Any) -> None:
    for label, test in tests.items():
        for seed in range(3):
            sweep.done(label, seed, test=test + seed, config=config, **point)


def test_two_sweeps_whose_baselines_differ_keep_their_own(tmp_path: Path) -> None:
    for name, amp, gain in (("methods", "bfloat16", 2.0), ("rest", "none", -1.0)):
        sweep = SweepFiles(tmp_path / name, methods=METHODS, base={"epochs": 8})
        fill(sweep, {"lora": 80.0, "gate": 80.0 + gain}, {"amp_dtype": amp, "workers": len(amp)}, lr=0.1)
    cells, (warning,) = compared(tmp_path / "methods", tmp_path / "rest")
    assert {c: [d.mean for _, d in found.differences] for c, found in cells.items()} == {
        "amp dtype bfloat16": [2.0],
        "amp dtype none": [-1.0],
    }
    assert "runs of other settings are compared apart: amp dtype bfloat16 or none" in warning


def test_a_changed_base_in_one_folder_is_not_averaged(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s", methods={**METHODS, "longer": {"method": "lora", "epochs": 16}})
    for epochs, test in ((8, 80.0), (16, 90.0)):
        fill(sweep, {"lora": test, "gate": test + 1}, {"epochs": epochs}, lr=0.1)
    fill(sweep, {"longer": 85.0}, {"epochs": 16}, lr=0.1)
    cells, _ = compared(sweep.folder)
    assert scores_of(cells["epochs 8"])["lora"] == [80.0, 81.0, 82.0]
    assert scores_of(cells["epochs 16"])["gate"] == [91.0, 92.0, 93.0]
    assert all(scores_of(found)["longer"] == [85.0, 86.0, 87.0] for found in cells.values())  # it is of both


def test_what_one_sweep_chose_and_the_other_gave_is_no_pair(tmp_path: Path) -> None:
    first = SweepFiles(tmp_path / "a", methods=METHODS)
    fill(first, {"lora": 80.0}, {"head_lr": 0.01}, lr=0.1, head_lr=0.01)
    second = SweepFiles(tmp_path / "b", methods=METHODS, base={"head_lr": 0.01}, choose={"axes": ["lr"]})
    fill(second, {"gate": 82.0}, {"head_lr": 0.01}, lr=0.1)
    cells, _ = compared(first.folder, second.folder)
    assert {name: list(scores_of(found)) for name, found in cells.items()} == {
        "head lr chosen": ["lora"],
        "head lr 0.01": ["gate"],
    }


def test_a_rank_that_one_sweep_gives_and_another_has_as_an_axis_is_one_cell(tmp_path: Path) -> None:
    first = SweepFiles(tmp_path / "a", methods=METHODS, axes={"adapter.rank": [1, 4]})
    for rank in (1, 4):
        fill(first, {"lora": 80.0}, {"adapter": {"rank": rank}}, adapter__rank=rank)
    second = SweepFiles(tmp_path / "b", methods=METHODS, base={"adapter": {"rank": 4}})
    fill(second, {"gate": 82.0}, {"adapter": {"rank": 4}})
    cells, _ = compared(first.folder, second.folder)
    assert {name: list(scores_of(found)) for name, found in cells.items()} == {
        "rank 1": ["lora"],
        "rank 4": ["lora", "gate"],
    }


def test_a_label_of_two_settings_is_two_rows(tmp_path: Path) -> None:
    for name, kind, test in (("a", "gate", 82.0), ("b", "vector", 81.0)):
        sweep = SweepFiles(tmp_path / name, methods={**METHODS, "gate": {"adapter": {"modulation": kind}}})
        fill(sweep, {"gate": test}, {"adapter": {"modulation": kind}}, lr=0.1)
    fill(sweep, {"lora": 80.0}, {"adapter": {"modulation": "gate"}}, lr=0.1)
    (found,) = compared(tmp_path / "a", tmp_path / "b")[0].values()
    assert {outcome.label: d.mean for outcome, d in found.differences} == {
        "gate (modulation gate)": 2.0,
        "gate (modulation vector)": 1.0,
    }


def test_a_baseline_of_two_settings_is_refused(tmp_path: Path) -> None:
    for name, ratio in (("a", 1.0), ("b", 4.0)):
        sweep = SweepFiles(tmp_path / name, methods=METHODS)
        fill(sweep, {"lora": 80.0}, {"method": "lora", "method_options": {"lr_ratio": ratio}}, lr=0.1)
    with pytest.raises(
        RunError,
        match=r"lora, the baseline, stands for runs of several settings: method_options\.lr_ratio 1\.0 \(a\) or 4\.0 "
        r"\(b\)\. Report on the folders apart, give the settings names of their own",
    ):
        read_results([tmp_path / "a", tmp_path / "b"])


def test_a_field_that_an_older_run_does_not_state_is_at_its_default(tmp_path: Path) -> None:
    older = SweepFiles(tmp_path / "older", methods=METHODS)
    fill(older, {"lora": 80.0}, {"method": "lora"}, lr=0.1)
    usual = SweepFiles(tmp_path / "usual", methods=METHODS)
    fill(usual, {"gate": 82.0}, {"mixup": 0.0, "method_options": {"lr_ratio": 1.0}}, lr=0.1)
    (found,) = compared(older.folder, usual.folder)[0].values()
    assert list(scores_of(found)) == ["lora", "gate"]
    mixed = SweepFiles(tmp_path / "mixed", methods=METHODS, base={"mixup": 0.2})
    fill(mixed, {"gate": 83.0}, {"mixup": 0.2}, lr=0.1)
    cells, _ = compared(older.folder, usual.folder, mixed.folder)
    assert {name: list(scores_of(found)) for name, found in cells.items()} == {
        "mixup 0.0": ["lora", "gate"],
        "mixup 0.2": ["gate"],
    }
    assert len(compared(older.folder, mixed.folder)[0]) == 2  # nobody tells the default, so it is none of these


@pytest.mark.parametrize("as_axis", [False, True])
def test_an_option_that_a_method_or_an_axis_gives_is_no_default_of_the_others(tmp_path: Path, as_axis: bool) -> None:
    own = {} if as_axis else {"method_options": {"lr_ratio": 4}}
    other = SweepFiles(tmp_path / "a", methods={"lora, B × 4": {"method": "lora", **own}})
    point = {"method_options__lr_ratio": 4} if as_axis else {}
    fill(other, {"lora, B × 4": 82.0}, {"method": "lora", "method_options": {"lr_ratio": 4}}, lr=0.1, **point)
    older = SweepFiles(tmp_path / "older", methods=METHODS)
    fill(older, {"lora": 80.0}, {"method": "lora", "method_options": {}}, lr=0.1)
    newer = SweepFiles(tmp_path / "newer", methods=METHODS)
    for seed in (3, 4):
        newer.done("lora", seed, test=80.0, config={"method": "lora", "method_options": {"lr_ratio": 1.0}}, lr=0.1)
    results = read_results([other.folder, older.folder, newer.folder])
    found = {run.settings["method_options.lr_ratio"] for run in results.runs if run.label == "lora"}
    assert found == {1.0}


def test_a_failed_run_that_states_nothing_stays_with_its_sweep(tmp_path: Path) -> None:
    for name, amp in (("a", "bfloat16"), ("b", "none")):
        sweep = SweepFiles(tmp_path / name, methods=METHODS)
        fill(sweep, {"lora": 80.0}, {"amp_dtype": amp}, lr=0.1)
    sweep.failed("gate", 0, "no room", lr=0.1)
    cells, _ = compared(tmp_path / "a", tmp_path / "b")
    assert list(scores_of(cells["amp dtype none"])) == ["lora", "gate"] and len(cells) == 2


def with_rows(path: Path, rows: dict[str, int]) -> None:
    record = json.loads(path.read_text())
    record["dataset"]["rows"] = rows
    path.write_text(json.dumps(record))


def test_other_draws_of_a_dataset_are_not_paired(tmp_path: Path) -> None:
    whole, part = {"train": 50_000, "test": 10_000}, {"train": 8_000, "val": 2_000, "test": 10_000}
    for name, rows, gain in (("whole", whole, 2.0), ("part", part, -1.0)):
        sweep = SweepFiles(tmp_path / name, methods=METHODS)
        for label, test in (("lora", 80.0), ("gate", 80.0 + gain)):
            for seed in range(3):
                with_rows(sweep.done(label, seed, test=test + seed, lr=0.1), rows)
        sweep.failed("dora", 0, "no room", lr=0.1)
        sweep.done("older", 0, test=80.0, lr=0.1)
    cells, warnings = compared(tmp_path / "whole", tmp_path / "part")
    assert {c: [d.mean for o, d in found.differences if o.label == "gate"] for c, found in cells.items()} == {
        "dataset rows test 10,000 / train 50,000": [2.0],
        "dataset rows test 10,000 / train 8,000 / val 2,000": [-1.0],
    }
    assert all(list(scores_of(found)) == ["lora", "gate", "dora", "older"] for found in cells.values())
    assert any("compared apart: dataset rows test 10,000 / train 50,000 or test" in line for line in warnings)


def test_rows_of_several_datasets_and_of_one_are_no_condition(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s", methods=METHODS)
    for dataset, rows in (("a", 100), ("b", 200)):
        for images in (10, 20):
            for label in METHODS:
                path = sweep.done(label, 0, test=80.0, dataset=dataset, max_train_samples=images, lr=0.1)
                with_rows(path, {"train": rows})
    cells, warnings = compared(sweep.folder)
    assert list(cells) == ["10 training images", "20 training images"] and not warnings
