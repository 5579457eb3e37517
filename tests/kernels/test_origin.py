"""x made again in the backward pass: where it is, that it is the same, and where it has to be kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nolora_vision
from nolora_vision.benchmark.memory import model_tensors, saved_bytes
from nolora_vision.kernels import Frozen, autograd, eager, low_rank_delta, use_backend
from nolora_vision.kernels.eager import operands_of, with_operands
from nolora_vision.kernels.origin import origin_of
from tests.operands import make_branch

WEIGHT, BIAS = torch.linspace(0.5, 1.5, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["eager", "autograd", "custom_op"])
@pytest.mark.parametrize("plain", [False, True])
def test_after_the_backward_pass_nothing_is_kept_though_the_loss_lives(backend: str, plain: bool) -> None:
    """A loop's last loss does until the next one is there: the next forward pass must not add to what it kept."""
    u, layer = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True), Frozen(torch.ones(6, 6).double(), None)
    branch = make_branch("identity", "none", d=6) if plain else make_branch("swish", "gate", d=6)
    before = u * 2
    memory = StorageWeakRef(before.untyped_storage())
    x = F.gelu(before)
    del before
    with use_backend(backend):
        loss = low_rank_delta(x, layer, [branch]).sum()
    del x
    assert not memory.expired()
    loss.backward()
    assert memory.expired() and loss.grad_fn is not None


def norm(u: Tensor) -> Tensor:
    return F.layer_norm(u, (6,), WEIGHT, BIAS)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda u: F.layer_norm(u, (6,), WEIGHT, BIAS, eps=0.1),
    "gelu": F.gelu,
    "gelu tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "swiglu": lambda u: F.silu(u) * u.sin(),
    "flattened": lambda u: F.gelu(u).reshape(-1, 6),
    "windows": lambda u: F.layer_norm(u, (6,), WEIGHT, BIAS).roll((-1, 1), (0, -2)).transpose(0, -2).contiguous(),
    "channels last": lambda u: F.silu(u.permute(2, 0, 1)).permute(1, -1, 0),
    "swin": lambda u: norm(u).roll(1, 0).view(3, 2, 2, 6).permute(0, -2, 1, 3).reshape(-1, 6).view(6, 2, 6),
    "rolled as one row": lambda u: norm(u).roll(1),
    "channels moved": lambda u: norm(u).transpose(-1, 0).permute(1, 2, 0).reshape(-1, 6),
    "channels split": lambda u: norm(u).reshape(-1, 3).view(3, 4, 6),
}
WHOLE_ROWS = {"layer norm", "windows", "swin"}
"""Of these, where dA is had without x."""
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda u: u,
    "sum": lambda u: u + 1,
    "times a number": lambda u: u * 2.0,
    "relu": F.relu,
    "padded": lambda u: F.pad(F.gelu(u)[..., 1:], (1, 0), value=3.0),
    "dropped": lambda u: F.dropout(F.gelu(u), 0.5),
    "written into": lambda u: F.gelu(u).add_(1),
    "no affine": lambda u: F.layer_norm(u, (6,)),
}


def operands() -> tuple[Tensor, Frozen, eager.LowRank]:
    torch.manual_seed(0)
    branch = make_branch("swish", "gate", d=6, e=5, r=2)
    return (
        torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True),
        Frozen(torch.randn(5, 6).double(), None),
        branch,
    )


