"""Counts that can be checked by hand."""

import pytest
import timm
import torch

import nolora_vision
from nolora_vision import print_trainable_parameters, summary


@pytest.mark.parametrize(("modulation", "more"), [("none", 0), ("vector", 2 * 12 * 16)])
def test_parameters_of_vit_base_on_q_and_v(modulation: str, more: int) -> None:
    """r = 16: LoRA 589,824; the vector adds 384. Source: method.md's arithmetic, 12 · 2 · 16 · (768 + 768)."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    settings = {"rank": 16, "nonlinearity": "identity", "modulation": modulation}
    s = summary(nolora_vision.inject(model, targets=("q", "v"), **settings))
    assert s.adapter_params == 589_824 + more
    assert s.head_params == 768 * 100 + 100 and s.trainable_params == s.adapter_params + s.head_params
    assert s.total_params == sum(p.numel() for p in model.parameters())


def test_table_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    assert "no adapters" in str(summary(model))
    nolora_vision.inject(model, layers=(0,), targets=("q", "fc2"), rank=2, nonlinearity="tanh", modulation="vector")
    lines = str(summary(model)).splitlines()
    assert lines[0].split() == ["layer", "role", "in", "→", "out", "rank", "f", "modulation", "parameters"]
    assert lines[1].split() == ["blocks.0.attn.qkv", "q", "64", "→", "192", "2", "tanh", "vector", str(2 * 128 + 2)]
    assert lines[2].split()[:2] == ["blocks.0.mlp.fc2", "fc2"]
    s = summary(model)
    assert f"adapters: {s.adapter_params:,} parameters in 2 layers" in lines[-3]
    assert lines[-2] == f"head: {64 * 7 + 7:,} trainable parameters"
    print_trainable_parameters(model)
    out = capsys.readouterr().out
    assert out.startswith(f"trainable params: {s.trainable_params:,} (adapters {s.adapter_params:,}, head 455)")
    assert f"trainable%: {100 * s.trainable_params / s.total_params:.4f}" in out
