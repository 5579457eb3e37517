"""Reading what sweeps leave, and putting runs into the cells where they are compared."""

import json
from pathlib import Path

import pytest

from nolora_vision.benchmark.comparison import Cell, Comparison, compare, recipe_notes
from nolora_vision.benchmark.published import EIGHT_SETS, dataset_title, vtab_task
from nolora_vision.benchmark.results import Results, read_results
from nolora_vision.training.errors import RunError
from nolora_vision.training.vtab import VTAB_TASKS
from tests.benchmark.sweep_files import CIFAR10, MODEL, SweepFiles


def compared(*folders: Path) -> tuple[list[Comparison], Results, list[str]]:
    results = read_results(folders)
    comparisons, warnings = compare(results)
    return comparisons, results, [*results.warnings, *warnings]


def labels(comparison: Comparison) -> list[str]:
    return [outcome.label for outcome in comparison.outcomes]


def test_runs_are_compared_within_dataset_model_and_the_axes_that_were_not_chosen(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s", methods=["swish", "lora"])
    for rank in (8, 4):
        for label, test in (("swish", 82.0), ("lora", 80.0)):
            for seed in (1, 0):
                sweep.done(label, seed, test=test + seed, adapter__rank=rank, lr=0.004, head_lr=0.01)
    sweep.done("lora", 0, test=70.0, adapter__rank=4, lr=0.004, model="vit_small_patch16_224")
    comparisons, results, warnings = compared(tmp_path / "s")
    cells = [comparison.cell for comparison in comparisons]
    small, *rest = cells
    assert small == Cell(CIFAR10, "vit_small_patch16_224", (("adapter.rank", 4),))
    assert rest == [Cell(CIFAR10, MODEL, (("adapter.rank", rank),)) for rank in (4, 8)]
    assert cells[2].title == f"CIFAR-10 · {MODEL} · rank 8" and not warnings and results.baseline == "lora"
    assert labels(comparisons[2]) == ["lora", "swish"]  # the baseline first
    lora, swish = comparisons[2].outcomes
    assert swish.tests == {0: 82.0, 1: 83.0} and swish.point == (("head_lr", 0.01), ("lr", 0.004))
    assert lora.difference is None and swish.difference is not None and swish.difference.pairs == (2.0, 2.0)


def test_a_method_without_ranks_is_compared_at_every_rank_but_not_at_other_train_sizes(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    for images in (100, 1000):
        for rank in (1, 4):
            sweep.done("lora", 0, test=80.0, adapter__rank=rank, max_train_samples=images)
    sweep.done("linear", 0, test=70.0, max_train_samples=100)
    found = {tuple(dict(c.cell.axes).values()): labels(c) for c in compared(tmp_path / "s")[0]}
    assert found == {
        (1, 100): ["lora", "linear"],
        (4, 100): ["lora", "linear"],
        (1, 1000): ["lora"],
        (4, 1000): ["lora"],
    }


def test_cells_are_sorted_by_size(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    for images in (None, 1000, 100):
        sweep.done("lora", 0, test=80.0, max_train_samples=images)
    found = [c.cell.conditions for c in compared(tmp_path / "s")[0]]
    assert found == ["100 training images", "1,000 training images", "all training images"]


def test_only_the_chosen_point_counts(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    sweep.done("lora", 0, test=90.0, val=99.0, lr=0.1, adapter__rank=8)
    sweep.done("lora", 0, test=80.0, val=70.0, lr=0.004, adapter__rank=8)
    (comparison,), _, warnings = compared(tmp_path / "s")
    assert comparison.outcomes[0].tests == {0: 90.0} and "only those at the one that validation prefers" in warnings[0]
    sweep.choice("lora", {"lr": 0.004}, {"adapter.rank": 8}, at_edge=True)
    sweep.choice("lora", {"lr": 0.1}, {"adapter.rank": 4})
    (comparison,), _, warnings = compared(tmp_path / "s")
    assert comparison.outcomes[0].tests == {0: 80.0} and comparison.outcomes[0].at_edge
    assert "final runs at 2 points; only those at the one that the sweep chose count" in warnings[0]


def test_a_failed_run_goes_where_it_was_meant_to(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    sweep.done("lora", 0, test=80.0, dataset=EIGHT_SETS["DTD"])
    sweep.failed("dora", 0, "Traceback …\nOutOfMemoryError: 3 GiB", lr=0.1)
    sweep.failed("dora", 1, "OutOfMemoryError: 3 GiB", lr=0.1)
    sweep.failed("dora", 2, "", lr=0.1)
    (comparison,), *_ = compared(tmp_path / "s")
    dora = comparison.outcomes[1]
    assert dora.label == "dora" and not dora.tests and dora.difference is None
    assert dora.failed() == "final: OutOfMemoryError: 3 GiB (2×); final: no reason recorded"
    several = SweepFiles(tmp_path / "t")
    for name in ("CIFAR-10", "DTD"):
        several.done("lora", 0, test=80.0, dataset=EIGHT_SETS[name], axis=1)
    several.failed("dora", 0, "no", axis=1)
    assert {c.cell.dataset for c in compared(tmp_path / "t")[0]} == {CIFAR10, EIGHT_SETS["DTD"], "unknown"}


def test_what_cannot_be_read_is_named_and_skipped(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    good = json.loads(sweep.done("lora", 0, test=80.0).read_text())
    broken = [
        ("{", r"cannot be read \(JSONDecodeError"),
        ([1], "must hold an object, holds list"),
        ({**good, "label": None}, "label must be str, got None"),
        ({**good, "seed": "one"}, "seed must be int, got 'one'"),
        ({**good, "phase": "last"}, "phase must be one of choose, final, got 'last'"),
        ({**good, "status": "running"}, "status must be one of done, failed, got 'running'"),
        ({**good, "metrics": {}}, "metrics.test_top1_percent must be a finite number, got None"),
        (
            {**good, "metrics": {"test_top1_percent": float("nan")}},
            "test_top1_percent must be a finite number, got nan",
        ),
        ({**good, "dataset": 3}, "dataset must be dict, got 3"),
        ({**good, "environment": ["a processor"]}, r"environment must be dict, got \['a processor'\]"),
        ({**good, "model": ""}, "model and dataset.id must be named"),
    ]
    paths = [sweep.write(record) for record, _ in broken]
    results = read_results([tmp_path / "s"])
    assert len(results.runs) == 1 and len(results.warnings) == len(broken)
    for path, (_, message), warning in zip(paths, broken, results.warnings, strict=True):
        assert warning.startswith(f"{path}: skipped: ")
        with pytest.raises(ValueError, match=message):
            raise ValueError(warning)


def test_a_missing_or_broken_sweep_json_leaves_the_defaults(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    sweep.done("lora", 0, test=80.0, lr=0.1, adapter__rank=4)
    for content in (None, "[]", '{"choose": 3, "chosen": {"a": 1, "b": {"cell": 2}}, "methods": null}'):
        path = tmp_path / "s" / "sweep.json"
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)
        results = read_results([tmp_path / "s"])
        assert results.sweeps[0].name == "s" and results.baseline == "lora"
        assert results.runs[0].chosen_axes == (("lr", 0.1),) and results.runs[0].cell_axes == (("adapter.rank", 4),)
        assert len(results.warnings) == (content is None or content == "[]")


def test_the_same_run_of_two_folders_counts_once(tmp_path: Path) -> None:
    first, second = SweepFiles(tmp_path / "a"), SweepFiles(tmp_path / "b", baseline="linear")
    first.failed("lora", 0, "killed", lr=0.1)
    first.done("lora", 1, test=81.0, lr=0.1)
    second.done("lora", 0, test=80.0, lr=0.1)
    second.done("lora", 1, test=99.0, lr=0.1)
    results = read_results([tmp_path / "a", tmp_path / "b"])
    assert {run.seed: run.test for run in results.runs if run.error is None} == {0: 80.0, 1: 81.0}
    assert any("skipped: the same run as a/runs/" in line for line in results.warnings)
    assert "baseline is 'lora', as in a; others name linear" in results.warnings


def test_nothing_to_report_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no folder runs/\. Name the output of a sweep"):
        read_results([tmp_path])
    SweepFiles(tmp_path / "s").write("{")
    with pytest.raises(RunError, match=r"No readable run in .*s\. Run the sweep first\.\n  .*skipped"):
        read_results([tmp_path / "s"])


def test_recipes_that_differ_are_told(tmp_path: Path) -> None:
    own = {"epochs": 10, "lr": 0.2, "adapter": {"rank": 4}}
    sweep = SweepFiles(tmp_path / "s", methods={"lora": {"method": "lora"}, "lora, long": own})
    sweep.done("lora", 0, test=80.0, config={"epochs": 5, "adapter": {"rank": 8}, "lr": 0.1, "output": "a"})
    sweep.done("lora, long", 0, test=81.0, config={"epochs": 10, "adapter": {"rank": 4}, "lr": 0.2, "output": "b"})
    (comparison,), *_ = compared(tmp_path / "s")
    assert recipe_notes(comparison) == ["The recipes differ in epochs: lora 5; lora, long 10."]


def test_datasets_have_the_names_of_the_papers() -> None:
    assert dataset_title(CIFAR10) == "CIFAR-10" and dataset_title("me/mine") == "me/mine"
    assert vtab_task("vtab:dtd") == "dtd" and vtab_task("/data/vtab-1k/kitti/") == "kitti"
    assert vtab_task("tanganke/dtd") is None and vtab_task("vtab:other") is None and len(set(VTAB_TASKS)) == 19


def test_datasets_and_models_of_the_grid_are_no_conditions(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    for name, dataset in (("dtd", EIGHT_SETS["DTD"]), ("cifar10", CIFAR10)):
        point = {"dataset": name, "model": "vit_tiny"}
        for label in ("lora", "gate"):
            record = json.loads(sweep.done(label, 0, test=80.0, dataset=dataset).read_text())
            sweep.write({**record, "seed": 1, "point": point})
        sweep.write({"label": "dora", "phase": "final", "seed": 1, "status": "failed", "error": "no", "point": point})
    comparisons, *_ = compared(tmp_path / "s")
    assert [(c.cell, labels(c)) for c in comparisons] == [
        (Cell(dataset, MODEL, ()), ["lora", "dora", "gate"]) for dataset in (CIFAR10, EIGHT_SETS["DTD"])
    ]
    assert [len(c.outcomes[0].tests) for c in comparisons] == [2, 2]


def test_a_copied_run_is_no_cause_for_a_warning(tmp_path: Path) -> None:
    for name in "ab":
        SweepFiles(tmp_path / name).done("lora", 1, test=81.0, lr=0.1)
    results = read_results([tmp_path / "a", tmp_path / "b"])
    assert len(results.runs) == 1 and not results.warnings


def test_another_baseline(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    for seed in range(3):
        sweep.done("lora", seed, test=80.0 + seed, lr=0.1)
        sweep.done("longer", seed, test=81.0 + seed, lr=0.1)
    results = read_results([sweep.folder], baseline="longer")
    (comparison,), *_ = compare(results)
    assert [(o.label, d.mean) for o, d in comparison.differences] == [("lora", -1.0)]
    with pytest.raises(RunError, match=r"No run is of the baseline 'longest'\. Give one of: longer, lora\."):
        read_results([sweep.folder], baseline="longest")


def test_weights_of_a_file_whose_name_says_nothing_have_the_tag_that_was_asked_for(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    bare = "vit_tiny_patch16_224"
    for label, tag, file in (
        ("lora", "augreg_in21k_ft_in1k", "model.safetensors"),
        ("gate", "augreg_in21k", "cache/pytorch_model.bin"),
        ("swish", "augreg_in21k", "mine.safetensors"),
    ):
        config = {"model": f"{bare}.{tag}", "pretrained_path": file}
        sweep.done(label, 0, test=80.0, model=f"{bare}.{Path(file).stem}", config=config)
    sweep.done("tanh", 0, test=80.0, model=f"{bare}.model", config={"model": bare, "pretrained_path": "model.bin"})
    assert {run.label: run.model for run in read_results([sweep.folder]).runs} == {
        "lora": f"{bare}.augreg_in21k_ft_in1k",
        "gate": f"{bare}.augreg_in21k",
        "swish": f"{bare}.mine",
        "tanh": f"{bare}.model",
    }