@pytest.mark.parametrize("how", MADE)
def test_x_is_made_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u, layer, branch = operands()
    x = MADE[how](u)
    origin = origin_of(x)
    assert origin is not None and (origin.rows_of_norm is not None) == (how in WHOLE_ROWS)
    assert all(t.data_ptr() != x.data_ptr() for t in origin.tensors)
    torch.testing.assert_close(origin.x(origin.tensors, x.dtype), x)
    with torch.no_grad():
        torch.testing.assert_close(origin.x(origin.tensors, x.dtype), x)

    def gradients() -> list[Tensor]:
        y = autograd.low_rank_delta(MADE[how](u), layer, [branch])
        return list(torch.autograd.grad(y.square().sum(), [u, *operands_of(branch)]))

    found_again = gradients()
    monkeypatch.setattr(autograd, "origin_of", lambda x: None)
    for found, wanted in zip(found_again, gradients(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", KEPT)
def test_x_is_kept_where_nobody_keeps_what_it_is_made_of(how: str) -> None:
    u, _, _ = operands()
    assert origin_of(KEPT[how](u)) is None


def test_a_norm_over_several_axes_and_one_in_bf16_are_made_again_as_they_are() -> None:
    """dA of u takes the last axis alone for normalised; in bf16 the difference gᵀ u − gᵀ μ would lose its digits."""
    u = torch.randn(3, 4, 6, requires_grad=True)
    assert origin_of(F.layer_norm(u, (6,), WEIGHT.float(), BIAS.float())).rows_of_norm is not None
    mixed = F.layer_norm(u.bfloat16(), (6,), WEIGHT.float(), BIAS.float())  # under autocast: μ and ρ are fp32
    assert origin_of(mixed).rows_of_norm is not None
    both = F.layer_norm(u, (4, 6), torch.ones(4, 6), torch.zeros(4, 6))
    low = F.layer_norm(u.bfloat16(), (6,), WEIGHT.bfloat16(), BIAS.bfloat16())
    for x in (both, low):
        origin = origin_of(x)
        assert origin is not None and origin.rows_of_norm is None
        with torch.no_grad():
            # a bit of bf16 of the terms w x̂ and b, as torch rounds in between and here only the sum is rounded
            tolerance = {"rtol": 2**-7, "atol": 2**-8} if x is low else {}
            torch.testing.assert_close(origin.x(origin.tensors, x.dtype), x, **tolerance)


@pytest.mark.parametrize("how", ["layer norm", "gelu", "swiglu", "windows"])
def test_second_derivatives(how: str) -> None:
    u, layer, branch = operands()

    def run(u: Tensor, *tensors: Tensor) -> Tensor:
        x = MADE[how](u)
        assert origin_of(x) is not None
        return autograd.low_rank_delta(x, layer, [with_operands(branch, iter(tensors))])

    small = u.detach()[:2, :1].requires_grad_()
    assert torch.autograd.gradgradcheck(run, (small, *operands_of(branch)))


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_a_large_mean_does_not_spoil_the_gradient(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """gᵀ u − gᵀ μ cancels where μ is large against the deviations; the norm's own output then loses digits as well."""
    torch.manual_seed(0)
    made, weight = make_branch("tanh", "vector", d=64, e=8, r=4), torch.randn(8, 64)
    u = torch.randn(50, 64) + mean

    def down_gradient(dtype: torch.dtype, *, kept: bool) -> Tensor:
        monkeypatch.setattr(autograd, "origin_of", (lambda x: None) if kept else origin_of)
        branch = with_operands(made, iter(t.detach().to(dtype).requires_grad_() for t in operands_of(made)))
        x = F.layer_norm(u.to(dtype).requires_grad_(), (64,), torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype))
        assert kept or origin_of(x).rows_of_norm is not None
        y = autograd.low_rank_delta(x, Frozen(weight.to(dtype), None), [branch])
        return torch.autograd.grad(y.sum(), branch.down)[0].double()

    exact = down_gradient(torch.float64, kept=True)
    error, error_if_kept = (
        (down_gradient(torch.float32, kept=kept) - exact).norm() / exact.norm() for kept in (False, True)
    )
    assert error < 2 * error_if_kept + 1e-6


def test_hooks_find_x_itself() -> None:
    """Offloading and checkpointing pack what is saved; unpacking it twice would be slow there, or an error."""
    u, layer, branch = operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        x = F.gelu(u)
        assert origin_of(x) is None
        y = autograd.low_rank_delta(x, layer, [branch])
    y.sum().backward()


def test_a_norm_inside_a_checkpoint_and_the_layer_outside() -> None:
    u, layer, branch = operands()
    x = checkpoint(lambda t: F.layer_norm(t, (6,), WEIGHT, BIAS), u, use_reentrant=False)
    autograd.low_rank_delta(x, layer, [branch]).sum().backward()
    found = u.grad.clone()
    u.grad = None
    eager.low_rank_delta(F.layer_norm(u, (6,), WEIGHT, BIAS), layer, [branch]).sum().backward()
    torch.testing.assert_close(found, u.grad)


def test_what_was_made_of_it_may_be_changed_but_not_the_source() -> None:
    u, layer, branch = operands()
    h = u * 1
    x = F.gelu(h)
    y = autograd.low_rank_delta(x, layer, [branch])
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def blocks_keep(model: nn.Module, images: Tensor, backend: str) -> int:
    with use_backend(backend):
        return saved_bytes(model(images), besides=model_tensors(model))


MOST = {"swinv2": 1.08, "levit": 1.06}
"""Bytes over the frozen model's. The rest is h, and x where the residual stream itself enters a layer; others: 1.03."""


def test_every_family_keeps_little_more_than_the_frozen_model(family) -> None:
    torch.manual_seed(0)
    model = family.build().eval().requires_grad_(False)
    images = family.images(2).requires_grad_()  # so that gradients flow to the first block
    frozen = blocks_keep(model, images, "eager")
    kept = {}
    for rank, *nonlinear in ((1, "identity", "none"), (2, "identity", "none"), (1, "swish", "gate")):
        nolora_vision.inject(model, rank=rank, nonlinearity=nonlinear[0], modulation=nonlinear[1])
        for backend in ("autograd", "eager"):
            kept[rank, nonlinear[0], backend] = blocks_keep(model, images, backend) - frozen
        nolora_vision.eject(model)
    linear, nonlinear = kept[1, "identity", "autograd"], kept[1, "swish", "autograd"]
    most = next((most for name, most in MOST.items() if family.name.startswith(name)), 1.03)
    assert linear <= (most - 1) * frozen and linear < 0.6 * kept[1, "identity", "eager"]
    h = kept[2, "identity", "autograd"] - linear
    assert linear < nonlinear <= linear + 3 * h  # z and two tanh
    assert nonlinear < 0.6 * kept[1, "swish", "eager"]


@pytest.mark.parametrize("amp", [False, True])
def test_an_input_that_was_written_into_is_kept(amp: bool) -> None:
    """Without autograd, so that its node tells nothing of it; under autocast the layer sees a cast of it."""
    torch.manual_seed(0)
    layer = nolora_vision.NoLoRALinear(6, 5, config=nolora_vision.AdapterConfig(rank=2))
    nn.init.normal_(layer.adapter.lora_B)
    h = torch.randn(4, 6, requires_grad=True)

    def gradient(backend: str) -> Tensor:
        layer.zero_grad()
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            a = F.gelu(h)
            with torch.no_grad():
                a[:2] = 0
            layer(a).float().sum().backward()
        return layer.adapter.lora_A.grad.clone()

    wanted = gradient("eager")
    tolerance = (4e-2 if amp else 2e-5) * float(wanted.abs().max())  # as in test_autograd.py
    torch.testing.assert_close(gradient("autograd"), wanted, atol=tolerance, rtol=0)


def test_an_input_whose_graph_was_freed_is_kept() -> None:
    layer = nolora_vision.NoLoRALinear(6, 5, config=nolora_vision.AdapterConfig(rank=2))
    a = F.gelu(torch.randn(4, 6, requires_grad=True))
    a.sum().backward()
    with use_backend("autograd"):
        y = layer(a)
    torch.autograd.grad(y.sum(), layer.adapter.lora_A)
