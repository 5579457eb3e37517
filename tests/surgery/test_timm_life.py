"""timm's own life goes on with adapters in the model, in every family."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import nolora_vision
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.inject import injection_of


def randomise(model: nn.Module) -> nn.Module:
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def base_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if ".adapter." not in key]


def set_flags(model: nn.Module) -> nn.Module:
    """timm's own switch, by which the cure works."""
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None:
            module.qkv_bias_separate = True
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(family, dtype: torch.dtype, training: bool) -> None:
    model, x = family.build().to(dtype).train(training), family.images(2).to(dtype)
    model.requires_grad_(False)  # this alone makes torch fold products or not, which some processors round otherwise

    def output(m: nn.Module) -> Tensor:
        torch.manual_seed(1)  # dropout and stochastic depth
        with torch.no_grad():
            return m(x)

    plain, flagged = output(copy.deepcopy(model)), output(set_flags(copy.deepcopy(model)))
    fresh = output(nolora_vision.inject(model))
    assert torch.equal(fresh, flagged)
    assert bool(injection_of(model).cured) == family.bypasses
    if dtype == torch.float32:
        assert (fresh - plain).abs().max() <= 1e-6
    assert {p.dtype for p in nolora_vision.adapter_parameters(model)} == {torch.float32}


def test_adapters_learn_and_nothing_else_but_the_head(family) -> None:
    model = randomise(nolora_vision.inject(family.build())).eval()
    model(family.images()).square().sum().backward()
    for path, layer in adapted_layers(model).items():
        for name, parameter in layer.adapter.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{path}.{name}"
    other = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and ".adapter." not in n}
    assert other and all(name.startswith("head") for name in other)


def test_layer_decay_groups_stay(family) -> None:
    from timm.optim import param_groups_layer_decay

    def groups(model: nn.Module) -> list[tuple[float, list[str]]]:
        names = {id(p): n for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        found = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
        kept = [(g["lr_scale"], [names[id(p)] for p in g["params"] if ".adapter." not in names[id(p)]]) for g in found]
        return sorted((scale, names) for scale, names in kept if names)

    model = family.build()
    if not hasattr(model, "no_weight_decay"):
        model.no_weight_decay = set
    before = groups(model)
    assert groups(nolora_vision.inject(model)) == before and len(before) > 1
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scales |= {id(p): group["lr_scale"] for p in group["params"]}
    for layer in adapted_layers(model).values():
        assert {scales[id(p)] for p in layer.adapter.parameters()} == {scales[id(layer.weight)]}


def test_gradient_checkpointing_changes_nothing(family) -> None:
    model, x = randomise(nolora_vision.inject(family.build())).eval(), family.images(2)

    def gradients(checkpointing: bool) -> list[Tensor]:
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in nolora_vision.adapter_parameters(model)]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_features_and_intermediates(family) -> None:
    model, x = family.build().eval(), family.images()
    set_flags(model)

    @torch.no_grad()
    def everything() -> list[Tensor]:
        features = model.forward_features(x)
        found = [features, model.forward_head(features)] if isinstance(features, Tensor) else [*features]
        if hasattr(model, "forward_intermediates"):
            final, intermediates = model.forward_intermediates(x)
            found += [final, *intermediates]
        return found

    plain = everything()
    nolora_vision.inject(model)
    for kept, fresh in zip(plain, everything(), strict=True):
        assert torch.equal(kept, fresh)
    randomise(model)
    assert not torch.equal(everything()[0], plain[0])


def test_reset_classifier_then_eject(family) -> None:
    model, x = randomise(nolora_vision.inject(family.build())).eval(), family.images(2)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and adapted_layers(model)
    assert all(p.requires_grad for p in nolora_vision.head_parameters(model))
    nolora_vision.eject(model)
    assert model(x).shape == (2, 5) and not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def through_pickle(model: nn.Module, _folder: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "m.pt")
    return torch.load(folder / "m.pt", weights_only=False)


def through_buffer(model: nn.Module, _folder: Path) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = nolora_vision.inject(copy.deepcopy(nolora_vision.eject(copy.deepcopy(model))))
    other.load_state_dict(torch.load(stream, weights_only=True))
    return other


@pytest.mark.parametrize("way", [lambda m, _: copy.deepcopy(m), through_pickle, through_torch_save, through_buffer])
def test_copies_compute_the_same_and_can_be_ejected(family, way: Callable, tmp_path: Path) -> None:
    model, x = randomise(nolora_vision.inject(family.build())).eval(), family.images()
    other = way(model, tmp_path)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        nolora_vision.eject(other)
        assert torch.equal(model(x), expected)
    assert not adapted_layers(other) and adapted_layers(model)


def test_a_plain_model_takes_the_state_but_for_the_adapters(family) -> None:
    plain = family.build()
    model = nolora_vision.inject(copy.deepcopy(plain))
    assert base_keys(model) == list(plain.state_dict())
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and unexpected and all(".adapter." in key for key in unexpected)


def test_moves_to_another_type(family) -> None:
    model, x = randomise(nolora_vision.inject(family.build())).eval(), family.images()
    with torch.no_grad():
        single, double = model(x), copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(single.double(), double, atol=2e-3, rtol=2e-3)  # fp32 sums through every block


def test_disabled_and_eject_give_the_backbone_back(family) -> None:
    model, x = family.build().eval(), family.images()
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    flags = {path: getattr(m, "qkv_bias_separate", None) for path, m in modules.items()}
    wanted = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        plain, flagged = model(x), set_flags(copy.deepcopy(model))(x)
        randomise(nolora_vision.inject(model))
        adapted = model(x)
        with pytest.raises(KeyError), nolora_vision.disabled(model):
            with nolora_vision.disabled(model):
                assert torch.equal(model(x), flagged)
            assert torch.equal(model(x), flagged)
            raise KeyError
        assert torch.equal(model(x), adapted) and not torch.equal(adapted, flagged)
        nolora_vision.eject(model)
        assert torch.equal(model(x), plain)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[path] is module for path, module in modules.items())
    assert {type(m) for m in after.values()} & {nolora_vision.NoLoRALinear, nolora_vision.NoLoRAConv2d} == set()
    assert {path: getattr(m, "qkv_bias_separate", None) for path, m in after.items()} == flags
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == wanted


def test_optimizer_factory_and_compile() -> None:
    from timm.optim import create_optimizer_v2

    model = randomise(nolora_vision.inject(timm.create_model("test_vit", num_classes=7))).eval()
    assert len(create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.7).param_groups) > 5
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        assert torch.equal(compiled, model(x))
