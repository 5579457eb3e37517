"""NoLoRALinear and NoLoRAConv2d on their own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision import AdapterConfig, LowRankAdapter, NoLoRAConv2d, NoLoRALinear
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import BACKENDS, use_backend
from nolora_vision.surgery.low_rank_adapter import make_adapter


def randomise(layer: nn.Module) -> None:
    for parameter in layer.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)


ROWS = {"q": ((0, 2), (6, 8)), "v": ((4, 6), (10, 13))}
"""Two heads, interleaved, and a last feature that no part reaches."""


def split(share_down: bool) -> nn.Module:
    config = AdapterConfig(rank=3, alpha=6, nonlinearity="tanh", modulation="vector", share_down=share_down)
    return make_adapter(10, 14, config, parts=ROWS)


def plain(layer: NoLoRALinear | NoLoRAConv2d) -> nn.Module:
    shape = layer.weight.shape
    twin = (
        nn.Linear(shape[1], shape[0], dtype=layer.weight.dtype)
        if isinstance(layer, nn.Linear)
        else nn.Conv2d(shape[1], shape[0], 1, layer.stride, dtype=layer.weight.dtype)
    )
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if ".adapter" not in f".{k}"})
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_fresh_adapters_change_no_bit(nonlinearity: str, modulation: str, training: bool, dtype: torch.dtype) -> None:
    config = AdapterConfig(rank=3, nonlinearity=nonlinearity, modulation=modulation)  # type: ignore[arg-type]
    for layer, x in (
        (NoLoRALinear(10, 14, config=config, dtype=dtype), torch.randn(2, 7, 10, dtype=dtype)),
        (NoLoRAConv2d(10, 14, config=config, dtype=dtype), torch.randn(2, 10, 5, 5, dtype=dtype)),
    ):
        layer.train(training)
        assert torch.equal(layer(x), plain(layer)(x))
        assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}
        assert not layer.weight.requires_grad and all(p.requires_grad for p in layer.adapter.parameters())


@pytest.mark.parametrize("shape", [(10,), (0, 10), (1, 10), (7, 197, 10), (2, 3, 4, 10)])
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    config = AdapterConfig(rank=3, alpha=6, nonlinearity="residual_tanh", modulation="gate")
    layer = NoLoRALinear(10, 14, config=config, dtype=torch.float64)
    randomise(layer)
    a, x = layer.adapter.double(), torch.randn(shape, dtype=torch.float64)
    h = x @ a.lora_A.T
    z = (h + a.mix * (torch.tanh(a.slope * h) - h)) * a.v * (1 + torch.tanh(h @ a.gate_weight.T + a.gate_bias))
    expected = x @ layer.weight.T + layer.bias + 2 * z @ a.lora_B.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("share_down", [False, True])
def test_parts_equal_the_formula_on_their_rows(share_down: bool) -> None:
    layer = NoLoRALinear.adopt(nn.Linear(10, 14, dtype=torch.float64), split(share_down).double())
    randomise(layer)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    expected = x @ layer.weight.T + layer.bias
    features = [[i for start, stop in rows for i in range(start, stop)] for rows in ROWS.values()]
    if share_down:
        features = [sorted(features[0] + features[1])]
    for branch, own in zip(layer.adapter.branches(), features, strict=True):
        expected[..., own] += 2 * (torch.tanh(x @ branch.lora_A.T) * branch.v) @ branch.lora_B.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_the_linear_layer_at_every_pixel(stride: int, memory_format: torch.memory_format) -> None:
    conv = NoLoRAConv2d(10, 14, stride, config=AdapterConfig(rank=3))
    linear = NoLoRALinear(10, 14, config=AdapterConfig(rank=3))
    randomise(conv)
    linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in conv.state_dict().items()})
    x = torch.randn(2, 10, 5, 7).to(memory_format=memory_format)
    y = conv(x)
    assert y.is_contiguous(memory_format=memory_format)
    expected = linear(x[..., ::stride, ::stride].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)  # fp32, another order of sums
    torch.testing.assert_close(conv(x[0]), y[0], atol=1e-5, rtol=1e-5)


AWKWARD = {
    "no image": torch.empty(0, 10, 5, 7),
    "one pixel": torch.ones(2, 10, 1, 1),
    "one pixel, channels last": torch.ones(2, 10, 1, 1).to(memory_format=torch.channels_last),
    "one image, channels last": torch.ones(1, 10, 4, 4).to(memory_format=torch.channels_last),
    "transposed": torch.ones(2, 10, 4, 6).transpose(2, 3),
    "cropped": torch.ones(2, 10, 5, 6)[..., 1:, 2:4],
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("x", AWKWARD.values(), ids=AWKWARD.keys())
def test_convolution_lies_in_memory_as_the_frozen_one(x: Tensor, stride: int) -> None:
    conv = NoLoRAConv2d(10, 14, stride, config=AdapterConfig(rank=3))
    randomise(conv)
    y, base = conv(x), plain(conv)(x)
    assert y.shape == base.shape and y.stride() == base.stride()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_reach_the_adapter_only(kind: str) -> None:
    layer = NoLoRALinear(10, 14) if kind == "linear" else NoLoRAConv2d(10, 14)
    randomise(layer)
    x = torch.randn(2, 7, 10) if kind == "linear" else torch.randn(2, 10, 5, 5)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in layer.adapter.parameters())


IN_PLACE = {
    "linear": (lambda: NoLoRALinear(10, 14), (3, 10), (14,)),
    "conv": (lambda: NoLoRAConv2d(10, 14), (3, 10, 4, 4), (14, 1, 1)),
    "strided conv": (lambda: NoLoRAConv2d(10, 14, 2), (3, 10, 4, 4), (14, 1, 1)),
    "parts": (lambda: NoLoRALinear.adopt(nn.Linear(10, 14).requires_grad_(False), split(False)), (3, 10), (14,)),
}


@pytest.mark.parametrize(("build", "shape", "per_feature"), IN_PLACE.values(), ids=IN_PLACE.keys())
def test_in_place_addition_on_the_output_keeps_the_gradients(
    build: Callable[[], nn.Module], shape: tuple[int, ...], per_feature: tuple[int, ...]
) -> None:
    layer, x, bias = build(), torch.randn(shape), torch.randn(per_feature, requires_grad=True)
    randomise(layer)

    def gradients(in_place: bool) -> list[Tensor]:
        layer.zero_grad()
        bias.grad = None
        y = layer(x)
        if in_place:
            y += bias
        else:
            y = y + bias
        y.square().sum().backward()
        return [*(p.grad.clone() for p in layer.adapter.parameters()), bias.grad.clone()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_vmap_over_adapters_of_a_convolution(layout: torch.memory_format) -> None:
    """The base output is then the same for all, and y is not."""
    layer, x = NoLoRAConv2d(10, 6), torch.randn(2, 10, 3, 4).contiguous(memory_format=layout)
    randomise(layer)
    several = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters() if "adapter" in name}

    def output(adapter: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, adapter, (x,))

    found = torch.func.vmap(output)(several)
    for i, y in enumerate(found):
        expected = output({name: p[i] for name, p in several.items()})
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("conv", [False, True])
def test_autocast_keeps_the_rank_space_in_fp32(conv: bool) -> None:
    layer = NoLoRAConv2d(64, 32) if conv else NoLoRALinear(64, 32)
    randomise(layer)
    x = torch.randn(4, 64, 3, 3) if conv else torch.randn(4, 64)
    seen = []
    layer.adapter.register_forward_hook(lambda _m, _a, y: seen.append(y.dtype))

    def gradients(enabled: bool) -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        y.float().square().mean().backward()
        return [p.grad.clone() for p in layer.adapter.parameters()]

    half, full = gradients(True), gradients(False)
    assert seen == [torch.bfloat16, torch.float32] and {g.dtype for g in half} == {torch.float32}
    for a, b in zip(half, full, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()  # bf16: 8 bits, through two products and one squaring


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_with_fp32_adapter(dtype: torch.dtype) -> None:
    layer = NoLoRALinear(64, 32, dtype=dtype)
    randomise(layer)
    x = torch.randn(5, 64, dtype=dtype)
    y = layer(x)
    exact = layer.double()(x.double())
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 2e-2 * exact.norm()  # bf16 has 8 bits, fp16 11


def test_dropout_acts_on_x_in_training_only() -> None:
    layer = NoLoRALinear(10, 14, config=AdapterConfig(rank=3, dropout=0.5))
    randomise(layer)
    x = torch.randn(4, 10)
    base = F.linear(x, layer.weight, layer.bias)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    layer.eval()
    torch.testing.assert_close(y, layer.adapter(dropped, base))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("nonlinearity", [name for name in NONLINEARITIES if name != "aurora"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 100))
def test_zero_goes_to_the_bias_whatever_was_learnt(nonlinearity: str, seed: int, size: float) -> None:
    config = AdapterConfig(rank=3, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    layer = NoLoRALinear(10, 14, config=config)
    torch.manual_seed(seed)
    for parameter in layer.adapter.parameters():
        nn.init.normal_(parameter, std=size)
    assert torch.equal(layer(torch.zeros(2, 10)), layer.bias.expand(2, 14))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("triton")])  # a GPU's
def test_the_frozen_output_is_not_modified(backend: str) -> None:
    layer = NoLoRALinear(10, 14)
    randomise(layer)
    x, base = torch.randn(3, 10), torch.randn(3, 14)
    before = base.clone()
    with use_backend(backend):
        layer.adapter(x, base).data.zero_()
    assert torch.equal(base, before)


def test_a_frozen_vector_of_ones_is_no_modulation() -> None:
    config = AdapterConfig(rank=3, nonlinearity="tanh", modulation="vector")
    layer = NoLoRALinear(10, 14, config=config)
    other = NoLoRALinear(10, 14, config=replace(config, modulation="none"))
    nn.init.normal_(layer.adapter.lora_B)
    layer.adapter.v.requires_grad_(False)
    other.load_state_dict({k: t for k, t in layer.state_dict().items() if k != "adapter.v"})
    x = torch.randn(4, 10)
    for adapted in (layer, other):
        adapted(x).square().sum().backward()
    assert layer.adapter.v.grad is None
    for name, parameter in other.adapter.named_parameters():
        assert torch.equal(parameter.grad, layer.adapter.get_parameter(name).grad)


def test_a_disabled_layer_is_the_frozen_one() -> None:
    for layer, x in ((NoLoRALinear(10, 14), torch.randn(2, 10)), (NoLoRAConv2d(10, 14), torch.randn(2, 10, 3, 3))):
        randomise(layer)
        layer.adapter_enabled = False
        assert torch.equal(layer(x), plain(layer)(x))


def test_scale_by_alpha_and_by_root_of_rank() -> None:
    for values, scale in (({"alpha": 2}, 0.5), ({"alpha": 2, "rank_stabilized": True}, 1.0), ({}, 1.0)):
        assert make_adapter(8, 8, AdapterConfig(rank=4, **values)).scale == scale  # type: ignore[union-attr]


def test_adopt_takes_exact_classes_only_and_release_gives_the_same_object() -> None:
    class Special(nn.Linear):
        pass

    adapter = make_adapter(4, 6, AdapterConfig(rank=2))
    with pytest.raises(TypeError, match="NoLoRALinear adapts Linear only, got Special"):
        NoLoRALinear.adopt(Special(4, 6), adapter)
    conv = make_adapter(4, 6, AdapterConfig(rank=2))
    for other in (nn.Linear(4, 6), nn.LazyConv2d(6, 1)):
        with pytest.raises(TypeError, match=f"NoLoRAConv2d adapts Conv2d only, got {type(other).__name__}"):
            NoLoRAConv2d.adopt(other, conv)
    layer = nn.Linear(4, 6)
    keys = list(layer.state_dict())
    adapted = NoLoRALinear.adopt(layer, adapter)
    assert adapted is layer and type(layer) is NoLoRALinear
    assert adapted.release() is layer and type(layer) is nn.Linear and list(layer.state_dict()) == keys
    assert list(layer.children()) == []


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_folding_keeps_the_function(nonlinearity: str, modulation: str) -> None:
    config = AdapterConfig(rank=3, alpha=5, nonlinearity=nonlinearity, modulation=modulation)  # type: ignore[arg-type]
    layer = NoLoRALinear(10, 14, config=config, dtype=torch.float64).double()
    randomise(layer)
    x = torch.randn(7, 10, dtype=torch.float64)
    before = layer(x)
    assert isinstance(layer.adapter, LowRankAdapter)
    layer.adapter.fold_()
    assert layer.adapter.scale == 1 and (modulation == "gate" or not hasattr(layer.adapter, "v"))
    torch.testing.assert_close(layer(x), before)


def test_print_says_what_it_is() -> None:
    text = str(NoLoRALinear(4, 6, config=AdapterConfig(rank=2, alpha=4, dropout=0.1)))
    assert "rank=2, nonlinearity=swish, modulation=gate, scale=2, dropout=0.1" in text
