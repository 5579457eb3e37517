"""Every YAML in configs/ loads, says what it is, and builds on the meta device."""

from pathlib import Path

import pytest
import torch

from nolora_vision import summary
from nolora_vision.benchmark.sweep_plan import plan, read_sweep
from nolora_vision.methods import apply_method
from nolora_vision.training.backbone import build_model
from nolora_vision.training.config_file import load_run_config
from nolora_vision.training.sources import REGISTRY

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(SWEEPS))


def test_none_is_overlooked() -> None:
    assert (len(CONFIGS), len(SWEEPS)) == (2, 2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path: Path) -> None:
    text, config = path.read_text(encoding="utf-8"), load_run_config(path)
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert f"python train.py -c configs/{path.name}" in "\n".join(header)
    assert any(word in text for word in ("Expected: ", "Measured: ")) and "device" in text.lower()
    with torch.device("meta"):
        model = build_model(config.model, REGISTRY[config.dataset].num_classes, pretrained=False)
        apply_method(model, config.method, config.adapter, options=config.method_options)
    assert summary(model).adapter_params > 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweep(path: Path) -> None:
    sweep, text = read_sweep(path), path.read_text(encoding="utf-8")
    assert f"python -m nolora_vision.benchmark.sweep configs/sweeps/{path.name}" in text and sweep.description
    tasks, _ = plan(sweep, {})
    assert {task.label for task in tasks} == set(sweep.methods)
    for label in sweep.methods:
        config = next(task.config for task in tasks if task.label == label)
        with torch.device("meta"):
            model = build_model(config.model, REGISTRY[config.dataset].num_classes, pretrained=False)
            apply_method(model, config.method, config.adapter, options=config.method_options)
        assert any(parameter.requires_grad for parameter in model.parameters())
