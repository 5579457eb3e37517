"""Every method on small models: the same layers, unchanged outputs, gradients everywhere, a step that learns, bf16."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nolora_vision
from nolora_vision import AdapterConfig, ConfigError, InjectionError
from nolora_vision.methods import METHODS, MethodError, apply_method, merge_for_inference
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.applied import APPLIED, applied_to
from nolora_vision.surgery.frozen_dtype import HELD
from nolora_vision.surgery.sites import BYPASS_FLAG
from tests.families import EVA, FAMILIES, SMALL, SWIN, Family

CONFIG = AdapterConfig(rank=4)
OPTIONS: dict[str, dict[str, Any]] = {"fourierft": {"n_frequency": 50}, "c3a": {"block_size": 16}}
MODELS = {
    "vit": Family("vit_tiny_patch16_224", 32, {**SMALL, "img_size": 32}),
    "swin": Family("swin_tiny_patch4_window7_224", 64, SWIN),
    "beit": FAMILIES["beit"],
    "eva02": Family("eva02_tiny_patch14_224", 56, EVA, bypasses=True),
}
ADDING = [name for name, method in METHODS.items() if method.group in ("peft", "own module")]
# Fresh, these compute W x in another way, so to fp32 rounding: PiSSA as (W - B A) x + B A x, BOFT by the product of W
# and an identity matrix. The largest difference measured on these models was 6e-8.
ROUNDING = {"pissa": 1e-6, "boft": 1e-6}


@pytest.fixture(params=MODELS)
def small(request: pytest.FixtureRequest) -> Family:
    return MODELS[request.param]


def options_for(family: Family, method: str) -> dict[str, Any]:
    """EVA's gated MLP has 170 features in its middle."""
    return {"block_size": 2} if method in ("c3a", "oft", "boft") and "eva" in family.name else OPTIONS.get(method, {})


