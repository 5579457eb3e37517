"""The one node against the definition: values, gradients, what it saves, and what may happen around it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import nolora_vision
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import Frozen, LowRank, autograd, eager, use_backend
from nolora_vision.kernels.eager import operands_of, with_operands
from tests.operands import make_branch

ROWS = ((1, 3), (4, 8))
"""Where an update of 6 features goes in an output of 9."""


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def branches_of(nonlinearity: str, modulation: str) -> list[LowRank]:
    """One on the whole output, one on some rows of it."""
    first = make_branch(nonlinearity, modulation, d=5, e=9, r=2)
    return [first, make_branch(nonlinearity, modulation, d=5, e=6, r=3)._replace(rows=ROWS, scale=1.0)]


def rebuilt(branches: list[LowRank], operands: tuple[Tensor, ...]) -> list[LowRank]:
    source = iter(operands)
    return [with_operands(branch, source) for branch in branches]


Run = Callable[[Tensor, "Tensor | Frozen", list[LowRank]], Tensor]


def gradients(run: Run, x: Tensor, base: Any, branches: list[LowRank], dy: Tensor) -> tuple[Tensor, list[Any]]:
    inputs = [x, *([base] if isinstance(base, Tensor) else []), *(t for b in branches for t in operands_of(b))]
    y = run(x, base, branches)
    return y, list(torch.autograd.grad(y, inputs, dy, allow_unused=True))


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_gradcheck(nonlinearity: str, modulation: str) -> None:
    torch.manual_seed(0)
    branches, x = branches_of(nonlinearity, modulation), leaf(2, 3, 5)
    operands = tuple(t for branch in branches for t in operands_of(branch))
    frozen = Frozen(torch.randn(9, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64))

    def on_a_base(x: Tensor, base: Tensor, *operands: Tensor) -> Tensor:
        return autograd.low_rank_delta(x, base, rebuilt(branches, operands))

    def on_a_layer(x: Tensor, *operands: Tensor) -> Tensor:
        return autograd.low_rank_delta(x, frozen, rebuilt(branches, operands))

    assert torch.autograd.gradcheck(on_a_base, (x, leaf(2, 3, 9), *operands))
    assert torch.autograd.gradcheck(on_a_layer, (x, *operands))


@pytest.mark.parametrize("modulation", ["none", "vector", "gate"])
@pytest.mark.parametrize("nonlinearity", ["identity", "swish", "residual_tanh", "rational", "gelu"])
def test_second_derivatives_go_through_the_definition(nonlinearity: str, modulation: str) -> None:
    torch.manual_seed(0)
    branch, x = make_branch(nonlinearity, modulation, d=3, e=4, r=2), leaf(2, 3)
    frozen = Frozen(torch.randn(4, 3, dtype=torch.float64), None)

    def run(x: Tensor, *operands: Tensor) -> Tensor:
        return autograd.low_rank_delta(x, frozen, rebuilt([branch], operands))

    assert torch.autograd.gradgradcheck(run, (x, *operands_of(branch)))


@pytest.mark.parametrize("modulation", ["none", "gate"])
@pytest.mark.parametrize("given", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives_after_autocast_are_the_definitions(modulation: str, given: bool, inside: bool) -> None:
    """The backward pass comes outside autocast, as it should, or inside."""
    torch.manual_seed(0)
    made = make_branch("identity" if modulation == "none" else "swish", modulation, d=6, e=8, r=2)
    operands = [t.detach().float() for t in operands_of(made)]
    x, weight, base = torch.randn(3, 5, 6), torch.randn(8, 6), torch.randn(3, 5, 8).bfloat16()

    def run(delta: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *operands)]
        with torch.autocast("cpu", torch.bfloat16):
            y = delta(leaves[0], base if given else Frozen(weight, None), rebuilt([made], leaves[1:]))
            loss = y.float().square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    for got, wanted in zip(run(autograd.low_rank_delta), run(eager.low_rank_delta), strict=True):
        assert got.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(
            got, wanted, atol=TOLERANCE[torch.bfloat16] * float(wanted.detach().abs().max()), rtol=0
        )


# The same products in the same types, by another library or the other way round, dx in one buffer, rows gathered after
# the product; of the largest entry:
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7,), (1, 5), (4, 197), (2, 3, 3, 11), (0, 5)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["layer", "base"])
def test_it_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, given: bool) -> None:
    torch.manual_seed(0)
    d, e = 12, 9
    branches = []
    for rows, width in ((None, e), (ROWS, 6)):
        made = make_branch("swish", "gate", d=d, e=width, r=3)._replace(rows=rows)
        branches.append(with_operands(made, iter(t.detach().float().requires_grad_() for t in operands_of(made))))
    x = leaf(*shape, d, dtype=torch.float32).detach().to(dtype).requires_grad_()
    base: Any = Frozen(torch.randn(e, d).to(dtype), torch.randn(e).to(dtype))
    if given:
        base = torch.randn(*shape, e).to(dtype).requires_grad_()
    dy = torch.randn(*shape, e).to(dtype)
    expected, wanted = gradients(eager.low_rank_delta, x, base, branches, dy)
    got, found = gradients(autograd.low_rank_delta, x, base, branches, dy)
    assert got.dtype == expected.dtype == dtype and torch.equal(got, expected)
    for g, w in zip(found, wanted, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        scale = w.double().abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(g, w, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_every_formula_gives_the_bits_of_its_definition(nonlinearity: str, modulation: str, dtype: torch.dtype) -> None:
    """The node has formulas of its own (`derivatives.py`), which are to be changed with those of `eager.py`."""
    torch.manual_seed(0)
    branches, x = branches_of(nonlinearity, modulation), torch.randn(3, 17, 5).to(dtype)
    branches = [with_operands(b, iter(t.detach().float() for t in operands_of(b))) for b in branches]
    layer = Frozen(torch.randn(9, 5).to(dtype), None)
    expected = eager.low_rank_delta(x, layer, branches)
    assert torch.equal(autograd.low_rank_delta(x, layer, branches), expected)
    assert not torch.equal(expected, eager.low_rank_delta(x, layer, [b._replace(scale=0.0) for b in branches]))


def test_v_for_each_sample() -> None:
    torch.manual_seed(0)
    branch = make_branch("tanh", "gate", d=5, e=6, r=3)._replace(v=leaf(4, 1, 3))
    x, base, dy = leaf(4, 7, 5), leaf(4, 7, 6), torch.randn(4, 7, 6, dtype=torch.float64)
    expected, wanted = gradients(eager.low_rank_delta, x, base, [branch], dy)
    got, found = gradients(autograd.low_rank_delta, x, base, [branch], dy)
    assert torch.equal(got, expected)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w)
    none = branch._replace(v=leaf(0, 1, 3))
    autograd.low_rank_delta(x[:0], base[:0], [none]).sum().backward()
    assert none.v.grad.shape == (0, 1, 3)
    with pytest.raises(ValueError, match=r"v must have shape \(R,\) or \(B, 1, R\)"):
        autograd.low_rank_delta(x[:3], base[:3], [branch])


@pytest.mark.parametrize("frozen", ["x", "adapter", "v"])
def test_gradients_that_are_not_asked_for_are_not_made(frozen: str) -> None:
    branch, x = make_branch("swish", "gate", d=5, e=6, r=3), leaf(2, 5)
    layer = Frozen(torch.randn(6, 5, dtype=torch.float64), None)
    if frozen == "x":
        x = x.detach()
    elif frozen == "v":
        branch = branch._replace(v=branch.v.detach())
    else:
        branch = with_operands(branch, iter(t.detach() for t in operands_of(branch)))
    products: list[tuple[int, ...]] = []
    y = autograd.low_rank_delta(x, layer, [branch])

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                products.append(tuple(args[-1].shape))
            return function(*args, **(kwargs or {}))

    with Counting():
        y.sum().backward()
    wanted = {"x": 4, "v": 6, "adapter": 3}  # dz; two into dx; dA, dB and dG; those with G itself come on top
    assert len([p for p in products if p != (3, 3)]) == wanted[frozen], products
    assert (x.grad is None) == (frozen == "x")


def test_an_operand_of_two_branches_gets_its_gradient_once_in_a_second_derivative_too() -> None:
    x, layer = leaf(4, 5), Frozen(torch.randn(6, 5, dtype=torch.float64), None)
    one, other = (make_branch(name, "none", d=5, e=6, r=3) for name in ("tanh", "swish"))
    y = autograd.low_rank_delta(x, layer, [one, other._replace(down=one.down)]).square().sum()
    (plain,) = torch.autograd.grad(y, one.down, retain_graph=True)
    (followed,) = torch.autograd.grad(y, one.down, create_graph=True)
    torch.testing.assert_close(followed, plain)


def adapted() -> nn.Module:
    model = timm.create_model("test_vit", img_size=32, num_classes=3, depth=1)
    nolora_vision.inject(model, rank=2)
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def test_selective_checkpointing_may_put_the_frozen_product_aside() -> None:
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, products)
    model, x = adapted(), torch.randn(2, 3, 32, 32)
    for nonlinearity in ("swish", "identity"):
        if nonlinearity == "identity":
            nolora_vision.inject(nolora_vision.eject(model), rank=2, nonlinearity="identity", modulation="none")
        wanted = torch.autograd.grad(model(x).sum(), (kept := list(nolora_vision.adapter_parameters(model))))
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        for one, other in zip(torch.autograd.grad(y.sum(), kept), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_trace_has_the_definition_and_can_be_saved(tmp_path: Path) -> None:
    model, x = adapted().eval(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's own checks, and that tracing is old
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, tmp_path / "traced.pt")
        again = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(again(x[:1]), model(x[:1]))


def saved_bytes(run: Callable[[], Tensor], *, besides: tuple[Tensor, ...]) -> int:
    """Bytes that a forward keeps for the backward, parameters and inputs apart."""
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in besides}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def test_it_saves_the_input_and_its_rank_space_only() -> None:
    """h, z, and the tanh in f and in the gate; of a linear update h alone."""
    m, d, e, r = 197, 64, 192, 8
    layer = nolora_vision.NoLoRALinear(d, e, config=nolora_vision.AdapterConfig(rank=r))
    nn.init.normal_(layer.adapter.lora_B)
    x = torch.randn(m, d, requires_grad=True)
    known = (x, *layer.parameters())
    with use_backend("autograd"):
        assert saved_bytes(lambda: layer(x), besides=known) == 4 * 4 * m * r
    with use_backend("eager"):
        assert saved_bytes(lambda: layer(x), besides=known) > 2 * 4 * 4 * m * r
    linear = nolora_vision.AdapterConfig(rank=r, nonlinearity="identity", modulation="none")
    layer = nolora_vision.NoLoRALinear(d, e, config=linear)
    with use_backend("autograd"):
        assert saved_bytes(lambda: layer(x), besides=(x, *layer.parameters())) == 4 * m * r


def test_blocks_may_write_into_the_output() -> None:
    """timm does `qkv += bias` in BEiT, EVA and Swin V2."""
    layer = nolora_vision.NoLoRALinear(10, 14)
    nn.init.normal_(layer.adapter.lora_B)
    x = torch.randn(2, 5, 10, requires_grad=True)
    found = []
    for in_place in (False, True):
        x.grad = None
        layer.zero_grad()
        with use_backend("autograd"):
            y = layer(x)
            y = y.add_(1) if in_place else y + 1
        y.square().sum().backward()
        found.append([x.grad.clone(), *(p.grad.clone() for p in layer.adapter.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_functions_of_torch_func_run() -> None:
    branch, x = make_branch("swish", "gate", d=5, e=6, r=3), torch.randn(4, 5, dtype=torch.float64)
    layer = Frozen(torch.randn(6, 5, dtype=torch.float64), None)

    def loss(x: Tensor) -> Tensor:
        return autograd.low_rank_delta(x, layer, [branch]).square().sum()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss))(x.detach().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, which make_dual calls
@pytest.mark.parametrize("case", ["identity none", "swish gate"])
def test_forward_mode_derivatives_are_those_of_the_definition(case: str) -> None:
    branch, x = make_branch(*case.split(), d=5, e=6, r=3)._replace(scale=1.0), torch.randn(4, 5, dtype=torch.float64)
    layer, tangent, found = Frozen(torch.randn(6, 5, dtype=torch.float64), None), torch.randn_like(x), []
    for compute in (autograd.low_rank_delta, eager.low_rank_delta):
        with forward_ad.dual_level():
            y = compute(forward_ad.make_dual(x, tangent), layer, [branch])
            found.append(forward_ad.unpack_dual(y).tangent)
    assert found[0] is not None and torch.equal(*found)


def whole_model(backend: str, model: nn.Module, x: Tensor, autocast: bool, checkpointing: bool) -> list[Tensor]:
    model.zero_grad()
    model.set_grad_checkpointing(checkpointing)
    with use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().mean().backward()
    return [y.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_family_trains_alike(family, autocast: bool, checkpointing: bool) -> None:
    model = nolora_vision.inject(family.build(), rank=2, targets="all").eval()
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    x = family.images(2)
    wanted = whole_model("eager", model, x, autocast, checkpointing)
    found = whole_model("autograd", model, x, autocast, checkpointing)
    # torch's own kernels for a frozen layer differ with and without autograd: LeViT's last bit does
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-2 if autocast else 1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = []
        for backend in ("eager", "autograd"):
            with use_backend(backend):
                outputs.append(model(x))
    assert torch.equal(*outputs)
    largest = max(w.norm().item() for w in wanted[1:])
    for g, w in zip(found[1:], wanted[1:], strict=True):
        # bf16 rounds the sums of all blocks, grouped otherwise, by 0.4 % each; what is a thousandth of the largest
        # gradient is mostly such rounding
        size = max(w.norm().item(), 1e-3 * largest)
        assert (g - w).norm().item() / size < (0.1 if autocast else 2e-4)


def test_a_compiled_model_makes_one_graph() -> None:
    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=7), rank=2).eval()
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 3, 160, 160)
    torch._dynamo.reset()
    with torch.no_grad(), use_backend("autograd"):
        expected = model(x)
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), expected, atol=1e-5)


def made_by_the_node(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return any("_Update" in type(f).__name__ for f in (y.grad_fn, y.grad_fn.next_functions[0][0]))


def test_use_backend() -> None:
    with pytest.raises(ValueError, match="Did you mean 'autograd'"), use_backend("autograt"):
        pass
    x, branch = torch.randn(2, 5), make_branch("tanh", "none", d=5, e=6, r=3)
    branch = with_operands(branch, iter(t.float() for t in operands_of(branch)))
    with pytest.raises(KeyError), use_backend("eager"):
        assert not made_by_the_node(nolora_vision.low_rank_delta(x, torch.zeros(2, 6), [branch]))
        raise KeyError
    assert made_by_the_node(nolora_vision.low_rank_delta(x, torch.zeros(2, 6), [branch]))
