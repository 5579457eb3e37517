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


COUNTS = {
    "identity": 0,
    "tanh": 0,
    "swish": 4,  # β
    "residual_tanh": 2 * 4,  # a, b
    "rational": 3 * 4,  # p, q, t
    "aurora": 4 * 4 + 4 * 8,  # H, w
}


@pytest.mark.parametrize(("nonlinearity", "theta"), COUNTS.items())
def test_parameters_of_every_kind_by_hand(nonlinearity: str, theta: int) -> None:
    """One layer 64 → 192, r = 4: A and B 4 · (64 + 192), v 4, G and c 4 · 4 + 4, and θ."""
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=7)
    s = summary(nolora_vision.inject(model, rank=4, targets="fc1", layers=(0,), nonlinearity=nonlinearity))
    (row,) = s.rows
    assert (row.path, row.role, row.shape, row.rank) == ("blocks.0.mlp.fc1", "fc1", "64 → 192", 4)
    assert row.params == 4 * (64 + 192) + 4 + (4 * 4 + 4) + theta == s.adapter_params


@pytest.mark.parametrize(("share_down", "params"), [(False, 2 * 3 * (64 + 64)), (True, 3 * (64 + 2 * 64))])
def test_a_shared_down_projection_counts_once(share_down: bool, params: int) -> None:
    model = timm.create_model("test_vit")
    nolora_vision.inject(
        model, rank=3, targets=("q", "v"), layers=(0,), share_down=share_down, modulation="none", nonlinearity="tanh"
    )
    assert [(row.role, row.params) for row in summary(model).rows] == [("q+v", params)]


def test_totals_follow_the_model() -> None:
    model = timm.create_model("test_vit", num_classes=7)
    everything = sum(p.numel() for p in model.parameters())
    bare = summary(model)
    assert (bare.rows, bare.adapter_params, bare.trainable_params) == ((), 0, everything) == ((), 0, bare.total_params)
    adapted = summary(nolora_vision.inject(model))
    assert adapted.total_params == everything + adapted.adapter_params
    assert adapted.trainable_params == adapted.adapter_params + 64 * 7 + 7
    model.get_classifier().requires_grad_(False)
    assert summary(model).head_params == 0 and summary(model).trainable_params == adapted.adapter_params
    nolora_vision.eject(model)
    assert summary(model).total_params == everything


def test_printed_line_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    nolora_vision.inject(model, targets=("q", "v"), rank=16, nonlinearity="identity", modulation="none")
    print_trainable_parameters(model)
    assert capsys.readouterr().out == (
        "trainable params: 666,724 (adapters 589,824, head 76,900) || all params: 86,465,380 || trainable%: 0.7711\n"
    )
