"""Every YAML in configs/ loads, says what it is, and builds on the meta device."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from nolora_vision.benchmark.suite import SETS, SUITE_RECIPES, suite_configs, vtab_configs
from nolora_vision.benchmark.sweep import expected
from nolora_vision.benchmark.sweep_plan import Sweep, plan, read_sweep
from nolora_vision.benchmark.sweep_task import Task, make_task
from nolora_vision.methods import apply_method
from nolora_vision.training.backbone import build_model
from nolora_vision.training.config_file import load_run_config, read_yaml
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.sources import REGISTRY
from nolora_vision.training.vtab import VTAB_TASKS

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
LAUNCH = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - {*SWEEPS, *LAUNCH})
BY_FOLDER = {"configs": 2, "configs/suite/vit_base": 72, "configs/suite/vit_large": 72, "configs/vtab": 5}
TRAINED: dict[str, list[str]] = {}
IN_A_SUITE = [path for path in SWEEPS if path.stem.startswith(("suite_", "vtab1k"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def num_classes(dataset: str) -> int:
    short = dataset.removesuffix(".safetensors")  # of a packed copy
    return VTAB_TASKS[dataset[5:]] if dataset.startswith("vtab:") else REGISTRY[short].num_classes


def trained_names(config: RunConfig) -> list[str]:
    """Names of what trains; the model is built once for all datasets, as only the head's classes differ."""
    key = f"{config.model} {config.method} {config.method_options} {config.adapter}"
    if key not in TRAINED:
        with torch.device("meta"):
            model = build_model(config.model, 10, pretrained=False)
            apply_method(model, config.method, config.adapter, options=config.method_options)
        assert all(parameter.is_meta for parameter in model.parameters())
        TRAINED[key] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return TRAINED[key]


@cache
def planned(path: Path) -> tuple[Sweep, list[Task]]:
    sweep = read_sweep(path)
    return sweep, plan(sweep, {})[0]


def header_of(path: Path) -> str:
    """Its leading comment as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == [line for line in lines if line.startswith("#")] and comment
    return " ".join(comment)


def test_none_is_overlooked() -> None:
    folders = [name(path.parent) for path in CONFIGS]
    assert {folder: folders.count(folder) for folder in sorted(set(folders))} == BY_FOLDER
    assert (len(CONFIGS), len(SWEEPS)) == (151, 19)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config(path: Path) -> None:
    header, config = header_of(path), load_run_config(path)
    assert re.search(rf"python train\.py -c {re.escape(name(path))}(?= |$)", header)
    assert "Expected: " in header or "Measured: " in header
    assert "Device: " in header or "Time and device: " in header
    kept = read_yaml(path)
    assert kept["model"] and kept["dataset"] and kept["method"]
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
    trained, head = set(trained_names(config)), {"head.weight", "head.bias"}
    assert head <= trained and (trained > head) == (config.method != "linear")
    assert num_classes(config.dataset) >= 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweep(path: Path) -> None:
    (sweep, tasks), header = planned(path), header_of(path)
    assert f"python -m nolora_vision.benchmark.sweep {name(path)} " in header and sweep.description
    assert {task.label for task in tasks} == set(sweep.methods)
    for label in sweep.methods:
        config = next(task.config for task in tasks if task.label == label)
        assert trained_names(config) and num_classes(config.dataset) >= 2


def test_the_large_grid_says_how_many_runs_it_is() -> None:
    path = ROOT / "configs" / "sweeps" / "cifar10_224px_gpu.yaml"
    (_, tasks), header = planned(path), header_of(path)
    assert f"Runs: {len(tasks):,} to choose" in header and "not measured" in header


@pytest.mark.parametrize("path", IN_A_SUITE, ids=lambda p: p.stem)
def test_a_sweep_says_how_many_runs_it_is_and_that_nobody_ran_it(path: Path) -> None:
    (sweep, tasks), header = planned(path), header_of(path)
    first, total = len(tasks), expected(sweep, tasks)
    said = f"{total} runs if no candidates are extended: {first} that choose, which --dry-run counts, and "
    assert f"{said}{total - first} that are tested" in header and "Not run by this project" in header
    assert f"python -m nolora_vision.benchmark.report output/sweeps/{sweep.name}" in header


def final_run(sweep: Sweep, label: str, dataset: str) -> Task:
    """A method on a dataset before any rate is chosen."""
    return make_task(sweep, label, "final", {}, {"dataset": dataset}, 0)


def test_the_sweeps_run_what_the_suite_holds() -> None:
    """So that a rate which a sweep chose is one for the recipe beside it."""
    for folder in ("vit_base", "vit_large"):
        sweep = read_sweep(ROOT / "configs" / "sweeps" / f"suite_{folder}.yaml")
        assert sweep.axes == {"dataset": list(SETS)} and set(sweep.methods) == set(SUITE_RECIPES)
        for (owner, dataset, method), config in suite_configs().items():
            if owner == folder:
                assert final_run(sweep, method, dataset).config == config.resolved()


def test_the_sweep_of_vtab_runs_its_recipes_on_all_tasks() -> None:
    """But for the rates, which it chooses, and the validation images, which it needs for that."""
    sweep = read_sweep(ROOT / "configs" / "sweeps" / "vtab1k.yaml")
    assert sweep.axes == {"dataset": [f"vtab:{task}" for task in VTAB_TASKS]}
    assert set(sweep.methods) == set(vtab_configs())
    for method, config in vtab_configs().items():
        found = final_run(sweep, method, "vtab:cifar").config
        same = replace(found, vtab_root=None, train_on="train_val", lr=config.lr, head_lr=config.head_lr)
        assert same == config and found.train_on == "train"


@pytest.mark.parametrize("path", LAUNCH, ids=name)
def test_accelerate_takes_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type == {"fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[path.stem]
    assert f"--config_file configs/accelerate/{path.name}" in path.read_text(encoding="utf-8")
