"""Held weights: the same numbers, half the bytes, and nothing that reads the weights afterwards is misled."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nolora_vision
from nolora_vision import AdapterConfig, hold_frozen, release_frozen
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.frozen_dtype import HELD, held_in
from nolora_vision.surgery.sites import classifier_paths, inside
from tests.families import FAMILIES, Family

CONFIG = AdapterConfig(rank=3)


def adapted(family: Family = FAMILIES["vit"], **options: Any) -> nn.Module:
    """A model whose adapters do something."""
    model = nolora_vision.inject(family.build(), CONFIG, **options)
    for layer in adapted_layers(model).values():
        for branch in layer.adapter.branches():
            nn.init.normal_(branch.lora_B, std=0.1)
    return model.eval()


def amp() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "head"])
def test_outputs_and_gradients_are_bit_equal_under_autocast(family: Family, adapters: bool) -> None:
    plain = adapted(family) if adapters else nolora_vision.freeze_backbone(model := family.build()) or model.eval()
    held = copy.deepcopy(plain)
    x = family.images(2)
    assert hold_frozen(held, torch.bfloat16).weights
    results = []
    for model in (plain, held):
        images = x.clone().requires_grad_(True)
        with amp():
            y = output_of(model, images)
        y.float().square().sum().backward()
        results.append([y, images.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 2 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with amp(), torch.no_grad():
        inside_of_autocast = output_of(plain, x)
    assert torch.equal(output_of(held, x), inside_of_autocast) and not torch.is_autocast_enabled("cpu")


def test_what_is_held_and_what_is_not(family: Family) -> None:
    model = adapted(family)
    before = {name: p.dtype for name, p in model.named_parameters()}
    weights = hold_frozen(model, torch.bfloat16, keep_original=False).weights
    heads = classifier_paths(model)
    assert set(before.values()) == {torch.float32}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        frozen_layer = not p.requires_grad and isinstance(owner, (nn.Linear, nn.Conv2d)) and not inside(name, heads)
        assert (p.dtype == torch.bfloat16) == (name in weights) == frozen_layer, name
    held = sum(model.get_parameter(name).numel() for name in weights)
    assert held > 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("keep", [True, False])
def test_release_brings_back_what_was_kept(keep: bool) -> None:
    model = adapted()
    before = state(model)
    hold_frozen(model, torch.bfloat16, keep_original=keep)
    assert held_in(model) == torch.bfloat16 and release_frozen(model) and not release_frozen(model)
    after = state(model)
    assert all(after[name].dtype == t.dtype for name, t in before.items())
    same = {name for name, t in before.items() if torch.equal(after[name], t)}
    assert (same == set(before)) == keep
    assert all(torch.equal(after[n].bfloat16(), before[n].bfloat16()) for n in before)
    assert not model._forward_pre_hooks and not model._forward_hooks and not hasattr(model, HELD)


def test_a_saved_adapter_fits_the_plain_backbone(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit", num_classes=7)
    weights = copy.deepcopy(plain.state_dict())
    model = nolora_vision.inject(plain, CONFIG)
    nolora_vision.save_adapter(model, tmp_path / "plain")
    hold_frozen(model, torch.bfloat16, keep_original=False)
    nolora_vision.save_adapter(model, tmp_path / "held", metadata={"a": 1})
    saved = {kind: nolora_vision.read_adapter_config(tmp_path / kind) for kind in ("plain", "held")}
    assert saved["held"]["backbone"] == saved["plain"]["backbone"] != {}
    assert saved["held"]["metadata"] == {"a": 1, "frozen_dtype": "bfloat16"} and saved["plain"]["metadata"] == {}
    fresh = timm.create_model("test_vit", num_classes=7)
    fresh.load_state_dict(weights)
    nolora_vision.load_adapter(fresh, tmp_path / "held")
    assert torch.equal(fresh.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    nolora_vision.load_adapter(model, tmp_path / "plain")  # and onto the held one
    with pytest.raises(nolora_vision.AdapterMismatchError, match="frozen weights of this model are not those"):
        nolora_vision.load_adapter(timm.create_model("test_vit", num_classes=7), tmp_path / "held")


def test_other_weights_put_into_a_held_model_are_those_that_are_named(tmp_path: Path) -> None:
    model = adapted()
    hold_frozen(model, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    nolora_vision.save_adapter(model, tmp_path / "a")
    sample = nolora_vision.read_adapter_config(tmp_path / "a")["backbone"]
    name, values = next(iter(sample.items()))
    assert values[0] == float(model.get_parameter(name).flatten()[0])


def test_eject_and_fold_give_full_weights() -> None:
    linear = AdapterConfig(rank=3, nonlinearity="identity", modulation="none")
    bare = FAMILIES["vit"].build().eval()
    before = state(bare)
    model = nolora_vision.inject(bare, linear)
    hold_frozen(model, torch.bfloat16)
    nolora_vision.eject(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    nolora_vision.inject(model, linear)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.adapter.lora_B, std=0.1)  # type: ignore[arg-type]
    x = FAMILIES["vit"].images(1)
    expected = model(x)
    hold_frozen(model, torch.bfloat16)
    nolora_vision.fold(model, merge=True)
    assert held_in(model) is None
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)  # fp32: the merged sums are rounded


def test_fold_disabled_and_named_adapters_work_on_held_weights(tmp_path: Path) -> None:
    model, x = adapted(), FAMILIES["vit"].images(2)
    plain = copy.deepcopy(model)
    nolora_vision.save_adapter(model, tmp_path / "a")
    hold_frozen(model, torch.bfloat16)
    with amp():
        with nolora_vision.disabled(model), nolora_vision.disabled(plain):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(nolora_vision.fold(model)(x), nolora_vision.fold(plain)(x))
    nolora_vision.eject(model)
    nolora_vision.freeze_backbone(model)
    hold_frozen(model, torch.bfloat16)
    nolora_vision.add_adapter(model, "a", tmp_path / "a")
    nolora_vision.set_adapter(model, "a")
    assert held_in(model) == torch.bfloat16 and torch.isfinite(model(x)).all()


@pytest.mark.parametrize("undo", [release_frozen, nolora_vision.eject, lambda m: nolora_vision.fold(m, merge=True)])
def test_convit_runs_after_its_weights_were_held(undo: Any) -> None:
    """Its first forward makes a table in the type of a weight, and keeps it."""
    model = timm.create_model("convit_tiny", img_size=32, depth=2, local_up_to_layer=1, num_classes=7).eval()
    nolora_vision.inject(model, AdapterConfig(rank=2, nonlinearity="identity", modulation="none"))
    x = torch.randn(1, 3, 32, 32)
    hold_frozen(model, torch.bfloat16)
    with torch.no_grad():
        model(x)
        undo(model)
        assert model(x).dtype == torch.float32


def test_a_held_model_can_be_injected_copied_pickled_and_made_float() -> None:
    model = FAMILIES["vit"].build().eval()
    nolora_vision.freeze_backbone(model)
    hold_frozen(model, torch.bfloat16)
    nolora_vision.inject(model, CONFIG)
    x = FAMILIES["vit"].images(1)
    y = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), y) and held_in(other) == torch.bfloat16
        assert release_frozen(other) and held_in(model) == torch.bfloat16
    model.float()
    assert model(x).dtype == torch.float32 and not torch.equal(model(x), y)  # it computes in fp32 again


def test_autocast_ends_when_a_forward_fails() -> None:
    model = adapted()
    hold_frozen(model, torch.bfloat16)
    with pytest.raises(Exception, match=r"size|shape|dim"):
        model(torch.zeros(1, 3, 17, 17))
    assert not torch.is_autocast_enabled("cpu") and torch.isfinite(model(FAMILIES["vit"].images(1))).all()


def test_exports_and_moving_averages_of_held_models() -> None:
    from timm.utils import ModelEmaV3

    from nolora_vision.adapters.export_graph import plain_copy

    model = adapted()
    hold_frozen(model, torch.bfloat16)
    plain = plain_copy(model)
    assert {p.dtype for p in plain.parameters()} == {torch.float32} and held_in(plain) is None
    ema = ModelEmaV3(model, decay=0.5)
    before = state(model)
    with torch.no_grad():
        adapted_layers(model)["blocks.0.attn.qkv"].adapter.lora_B.add_(1)  # type: ignore[union-attr]
    ema.update(model, step=100)
    for name, t in ema.module.state_dict().items():
        assert torch.equal(t, before[name]) != name.endswith("blocks.0.attn.qkv.adapter.lora_B")


def test_compiled_models_hold_and_release() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    x = FAMILIES["vit"].images(1)
    with amp(), torch.no_grad():
        expected = copy.deepcopy(model)(x)
        hold_frozen(compiled, torch.bfloat16)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert release_frozen(compiled) and held_in(model) is None


def test_full_training_holds_nothing() -> None:
    model = timm.create_model("test_vit")
    assert not hold_frozen(model, torch.bfloat16).weights and held_in(model) is None


def test_shared_and_brought_weights_and_special_layers_stay() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight * 3)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.tied, self.free = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.scaled, self.tied.weight = Scaled(4, 4), self.table.weight

    model = Odd().requires_grad_(False)
    assert set(hold_frozen(model, torch.float16).weights) == {"tied.bias", "free.weight", "free.bias"}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16 or torch\.float16, .* got torch\.float64"):
        hold_frozen(adapted(), torch.float64)
    model = adapted()
    hold_frozen(model, torch.bfloat16)
    with pytest.raises(ValueError, match=r"held in torch\.bfloat16 already\. Call release_frozen"):
        hold_frozen(model, torch.float16)


def test_release_keeps_what_was_put_into_held_weights(tmp_path: Path) -> None:
    model, other = adapted(), adapted()
    before = state(model)
    hold_frozen(model, torch.bfloat16)
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").mul_(2)
    release_frozen(model)
    after = state(model)
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], 2 * before["blocks.0.mlp.fc1.weight"].bfloat16().float())
    assert all(torch.equal(after[name], t) for name, t in before.items() if name != "blocks.0.mlp.fc1.weight")
    with torch.no_grad():
        other.get_parameter("blocks.0.attn.qkv.bias").add_(1)
    hold_frozen(model, torch.bfloat16)
    model.float().load_state_dict(other.state_dict())
    nolora_vision.eject(model)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items() if "blocks" in name)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_turns_autocast_on_itself(backend: str) -> None:
    model, x = adapted(), FAMILIES["vit"].images(1)
    hold_frozen(model, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        assert not torch.is_autocast_enabled("cpu")
        with amp():
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
            assert torch.is_autocast_enabled("cpu")
    torch._dynamo.reset()
