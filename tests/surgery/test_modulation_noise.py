"""Noise on v: drawn for each image, in training only, and there without a trace in anything else."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.func import functional_call

import nolora_vision
from nolora_vision import AdapterConfig, LowRankAdapter, NoLoRAConv2d, NoLoRALinear
from nolora_vision.adapters.mixing import mixed
from nolora_vision.config import MODULATIONS
from nolora_vision.kernels import use_backend
from nolora_vision.surgery import modulation_noise
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.low_rank_adapter import make_adapter
from nolora_vision.surgery.modulation_noise import batch_of, rows_per_image
from nolora_vision.training.backbone import training_mode
from tests.families import FAMILIES

SIGMA = 0.5
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7}


def randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".adapter." in f".{name}" or name.startswith(("lora_", "v", "gate")):
            nn.init.normal_(parameter, mean=float(name.rpartition(".")[2] == "v"), std=0.1)
    return model


def small_vit(sigma: float = SIGMA, depth: int = 6, **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", **SMALL, depth=depth)
    return randomise(nolora_vision.inject(model, modulation_noise=sigma, **options))


def seeded(function, *args) -> Tensor:
    torch.manual_seed(5)
    return function(*args)


def hooks_of(model: nn.Module) -> int:
    tables = (model._forward_pre_hooks, model._forward_hooks)
    flags = (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called)
    return sum(map(len, (*tables, *flags)))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[LowRankAdapter, Tensor]]]:
    """The v that each update was computed with, in the order of computation."""
    found: list[tuple[LowRankAdapter, Tensor]] = []
    original = LowRankAdapter.operands

    def operands(self, x=None):
        branch = original(self, x)
        found.append((self, branch.v))
        return branch

    with monkeypatch.context() as patch:
        patch.setattr(LowRankAdapter, "operands", operands)
        yield found


# ------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_v_is_scattered_by_sigma_around_itself(modulation: str) -> None:
    adapter = LowRankAdapter(6, 5, AdapterConfig(rank=3, modulation=modulation, modulation_noise=SIGMA))  # type: ignore[arg-type]
    randomise(adapter)
    x = torch.randn(4000, 2, 6)
    v = adapter.operands(x).v
    assert v is not None and v.shape == (4000, 1, 3) and v.dtype == torch.float32
    ratio = (v if modulation == "none" else v / adapter.v).detach()
    draws = ratio.numel()
    assert ratio.mean().item() == pytest.approx(1, abs=4 * SIGMA / draws**0.5)
    assert ratio.std().item() == pytest.approx(SIGMA, rel=4 / (2 * draws) ** 0.5)
    across_ranks = torch.corrcoef(ratio[:, 0].t()) - torch.eye(3)
    assert across_ranks.abs().max() < 4 / 4000**0.5
    adapter.eval()
    assert adapter.operands(x).v is (None if modulation == "none" else adapter.v)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (4, 6), (4, 3, 6), (2, 3, 4, 6)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = randomise(NoLoRALinear(6, 5, config=AdapterConfig(rank=3, modulation_noise=SIGMA)))
    x = torch.randn(*shape)
    y = seeded(layer, x)
    with use_backend("eager"):
        assert torch.equal(seeded(layer, x), y) and y.shape == (*shape[:-1], 5)
    layer.eval()
    assert torch.equal(layer(x), y) == (y.numel() == 0)


def test_a_convolution_draws_for_each_image() -> None:
    layer = randomise(NoLoRAConv2d(6, 5, config=AdapterConfig(rank=3, modulation_noise=SIGMA)))
    x = torch.randn(1, 6, 4, 4).expand(2, -1, -1, -1)
    first, second = layer(x)
    assert not torch.allclose(first, second)
    same = torch.ones(1, 6, 4, 4)
    pixels = layer(same)[0].flatten(1)
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))  # alike in all pixels of an image


def test_branches_of_a_fused_layer_draw_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"q": ((0, 4),), "v": ((8, 12),)}
    adapter = make_adapter(6, 12, AdapterConfig(rank=3, modulation="vector", modulation_noise=SIGMA), parts=rows)
    with recorded(monkeypatch) as found:
        adapter(torch.randn(2, 3, 6), torch.zeros(2, 3, 12))
    assert len(found) == 2 and not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("nonlinearity", ["identity", "swish", "tanh", "aurora"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_node_is_the_definition(modulation: str, nonlinearity: str) -> None:
    config = AdapterConfig(rank=3, nonlinearity=nonlinearity, modulation=modulation, modulation_noise=SIGMA)  # type: ignore[arg-type]
    layer = randomise(NoLoRALinear(6, 5, config=config).double())
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    found = {}
    for backend in ("eager", "autograd", "custom_op"):
        with use_backend(backend):
            y = seeded(layer, x)
            trained = [p for p in layer.parameters() if p.requires_grad]
            found[backend] = (y, *torch.autograd.grad(y.sin().sum(), [x, *trained]))
    for backend in ("autograd", "custom_op"):
        assert torch.equal(found[backend][0], found["eager"][0])
        for gradient, wanted in zip(found[backend], found["eager"], strict=True):
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", ["eager", "autograd"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_gradients_through_fixed_noise(modulation: str, backend: str) -> None:
    config = AdapterConfig(rank=2, nonlinearity="swish", modulation=modulation, modulation_noise=SIGMA)  # type: ignore[arg-type]
    adapter = randomise(LowRankAdapter(3, 4, config).double())
    names = [name for name, _ in adapter.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]

    def function(x: Tensor, base: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)
        return functional_call(adapter, dict(zip(names, parameters, strict=True)), (x, base))

    x, base = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    with use_backend(backend):
        assert torch.autograd.gradcheck(function, (x, base, *values))


# -------------------------------------------------------------------------------------------------- images of a model


def test_noise_belongs_to_images_in_every_family(family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise for the first image, its logits are those of evaluation, and only its: rows are told apart."""
    model, x = randomise(nolora_vision.inject(family.build(), modulation_noise=SIGMA)), family.images(3)
    model.requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    training_mode(model)  # with frozen BatchNorms, which would mix the images
    original = torch.randn

    def quiet_first(images: int, *shape: int, **options) -> Tensor:
        noise = original(images, *shape, **options)
        assert images == 3
        return torch.cat([torch.zeros_like(noise[:1]), noise[1:]])

    monkeypatch.setattr(modulation_noise.torch, "randn", quiet_first)
    noisy = model(x)
    monkeypatch.undo()
    plain = model.eval()(x)
    torch.testing.assert_close(noisy[0], plain[0])
    apart = (noisy - plain).abs().amax(1)
    assert apart[1:].min() > max(1e-6, 20 * apart[0])


