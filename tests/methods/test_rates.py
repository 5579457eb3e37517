"""The rates to start from: after a few steps every method has changed the features about as much as LoRA has."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from nolora_vision import AdapterConfig, param_groups
from nolora_vision.methods import METHODS, apply_method

STEPS, WITHIN = 10, 6.0
"""WITHIN is a factor: at LoRA's rate c3a, hira, vera and ia3 have less than a tenth of its change of the features."""
CHECKED = ("c3a", "hira", "vera", "ia3", "oft", "boft", "adaptformer", "randlora", "layernorm", "bitfit")
"""Without fourierft, whose rate is for wide layers: its update grows as a layer shrinks."""


def feature_change(method: str) -> float:
    """Relative change of the features of a small ViT by a few steps on noise at the method's rate."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=8).eval()
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    before = features(model, images)
    apply_method(model, method, AdapterConfig(rank=4))
    optimizer = torch.optim.AdamW(param_groups(model, lr=METHODS[method].lr, head_lr=3e-3, weight_decay=0.0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return ((features(model, images) - before).norm() / before.norm()).item()


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    found = model.forward_features(images)  # type: ignore[operator]
    return model.forward_head(found, pre_logits=True)  # type: ignore[operator]


@pytest.fixture(scope="module")
def of_lora() -> float:
    return feature_change("lora")


@pytest.mark.parametrize("method", CHECKED)
def test_a_method_moves_about_as_much_as_lora(method: str, of_lora: float) -> None:
    assert of_lora / WITHIN < feature_change(method) < of_lora * WITHIN


def test_fourierft_starts_as_its_authors_do_on_vits() -> None:
    assert METHODS["fourierft"].lr == 0.3 and METHODS["fourierft"].options["scaling"] == 300
