"""The operator: PyTorch's own checks of it, the same numbers as the definition, one graph and no second one."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import nolora_vision
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import Frozen, LowRank, custom_op, eager, use_backend
from nolora_vision.kernels.eager import operands_of, with_operands
from tests.operands import make_branch


def branches_of(nonlinearity: str, modulation: str, dtype: torch.dtype = torch.float64) -> list[LowRank]:
    torch.manual_seed(0)
    made = [
        make_branch(nonlinearity, modulation, d=5, e=9, r=2),
        make_branch(nonlinearity, modulation, d=5, e=6, r=3)._replace(rows=((1, 3), (4, 8)), scale=1.0),
    ]
    return [with_operands(b, iter(t.detach().to(dtype).requires_grad_() for t in operands_of(b))) for b in made]


def test_a_description_gives_the_branches_back() -> None:
    for nonlinearity in NONLINEARITIES:
        for modulation in MODULATIONS:
            branches = branches_of(nonlinearity, modulation)
            operands = [t for branch in branches for t in operands_of(branch)]
            assert custom_op._branches(custom_op.describe(branches), operands) == branches


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("given", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("case", ["identity none", "swish gate", "rational vector", "aurora gate"])
def test_opcheck(case: str, given: bool) -> None:
    branches = branches_of(*case.split())
    operands = [t for branch in branches for t in operands_of(branch)]
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    base = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    layer: tuple[Any, ...] = (base, None, None) if given else (None, weight, bias)
    arguments = (x, *layer, operands, custom_op.describe(branches), "torch")
    results = torch.library.opcheck(torch.ops.nolora.update.default, arguments)
    assert results and set(results.values()) == {"SUCCESS"}
    _, h = custom_op.update(*arguments)
    wanted = [True] * (1 + len(operands))
    backward = (
        torch.randn(8, 9, dtype=torch.float64),
        x.detach(),
        h.detach(),
        None if given else weight,
        [t.detach() for t in operands],
        custom_op.describe(branches),
        "torch",
        wanted,
    )
    results = torch.library.opcheck(torch.ops.nolora.update_backward.default, backward)
    assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", ["swish gate", "rational vector", "aurora gate"])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_gradients_have_the_types_that_a_compiler_is_told(case: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    """Those of the operands; the rank space computes in fp32."""
    dtype, of_operands = types
    branches = branches_of(*case.split(), of_operands)
    operands = [t.detach() for branch in branches for t in operands_of(branch)]
    x, dy, weight = torch.randn(8, 5, dtype=dtype), torch.randn(8, 9, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    text, wanted = custom_op.describe(branches), [True] * (1 + len(operands))
    _, h = custom_op.update(x, None, weight, None, operands, text, "torch")
    real = custom_op.update_backward(dy, x, h, weight, operands, text, "torch", wanted)
    meta = [t.to("meta") for t in (dy, x, h, weight)]
    told = torch.ops.nolora.update_backward(*meta, [t.to("meta") for t in operands], text, "torch", wanted)
    assert [t.dtype for t in real] == [t.dtype for t in told] == [dtype] + [of_operands] * len(operands)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_it_equals_the_definition(nonlinearity: str, modulation: str) -> None:
    branches, layer = branches_of(nonlinearity, modulation), Frozen(torch.randn(9, 5, dtype=torch.float64), None)
    x, dy = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 9, dtype=torch.float64)
    inputs = [x, *(t for branch in branches for t in operands_of(branch))]
    found = []
    for run in (custom_op.low_rank_delta, eager.low_rank_delta):
        y = run(x, layer, branches)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert torch.equal(found[0][0], found[1][0])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


def test_autocast_casts_x_and_the_frozen_layer_only() -> None:
    branches = branches_of("swish", "gate", torch.float32)
    layer = Frozen(torch.randn(9, 5), torch.randn(9))
    x = torch.randn(2, 4, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = custom_op.low_rank_delta(x, layer, branches)
        expected = eager.low_rank_delta(x, layer, branches)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad is not None and all(
        t.grad is not None and t.grad.dtype == torch.float32 for t in operands_of(branches[0])
    )


def test_a_second_derivative_is_refused() -> None:
    branches = branches_of("swish", "gate")
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = custom_op.low_rank_delta(x, Frozen(torch.randn(9, 5, dtype=torch.float64), None), branches)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(dx.sum(), x)


def model() -> nn.Module:
    """One block, 32 px."""
    torch.manual_seed(0)
    made = timm.create_model("test_vit", num_classes=7, depth=1, img_size=32)
    nolora_vision.inject(made, rank=2)
    for parameter in nolora_vision.adapter_parameters(made):
        nn.init.normal_(parameter, std=0.05)
    return made.eval()


def gradients(made: nn.Module, run: Any, images: Tensor, backend: str) -> list[Tensor]:
    made.zero_grad()
    with use_backend(backend):
        logits = run(images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["autograd", "custom_op"])
def test_compiled_models_train_alike_and_are_compiled_once(backend: str) -> None:
    """One graph for all epochs, one more for other batch sizes, none for other adapters."""
    made = model()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor" if backend == "custom_op" else "aot_eager")
    compiled = torch.compile(made, backend=counter, fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    wanted = gradients(made, made, images, "eager")
    for got, want in zip(gradients(made, compiled, images, backend), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for parameter in nolora_vision.adapter_parameters(made):
            parameter.mul_(1.1)
    gradients(made, compiled, images, backend)
    assert counter.frame_count == 1
    for batch in (3, 4, 5):
        gradients(made, compiled, torch.randn(batch, 3, 32, 32), backend)
    assert counter.frame_count == 2
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("nolora.update" in node for node in nodes) == (backend == "custom_op")