@pytest.mark.parametrize("name", ["vit", "swinv2"])
def test_tokens_and_windows_of_an_image_share_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model = randomise(nolora_vision.inject(family.build(), modulation_noise=SIGMA, targets=("q", "v", "mlp")))
    model.train()
    with recorded(monkeypatch) as found:
        model(family.images(3))
    rows = {len(v) // 3 for _, v in found}
    assert rows == ({1} if name == "vit" else {1, 4, 16})
    factors = []
    for adapter, v in found:
        by_image = (v / adapter.v).detach().view(3, len(v) // 3, -1)
        assert (by_image == by_image[:, :1]).all()
        factors += [*by_image[:, 0].unbind()]
    assert len({tuple(factor.tolist()) for factor in factors}) == len(factors) == 3 * len(found)


def test_copies_in_a_batch_differ() -> None:
    model, x = small_vit().train(), torch.randn(1, 3, 32, 32)
    first, second = model(torch.cat([x, x]))
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(seeded(model, x), seeded(model, x)) and not torch.equal(model(x), model(x))


def test_rows_without_a_known_batch_draw_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit().train()
    layer = next(iter(adapted_layers(model).values()))
    with recorded(monkeypatch) as found:
        layer(torch.randn(6, 5, 64))
        with batch_of(3):
            layer(torch.randn(6, 5, 64))
            layer(torch.randn(7, 5, 64))  # 3 images can't have 7 rows
        layer(torch.randn(6, 5, 64))  # as so many rows were last
        with batch_of(2):
            layer(torch.randn(6, 5, 64))
            layer(torch.randn(8, 5, 64))  # an image of another size
        layer(torch.randn(6, 5, 64))
        layer(torch.randn(8, 5, 64))
        layer(torch.randn(9, 5, 64))  # never so many: 1 for each
    assert [len(v.unique(dim=0)) for _, v in found] == [6, 3, 7, 3, 2, 2, 2, 2, 9]


def test_the_batch_is_forgotten_and_not_shared_by_threads() -> None:
    model, seen = small_vit().train(), []
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        model(torch.randn(2, 5, 32, 32))
    assert rows_per_image(torch.zeros(4, 1)) is None
    model(x=torch.randn(2, 3, 32, 32))
    assert rows_per_image(torch.zeros(4, 1)) is None
    with batch_of(2):
        thread = threading.Thread(target=lambda: seen.append(rows_per_image(torch.zeros(4, 1))))
        thread.start()
        thread.join()
        assert rows_per_image(torch.zeros(4, 1)) == 2 and rows_per_image(torch.zeros(0, 1)) == 1
    assert seen == [None]


# ------------------------------------------------------------------------------------------------ nothing else changes


@pytest.mark.parametrize("name", ["vit", "swinv2"])
def test_evaluation_and_state_are_those_without(name: str) -> None:
    family = FAMILIES[name]
    plain = family.build()
    noisy, without = (
        randomise(nolora_vision.inject(copy.deepcopy(plain), modulation_noise=sigma)) for sigma in (SIGMA, 0)
    )
    without.load_state_dict(noisy.state_dict())
    assert list(noisy.state_dict()) == list(without.state_dict())
    x = family.images(2)
    assert torch.equal(noisy.eval()(x), without.eval()(x))
    before = torch.get_rng_state()
    noisy(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert hooks_of(noisy) == 4 and hooks_of(without) == 0
    assert "modulation_noise=0.5" in str(noisy) and "modulation_noise" not in str(without)


def test_fresh_adapters_change_no_bit_and_disabled_ones_neither() -> None:
    plain, x = timm.create_model("test_vit", **SMALL).train(), torch.randn(2, 3, 32, 32)
    expected = plain(x)
    model = nolora_vision.inject(copy.deepcopy(plain), modulation_noise=SIGMA).train()
    assert torch.equal(model(x), expected)
    randomise(model)
    with nolora_vision.disabled(model):
        assert torch.equal(model(x), expected)
    assert not torch.allclose(model(x), expected)
    assert hooks_of(nolora_vision.eject(model)) == 0 and torch.equal(model(x), expected)


@pytest.mark.parametrize("options", [{"modulation": "vector"}, {"modulation": "gate"}, {"alpha": 24.0}])
def test_a_folded_model_is_the_same_in_training_too(options: dict) -> None:
    model, x = small_vit(**options).train(), torch.randn(2, 3, 32, 32)
    before = seeded(model, x)
    torch.testing.assert_close(seeded(nolora_vision.fold(model), x), before)
    model.eval()
    evaluated = model(x)
    linear = small_vit(nonlinearity="identity", modulation="vector").eval()
    expected = linear(x)
    torch.testing.assert_close(nolora_vision.fold(linear, merge=True)(x), expected, atol=1e-5, rtol=1e-5)  # fp32 sums
    assert hooks_of(linear) == 0 and not torch.equal(evaluated, expected)


def test_gradient_checkpointing_draws_the_same_again(family) -> None:
    """Also with another batch, of another size, between forward and backward."""
    model, x = randomise(nolora_vision.inject(family.build(), modulation_noise=SIGMA)), family.images(3)
    training_mode(model)

    def gradients(checkpointing: bool, seed: int = 3) -> list[Tensor]:
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(seed)
        first, second = model(x).square().sum(), model(x[:2]).square().sum()
        (first + 2 * second).backward()
        return [p.grad.clone() for p in nolora_vision.adapter_parameters(model)]

    kept = gradients(False)
    for one, recomputed, other in zip(kept, gradients(True), gradients(True, seed=4), strict=True):
        torch.testing.assert_close(recomputed, one)
        assert not torch.allclose(other, one)


@pytest.mark.parametrize("name", ["vit", "swinv2"])
def test_one_graph_for_batches_of_any_size(name: str) -> None:
    family = FAMILIES[name]
    if name == "vit":  # one of its six blocks
        family = replace(family, options={"depth": 1})
    model = randomise(nolora_vision.inject(family.build(), modulation_noise=SIGMA))
    training_mode(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for n in (2, 2, 3, 4, 5):
        x = family.images(n)
        torch.testing.assert_close(seeded(compiled, x), seeded(model, x))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] and graphs[2] == graphs[3] == graphs[4], graphs


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_step_has_the_gradients_of_an_eager_one(wrapped: bool) -> None:
    model, x = small_vit(depth=1).train(), torch.randn(2, 3, 32, 32)
    outer = nn.Sequential(model, nn.Softmax(-1)) if wrapped else model  # then the hooks are in the graph
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for function in (outer, torch.compile(outer, backend=counter, fullgraph=True)):
        model.zero_grad()
        seeded(function, x).square().sum().backward()
        found.append([p.grad.clone() for p in nolora_vision.adapter_parameters(model)])
    assert counter.frame_count
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_alike(way) -> None:
    family = FAMILIES["swinv2"]
    model = randomise(nolora_vision.inject(family.build(), modulation_noise=SIGMA)).train()
    x = family.images(2)
    other = way(model)
    assert torch.equal(seeded(other, x), seeded(model, x)) and hooks_of(other) == 4
    nolora_vision.eject(other)
    assert hooks_of(other) == 0 and hooks_of(model) == 4


def test_autocast_and_held_weights() -> None:
    model, x = small_vit().train(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = seeded(model, x)
        with use_backend("eager"):
            assert torch.equal(seeded(model, x), y)
    nolora_vision.hold_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(model, x), y)


# -------------------------------------------------------------------------------------------------------- adapter files


def test_a_loaded_adapter_goes_on_training_with_it(tmp_path: Path) -> None:
    model, x = small_vit(), torch.randn(2, 3, 32, 32)
    nolora_vision.save_adapter(model, tmp_path / "a")
    torch.manual_seed(0)
    other = nolora_vision.load_adapter(timm.create_model("test_vit", **SMALL), tmp_path / "a")
    assert hooks_of(other) == 4 and torch.equal(seeded(other.train(), x), seeded(model.train(), x))


def test_the_format_of_peft_has_no_noise(tmp_path: Path) -> None:
    model, x = small_vit(nonlinearity="identity", modulation="vector").eval(), torch.randn(2, 3, 32, 32)
    nolora_vision.save_adapter(model, tmp_path / "a", format="peft")
    torch.manual_seed(0)
    other = nolora_vision.load_adapter(timm.create_model("test_vit", **SMALL), tmp_path / "a")
    torch.testing.assert_close(other.eval()(x), model(x))
    assert hooks_of(other) == 0 and torch.equal(other.train()(x), other.eval()(x))


def test_several_adapters_each_with_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["swinv2"]
    plain = family.build()
    for name, sigma in (("noisy", SIGMA), ("calm", 0.0)):
        model = randomise(nolora_vision.inject(copy.deepcopy(plain), modulation_noise=sigma))
        nolora_vision.save_adapter(model, tmp_path / name)
    model, x = copy.deepcopy(plain), family.images(3)
    without = hooks_of(model)
    for name in ("noisy", "calm"):
        nolora_vision.add_adapter(model, name, tmp_path / name)
    assert nolora_vision.active_adapter(model) == "noisy"
    of_names = hooks_of(nolora_vision.set_adapter(model, "calm"))
    assert hooks_of(nolora_vision.set_adapter(model, "noisy")) == of_names + 4
    assert hooks_of(nolora_vision.set_adapter(model, None)) == of_names
    nolora_vision.set_adapter(model, "noisy")
    model.train()
    with recorded(monkeypatch) as found, mixed(model, ["noisy", "calm", "noisy"]):
        model(x)
    noisy = [v for adapter, v in found if adapter.config.modulation_noise and adapter.training]
    assert noisy and all(len(v.unique(dim=0)) == 2 for v in noisy)
    for name in ("calm", "noisy"):
        nolora_vision.remove_adapter(model, name)
    assert hooks_of(model) == without
