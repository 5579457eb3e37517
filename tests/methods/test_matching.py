"""Sizes that fit a budget, counted on real models."""

from __future__ import annotations

import pytest
import torch

from nolora_vision import AdapterConfig
from nolora_vision.methods import METHODS, MethodError, apply_method, match_parameters
from nolora_vision.methods.matching import trained_without_head
from tests.families import SMALL, SWIN, Family

MODELS = {
    "vit": Family("vit_tiny_patch16_224", 32, {**SMALL, "img_size": 32}),
    "swin": Family("swin_tiny_patch4_window7_224", 64, SWIN),
}
BUDGETS = {"vera": 1_100, "adaptformer": 3_000, "oft": 5_000}
"""Of methods whose largest form is smaller than the others' budget."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_size_is_that_of_the_real_model_and_the_next_one_is_too_large(method: str, model: str) -> None:
    family, budget = MODELS[model], BUDGETS.get(method, 14_000)
    adapter = AdapterConfig(rank=2, targets=("qkv", "mlp"))
    matched = match_parameters(family.bare, method, adapter, budget)
    real = apply_method(family.build(), method, matched.adapter, options=matched.options)
    assert trained_without_head(real) == matched.parameters
    if METHODS[method].knob is None:
        assert matched.knob == "fixed"
        return
    assert matched.parameters <= budget
    value = matched.adapter.rank if matched.knob == "rank" else matched.options[matched.knob]
    larger = []
    for other in {value - 1, value + 1, value // 2, value * 2} - {0}:
        changed = AdapterConfig(rank=other) if matched.knob == "rank" else adapter
        options = {} if matched.knob == "rank" else {matched.knob: other}
        try:
            larger.append(trained_without_head(apply_method(family.build(), method, changed, options=options)))
        except ValueError:
            continue
    assert all(size <= matched.parameters or size > budget for size in larger)
    assert any(size > budget for size in larger), "else a larger one would have fitted"


def test_parts_patterns_and_depth_count() -> None:
    family = MODELS["vit"]
    parts = AdapterConfig(targets=("q", "v"), rank_pattern={"v": 3}, modulation="gate")
    matched = match_parameters(family.bare, "nolora", parts, 5_000)
    assert trained_without_head(apply_method(family.build(), "nolora", matched.adapter)) == matched.parameters <= 5_000
    deep = match_parameters(family.bare, "peanut", AdapterConfig(), 9_000, options={"depth": 2})
    assert deep.options == {"depth": 2} and deep.parameters <= 9_000
    own = AdapterConfig(rank_pattern={"fc1": 1})
    matched = match_parameters(family.bare, "dora", own, 12_000)
    assert trained_without_head(apply_method(family.build(), "dora", matched.adapter)) == matched.parameters


def test_nothing_is_computed_for_it() -> None:
    """The model is made on the meta device, whatever its size."""
    devices = []

    def make() -> torch.nn.Module:
        devices.append(torch.empty(0).device.type)
        return MODELS["vit"].bare()

    match_parameters(make, "lora", AdapterConfig(), 10_000)
    assert devices == ["meta"]


def test_a_budget_too_small_says_the_least() -> None:
    with pytest.raises(
        MethodError, match=r"peft-lora: its smallest form trains 1,792 parameters, more than the 100 all"
    ):
        match_parameters(MODELS["vit"].bare, "peft-lora", AdapterConfig(), 100)
    with pytest.raises(MethodError, match="cannot run on a part of a fused layer"):
        match_parameters(MODELS["vit"].bare, "boft", AdapterConfig(targets=("q",)), 10_000)
