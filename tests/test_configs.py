"""Every YAML in configs/ loads, says what it is, and builds on the meta device."""

from pathlib import Path

import pytest
import torch

from nolora_vision import summary
from nolora_vision.methods import apply_method
from nolora_vision.training.backbone import build_model
from nolora_vision.training.config_file import load_run_config
from nolora_vision.training.sources import REGISTRY

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_none_is_overlooked() -> None:
    assert len(CONFIGS) == 2


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