def fresh(family: Family, method: str, config: AdapterConfig = CONFIG) -> nn.Module:
    torch.manual_seed(1)
    return apply_method(family.build(), method, config, options=options_for(family, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_model_computes_what_it_did_and_then_learns(method: str, small: Family) -> None:
    torch.manual_seed(1)
    bare, x, labels = small.build().eval(), small.images(4), torch.arange(4)
    before = bare(x)
    model = apply_method(bare, method, CONFIG, options=options_for(small, method))
    assert model is bare and not model.training
    tolerance = ROUNDING.get(method, 1e-5 if small.bypasses else 0.0)  # a cured block adds the bias after the product
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    optimizer = torch.optim.AdamW(nolora_vision.param_groups(model, lr=1e-3, head_lr=1e-3, weight_decay=1e-4))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(3):
        losses.append(F.cross_entropy(model.train()(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        optimizer.step()
    assert losses[2] < losses[0]
    still = [name for name, p in model.named_parameters() if name in trained and torch.equal(p, trained[name])]
    assert not still, "after three steps a parameter that trains must have moved, 0 at first or not"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", ADDING)
def test_peers_sit_on_the_layers_that_inject_adapts(method: str, small: Family) -> None:
    model, ours = fresh(small, method), nolora_vision.inject(small.build(), CONFIG)
    applied = applied_to(model)
    assert applied is not None
    if method == "adaptformer":
        assert set(applied.layers) == {path.rpartition(".")[0] for path in adapted_layers(ours) if "mlp" in path}
    else:
        assert list(applied.layers) == list(adapted_layers(ours))
    called = set()
    for path in applied.layers:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    model(small.images())
    assert called == set(applied.layers)
    owners = {name for name in applied.parameters for path in applied.layers if name.startswith(path + ".")}
    assert owners == applied.parameters
    for name, parameter in model.named_parameters():
        head = any(parameter is p for p in nolora_vision.head_parameters(model))
        assert parameter.requires_grad == (name in applied.parameters or head), name
    flags = [getattr(m, BYPASS_FLAG) for m in model.modules() if hasattr(m, BYPASS_FLAG)]
    assert all(flag is (method != "adaptformer") for flag in flags) or not small.bypasses


@pytest.mark.parametrize("method", METHODS)
def test_held_weights_change_nothing_under_autocast(method: str) -> None:
    """bf16 autocast with the frozen weights in bf16 or in fp32: the same logits and gradients, bit for bit."""
    model = fresh(MODELS["vit"], method)
    with torch.no_grad():
        for parameter in nolora_vision.adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    held, x = copy.deepcopy(model), MODELS["vit"].images(4)
    nolora_vision.hold_frozen(held, torch.bfloat16)
    assert hasattr(held, HELD) == (method != "full"), "else nothing was compared"
    results = []
    for each in (model, held):
        with torch.autocast("cpu", torch.bfloat16):
            logits = each.train()(x)
        logits.float().square().sum().backward()
        results.append((logits, {name: p.grad for name, p in each.named_parameters() if p.requires_grad}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adaptformer_in_models_of_other_types(dtype: torch.dtype) -> None:
    """Its bottlenecks stay in fp32."""
    model, x = MODELS["vit"].build().to(dtype).eval(), MODELS["vit"].images().to(dtype)
    before = model(x)
    apply_method(model, "adaptformer", CONFIG)
    assert torch.equal(model(x), before)
    for name, parameter in model.named_parameters():
        if name.endswith("adaptformer.up.bias"):
            nn.init.ones_(parameter)
    assert model(x).dtype == dtype and not torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_models_copy_and_pickle(method: str) -> None:
    model, x = fresh(MODELS["vit"], method).eval(), MODELS["vit"].images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and applied_to(twin) == applied_to(model)


@pytest.mark.parametrize("method", METHODS)
def test_merging_keeps_the_outputs(method: str) -> None:
    model, x = fresh(MODELS["beit"], method).eval(), MODELS["beit"].images(2)
    with torch.no_grad():
        for parameter in nolora_vision.adapter_parameters(model):
            parameter.add_(0.02 * torch.randn_like(parameter))
    before, keys = model(x), set(MODELS["beit"].build().state_dict())
    assert merge_for_inference(model) is model
    # fp32: the update is summed into W before the product. OFT merges by a solve where its forward cuts a series off.
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    if METHODS[method].group == "peft":
        assert set(model.state_dict()) == keys
        with pytest.raises(MethodError, match="No method was applied"):
            merge_for_inference(model)


def test_everything_works_on_the_meta_device() -> None:
    for method in METHODS:
        with torch.device("meta"):
            model = apply_method(MODELS["vit"].bare(), method, CONFIG, options=OPTIONS.get(method))
        real = fresh(MODELS["vit"], method)
        shapes = {name: p.shape for name, p in real.named_parameters() if p.requires_grad}
        assert {name: p.shape for name, p in model.named_parameters() if p.requires_grad} == shapes


def test_lora_of_peft_and_ours_are_one() -> None:
    """Given the same A and B."""
    ours, peft = fresh(MODELS["swin"], "lora"), fresh(MODELS["swin"], "peft-lora")
    with torch.no_grad():
        for path, layer in adapted_layers(ours).items():
            layer.adapter.lora_B.normal_(std=0.05)
            twin: Any = peft.get_submodule(path)
            twin.lora_A["default"].weight.copy_(layer.adapter.lora_A)
            twin.lora_B["default"].weight.copy_(layer.adapter.lora_B)
    x = MODELS["swin"].images(2)
    torch.testing.assert_close(ours.eval()(x), peft.eval()(x), rtol=1e-5, atol=1e-5)  # fp32, another order of sums


def test_settings_of_the_adapter_reach_peft() -> None:
    config = AdapterConfig(
        rank=4, alpha=8, dropout=0.1, rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 1}, targets="all", layers=(1,)
    )
    model = fresh(MODELS["vit"], "dora", config)
    scales = {
        path.removeprefix("blocks.1."): model.get_submodule(path).scaling["default"] for path in applied_paths(model)
    }
    assert scales == {"attn.qkv": 2, "attn.proj": 2, "mlp.fc1": 4, "mlp.fc2": 0.25}
    assert model.get_submodule("blocks.1.mlp.fc1").r["default"] == 2
    assert model.get_submodule("blocks.1.mlp.fc1").lora_dropout["default"].p == 0.1
    assert fresh(MODELS["vit"], "rslora", config).get_submodule("blocks.1.attn.qkv").scaling["default"] == 4


def applied_paths(model: nn.Module) -> tuple[str, ...]:
    applied = applied_to(model)
    assert applied is not None
    return applied.layers


def test_init_gain_scales_a_and_changes_no_output() -> None:
    x = torch.randn(2, 3, 32, 32)
    for method in ("lora", "nolora", "aurora"):
        torch.manual_seed(0)
        usual = apply_method(MODELS["vit"].build(), method, CONFIG).eval()
        torch.manual_seed(0)
        model = apply_method(MODELS["vit"].build(), method, CONFIG, options={"init_gain": 4}).eval()
        ours, theirs = adapted_layers(model), adapted_layers(usual)
        for path, layer in ours.items():
            for one, other in zip(layer.adapter.branches(), theirs[path].adapter.branches(), strict=True):
                assert torch.equal(one.lora_A, 4 * other.lora_A)
        assert torch.equal(model(x), usual(x))


def test_rates_and_decay() -> None:
    for method in ("lora", "nolora", "aurora", "peft-lora", "dora", "lora-plus"):
        model = apply_method(MODELS["vit"].build(), method, CONFIG, options={"lr_ratio": 4})
        groups = {g["name"]: g for g in nolora_vision.param_groups(model, lr=1e-3, head_lr=1e-2, weight_decay=0.1)}
        assert groups["adapter_b"]["lr"] == 4e-3 and groups["adapter"]["lr"] == 1e-3 and groups["head"]["lr"] == 1e-2
        assert all(p.shape[1] == 4 for p in groups["adapter_b"]["params"])
        assert (
            sum(p.numel() for g in groups.values() for p in g["params"])
            == nolora_vision.summary(model).trainable_params
        )
    plus = nolora_vision.param_groups(fresh(MODELS["vit"], "lora-plus"), lr=1e-3)
    assert {g["name"]: g["lr"] for g in plus}["adapter_b"] == 16e-3
    assert "adapter_b" not in {g["name"] for g in nolora_vision.param_groups(fresh(MODELS["vit"], "lora"), lr=1)}
    options = {"rank_space_lr_ratio": 3, "lr_ratio": 2}
    model = apply_method(MODELS["vit"].build(), "nolora", CONFIG, options=options)
    groups = {g["name"]: g for g in nolora_vision.param_groups(model, lr=1e-3, weight_decay=0.1)}
    rates = {name: (g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items() if "adapter" in name}
    layers = len(adapted_layers(model))
    assert rates == {
        "adapter": (1e-3, 0.1, layers),
        "adapter_b": (2e-3, 0.1, layers),
        "adapter_rank_space": (3e-3, 0.1, layers),
        "adapter_rank_space_no_decay": (3e-3, 0.0, 3 * layers),
    }
    for method, spared in (("dora", "magnitude"), ("vera", "lambda_d"), ("ia3", "ia3_l"), ("adaptformer", "bias")):
        model = fresh(MODELS["vit"], method)
        named = {p: name for name, p in model.named_parameters()}
        groups = {g["name"]: g["params"] for g in nolora_vision.param_groups(model, lr=1, weight_decay=0.1)}
        assert groups["adapter_no_decay"] and all(spared in named[p] for p in groups["adapter_no_decay"])
        assert not any(spared in named[p] for p in groups.get("adapter", ()))


def test_bitfit_and_layernorm_train_what_they_say() -> None:
    names = {name for name, p in fresh(FAMILIES["beit"], "bitfit").named_parameters() if p.requires_grad}
    assert {"blocks.0.attn.q_bias", "blocks.0.mlp.fc1.bias", "blocks.0.norm1.bias", "head.weight"} <= names
    assert not any("relative_position" in name or name.endswith("norm1.weight") for name in names)
    names = {name for name, p in fresh(MODELS["swin"], "layernorm").named_parameters() if p.requires_grad}
    assert all("norm" in name or "head" in name for name in names) and "layers.0.blocks.0.norm1.weight" in names


def test_summary_counts_a_peers_adapters() -> None:
    model = fresh(MODELS["vit"], "dora")
    counts = nolora_vision.summary(model)
    assert (
        counts.adapter_params
        == counts.trainable_params - counts.head_params
        == sum(p.numel() for p in nolora_vision.adapter_parameters(model))
    )
    assert "dora on blocks.0.attn.qkv" in str(counts) and "in 6 layers" in str(counts)
    assert "linear: no adapters" in str(nolora_vision.summary(fresh(MODELS["vit"], "linear")))


class Bypassing(nn.Module):
    """Reads fc2's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.mlp["fc1"](x), self.mlp["fc2"].weight)


@pytest.mark.parametrize("method", [name for name in ADDING if name != "adaptformer"])
def test_a_bypassed_layer_is_refused_and_the_model_comes_back(method: str) -> None:
    model = Bypassing()
    model.mlp["fc1"].bias.requires_grad_(False)
    layers = list(model.modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InjectionError, match=r"1 of 2 adapters are never called by the model.*mlp\.fc2"):
        apply_method(
            model,
            method,
            AdapterConfig(rank=2, targets="mlp"),
            options={"n_frequency": 4} if method == "fourierft" else {"block_size": 4} if "oft" in method else {},
            example_input=torch.zeros(1, 8),
        )
    assert list(model.modules()) == layers and applied_to(model) is None
    assert {name: p.requires_grad for name, p in model.named_parameters()}["mlp.fc1.bias"] is False
    assert sum(p.requires_grad for p in model.parameters()) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("method", "config", "options", "message"),
    [
        (
            "dora",
            {"targets": ("q", "v")},
            {},
            r"dora cannot run on a part of a fused layer: blocks\.0\.attn\.qkv .* q, v",
        ),
        ("oft", {}, {"block_size": 48}, r"oft needs a block size that divides every layer's input: blocks\.0"),
        ("c3a", {}, {"block_size": 128}, r"c3a needs a block size that divides every layer's input: .* 64 features"),
        ("boft", {}, {"block_size": 24}, "boft needs a block size that divides"),
        ("fourierft", {}, {"n_frequency": 20_000}, r"n_frequency 20,000 exceeds blocks\.0\.attn\.qkv's 12,288 entries"),
        ("ia3", {"dropout": 0.1}, {}, "ia3 has no dropout, and the adapter config asks for 0.1"),
        ("dora", {"modulation_noise": 0.5}, {}, "dora has no v, so modulation_noise 0.5 does nothing"),
        ("adaptformer", {"modulation_noise": 0.5}, {}, "adaptformer has no v"),
        ("vera", {"rank_pattern": {"fc1": 2}}, {}, "vera is the same on every layer: it takes no rank_pattern"),
        (
            "adaptformer",
            {"targets": ("qkv",)},
            {},
            r"adaptformer sits beside MLPs, and targets=\('qkv',\) names no layer",
        ),
        ("adaptformer", {"targets": ("fc1",)}, {}, "needs both fc1 and fc2"),
        ("peft-lora", {"rank": 400}, {}, "rank 400 is larger than the layer"),
        (
            "peanut",
            {},
            {"act_fn": "nonsense"},
            r"PEFT .* does not take peanut so \(Unsupported `act_fn`",
        ),
    ],
)
def test_refusals(method: str, config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = MODELS["vit"].build()
    keys, required = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(InjectionError, match=message):
        apply_method(model, method, AdapterConfig(**config), options=options)
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == required
    assert applied_to(model) is None and not hasattr(model, "peft_config")


def test_convolutions_are_for_lora_and_dora() -> None:
    family = FAMILIES["maxvit"]
    config = AdapterConfig(rank=2, targets=("conv3_1x1",))
    for method in ("vera", "pissa", "ia3"):
        with pytest.raises(MethodError, match=f"{method} cannot run on convolutions"):
            apply_method(family.build(), method, config)
    model = apply_method(family.build(), "dora", config)
    model.train()(family.images(2)).sum().backward()
    assert all(p.grad is not None for p in nolora_vision.adapter_parameters(model))


def test_names_and_options_are_checked() -> None:
    model = MODELS["vit"].build()
    with pytest.raises(ConfigError, match=r"got 'dorra'\. Did you mean 'dora'\?"):
        apply_method(model, "dorra")
    with pytest.raises(ConfigError, match=r"'n_freq' is no option of fourierft\. Did you mean 'n_frequency'\?"):
        apply_method(model, "fourierft", options={"n_freq": 3})
    with pytest.raises(ConfigError, match=r"'x' is no option of ia3\. Options of ia3: none"):
        apply_method(model, "ia3", options={"x": 3})
    with pytest.raises(ConfigError, match="n_frequency must be whole, from 1, got 0"):
        apply_method(model, "fourierft", options={"n_frequency": 0})
    apply_method(model, "ia3")
    for method in ("lora", "full", "dora"):
        with pytest.raises(MethodError, match="applied to a bare model, and this one is adapted"):
            apply_method(model, method)


def test_without_peft_or_with_an_old_one_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import peft

    monkeypatch.delattr(peft, "PeanutConfig")
    with pytest.raises(MethodError, match=r"needs peft\.PeanutConfig, which PEFT .* lacks .* pip install 'peft>="):
        apply_method(MODELS["vit"].build(), "peanut")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MethodError, match=r"pip install 'nolora-vision\[baselines\]'"):
        apply_method(MODELS["vit"].build(), "dora")
    assert apply_method(MODELS["vit"].build(), "adaptformer")


def test_what_needs_the_weight_in_full_is_named() -> None:
    """Held all the same, DoRA's norm, HiRA's entries and BOFT's rotated weight would be other numbers."""
    x, differing = MODELS["vit"].images(4), set()
    for method in METHODS:
        model = fresh(MODELS["vit"], method).eval()
        with torch.no_grad():
            for parameter in nolora_vision.adapter_parameters(model):
                parameter.add_(0.2 * torch.randn_like(parameter))
        held, applied = copy.deepcopy(model), applied_to(model)
        assert applied is not None
        setattr(held, APPLIED, replace(applied, unheld=()))
        nolora_vision.hold_frozen(held, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if not torch.equal(held(x), model(x)):
                differing.add(method)
        assert bool(applied.unheld) == (method in differing), method
    assert differing == {"dora", "hira", "boft"}


def test_a_layer_of_peft_that_fails_is_named_as_the_cause() -> None:
    """OFT takes any input of four dimensions for a convolution's."""
    with pytest.raises(MethodError, match="oft cannot run on this model: PEFT's layer fails") as caught:
        apply_method(FAMILIES["maxvit"].build(), "oft", CONFIG)
    assert "divisible by window" not in str(caught.value)
