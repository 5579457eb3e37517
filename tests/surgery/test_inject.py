"""inject, eject, disabled, fold on real timm models."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import nolora_vision
from nolora_vision import AdapterConfig, InjectionError
from nolora_vision.surgery import reach
from nolora_vision.surgery.adapter import adapted_layers
from tests.families import COATNET, FAMILIES, Family

SMALL = {name: FAMILIES[name] for name in ("vit", "swinv2", "eva02", "levit", "pvt_v2")}
SMALL["coatnet"] = Family("coatnet_nano_rw_224", 64, COATNET)


def images(model: nn.Module, n: int = 1) -> torch.Tensor:
    return torch.randn(n, *model.pretrained_cfg["input_size"])


def randomise(model: nn.Module) -> None:
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_fresh_adapters_change_no_bit_and_eject_restores(name: str) -> None:
    model = SMALL[name].build().eval()
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    x = SMALL[name].images()
    with torch.no_grad():
        plain = model(x)
        assert nolora_vision.inject(model) is model
        fresh = model(x)
        assert (fresh - plain).abs().max() <= 1e-6  # the bypass cure may round differently
        with nolora_vision.disabled(model):
            assert torch.equal(model(x), fresh)
        randomise(model)
        assert not torch.equal(model(x), fresh)
    assert [key for key in model.state_dict() if ".adapter." not in key] == keys
    nolora_vision.eject(model)
    assert dict(model.named_modules()) == modules
    with torch.no_grad():  # as above: convolutions may take another path with gradients
        assert torch.equal(model(x), plain)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_every_adapter_gets_a_gradient(name: str) -> None:
    model = nolora_vision.inject(SMALL[name].build())
    randomise(model)
    model.eval()
    model(SMALL[name].images()).square().sum().backward()
    for path, layer in adapted_layers(model).items():
        assert layer.adapter.get_parameter("lora_A").grad.abs().sum() > 0, path
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".adapter." not in n}
    assert trained and all(n.startswith("head") for n in trained)


def test_a_bypassed_layer_is_reported_and_the_model_untouched() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.head = nn.Linear(24, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x, self.qkv.weight))

    model = Bypass()
    with pytest.raises(InjectionError, match=r"1 of 1 adapters are never called by the model.*qkv"):
        nolora_vision.inject(model, example_input=torch.randn(2, 8))
    assert type(model.qkv) is nn.Linear and all(p.requires_grad for p in model.parameters())


class CallsAndFails(nn.Module):
    """Calls its layer on images that it then can't take, and not on those that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 64:
            self.layer(x[..., :1])
            raise ValueError("64 px are wanted")
        return x


def test_a_run_that_failed_half_way_proves_nothing() -> None:
    model = CallsAndFails()
    with pytest.raises(InjectionError, match="1 of 1 adapters are never called"):
        reach.prove_reach(model, {"layer": model.layer})


def test_the_proof_leaves_nothing_that_was_computed_in_evaluation() -> None:
    """LeViT keeps its attention biases in evaluation; those of the proof may be of other weights when that comes."""
    model = nolora_vision.inject(FAMILIES["levit"].build().train(), rank=2)
    assert [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")] == [{}] * 5
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "coat_tiny"])  # CoaT's shared MLPs have two names each
def test_the_proof_runs_on_meta_and_leaves_the_same_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_forward_for_real", None)
    model = timm.create_model(name)
    before = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    nolora_vision.inject(model)
    for key, t in model.state_dict(keep_vars=True).items():
        if ".adapter." not in key:
            assert id(t) == before[key][0] and torch.equal(t, before[key][1]), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "qkw"}, r"no layer matches 'qkw'\. Did you mean 'qkv'"),
        ({"rank": 65}, r"rank 65 is larger than the layer"),
        ({"layers": [6]}, r"this model has 6 blocks, numbered 0 to 5"),
        ({"targets": ("head",)}, r"head belongs to the classifier"),
        ({"targets": ("attn",)}, r"is a Attention, which cannot carry an adapter"),
    ],
)
def test_errors_name_what_is_wrong(settings: dict, message: str) -> None:
    model = timm.create_model("test_vit")
    with pytest.raises(InjectionError, match=message):
        nolora_vision.inject(model, **settings)
    assert not adapted_layers(model)


def test_other_refusals() -> None:
    with pytest.raises(InjectionError, match="Roles to choose from"):
        nolora_vision.inject(timm.create_model("resnet10t"))
    with pytest.raises(InjectionError, match=r"is a torch\.nn\.MultiheadAttention"):
        nolora_vision.inject(nn.TransformerEncoderLayer(16, 2))
    with pytest.raises(nolora_vision.ConfigError, match="Did you mean 'rank'"):
        nolora_vision.inject(timm.create_model("test_vit"), ranks=3)
    model = nolora_vision.inject(timm.create_model("test_vit"))
    with pytest.raises(InjectionError, match="already has adapters"):
        nolora_vision.inject(model)


@pytest.mark.parametrize("share_down", [False, True])
def test_subset_of_a_fused_qkv(share_down: bool) -> None:
    model = timm.create_model("test_vit").eval()
    nolora_vision.inject(model, targets=("q", "v"), layers=[0], share_down=share_down, modulation="none")
    (layer,) = adapted_layers(model).values()
    x = torch.randn(2, 5, 64)
    before = layer(x)
    randomise(model)
    moved = (layer(x) - before).abs().amax((0, 1)) > 0
    assert moved[:64].all() and not moved[64:128].any() and moved[128:].all()
    assert sum(b.lora_A.shape[0] for b in layer.adapter.branches()) == (8 if share_down else 16)


@pytest.mark.parametrize("modulation", ["none", "vector", "gate"])
@pytest.mark.parametrize("nonlinearity", ["identity", "swish", "aurora"])
def test_fold_keeps_the_function(nonlinearity: str, modulation: str) -> None:
    config = AdapterConfig(nonlinearity=nonlinearity, modulation=modulation, alpha=3)
    model = nolora_vision.inject(timm.create_model("test_vit").eval(), config)
    randomise(model)
    x = images(model)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(nolora_vision.fold(model)(x), before)
        if nonlinearity == "identity" and modulation != "gate":
            torch.testing.assert_close(nolora_vision.fold(model, merge=True)(x), before, atol=1e-4, rtol=1e-4)
            assert not adapted_layers(model)
        else:
            with pytest.raises(InjectionError, match="depends on its input, so no matrix equals it"):
                nolora_vision.fold(model, merge=True)


WRAPPERS = [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compiled", "data-parallel", "both"])
def test_wrapped_models_are_summed_disabled_folded_and_ejected(wrap) -> None:
    bare = timm.create_model("test_vit", num_classes=7).eval()
    x = images(bare)
    plain, required = bare(x), [p.requires_grad for p in bare.parameters()]
    randomise(nolora_vision.inject(bare))
    nn.init.zeros_(bare.head.weight), nn.init.zeros_(bare.head.bias)
    wrapped, table = wrap(bare), str(nolora_vision.summary(bare))
    assert str(nolora_vision.summary(wrapped)) == table and "qkv" in table
    with nolora_vision.disabled(wrapped) as same:
        assert same is wrapped and torch.equal(bare(x), torch.zeros_like(plain))
        assert not any(layer.adapter_enabled for layer in adapted_layers(bare).values())
    assert nolora_vision.fold(wrapped) is wrapped
    assert {branch.scale for layer in adapted_layers(bare).values() for branch in layer.adapter.branches()} == {1.0}
    assert nolora_vision.eject(wrapped) is wrapped and not adapted_layers(bare)
    assert [p.requires_grad for p in bare.parameters()] == required


def test_a_merge_is_refused_where_it_would_reach_further() -> None:
    model = timm.create_model("test_vit", num_classes=7).eval()
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    second.fc1.weight = first.fc1.weight
    nolora_vision.inject(model, nonlinearity="identity", modulation="none", targets="fc1")
    randomise(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InjectionError, match=r"0\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc1\.weight are one parameter"):
        nolora_vision.fold(model, merge=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    second.fc1.weight = nn.Parameter(second.fc1.weight.clone())
    x = images(model)
    expected = model(x)
    torch.testing.assert_close(nolora_vision.fold(model, merge=True)(x), expected, atol=1e-4, rtol=1e-4)


def test_timm_life_goes_on(tmp_path) -> None:
    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=7).eval())
    randomise(model)
    x = images(model)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    nolora_vision.save_adapter(model, tmp_path / "a")
    other = timm.create_model("test_vit", num_classes=7).eval()
    base = {k: v for k, v in model.state_dict().items() if ".adapter." not in k and not k.startswith("head")}
    other.load_state_dict(base, strict=False)
    assert torch.equal(nolora_vision.load_adapter(other, tmp_path / "a")(x), expected)
    model.set_grad_checkpointing()
    assert torch.equal(model.train()(x), expected)


@pytest.mark.parametrize("modulation", ["none", "vector"])
def test_linear_case_equals_peft(modulation: str) -> None:
    peft = pytest.importorskip("peft")
    plain = timm.create_model("test_vit", num_classes=7)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1", "fc2"])
    )
    ours = nolora_vision.inject(plain, rank=4, alpha=8, nonlinearity="identity", modulation=modulation)
    pairs = []
    for path, layer in adapted_layers(ours).items():
        twin = theirs.get_submodule(f"base_model.model.{path}")
        nn.init.normal_(layer.adapter.lora_B, std=0.1)
        if modulation == "vector":
            layer.adapter.v.requires_grad_(False)  # 1, and stays
        for own, other in (("lora_A", twin.lora_A.default), ("lora_B", twin.lora_B.default)):
            other.weight.data.copy_(layer.adapter.get_parameter(own))
            pairs.append((layer.adapter.get_parameter(own), other.weight))
    x = images(ours, 2)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)  # fp32, another order of sums
    y.square().sum().backward()
    z.square().sum().backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, atol=1e-3, rtol=1e-3)
