"""Checks of the rank space by Triton against the definition in fp64, by its interpreter; `test_triton.py` runs them.

Alone: `TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_rank_checks.py`. On a GPU the same run without it.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nolora_vision.config import NONLINEARITIES
from nolora_vision.kernels import Frozen, LowRank, autograd, low_rank_delta, torch_stages, triton_rank
from nolora_vision.kernels.eager import all_rank_spaces, operands_of, small_operands, stacked_down, with_operands
from tests.kernels.triton_checks import (
    DEVICE,
    EXACT_LIMIT,
    RANKS,
    ROUNDED_LIMITS,
    TERM_LIMIT,
    VARIANTS,
    Case,
    cases_to_run,
    error,
    joined,
    made,
    magnitudes,
)

M = (1, 7, 39, 104)
"""One block of rows, and several with a ragged last one, of 16 or 32 rows each."""


def covering_cases() -> list[Case]:
    """Every f with every variant in both types; over these M and ranks go round."""
    every = product(NONLINEARITIES, VARIANTS, (torch.float32, torch.bfloat16))
    return [
        Case(f, variant, M[(i + i // 8) % len(M)], RANKS[(3 * i + i // 10) % len(RANKS)], dtype)
        for i, (f, variant, dtype) in enumerate(every)
    ]


def by_triton(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor, list[LowRank]]:
    """What the stages compute, with the h and dz that they computed it from."""
    x, dy, branches = made(case)
    v = branches[0].v
    rows = 1 if v is None or v.ndim == 1 else len(x) // len(v)
    up = joined(branches, dy.shape[1]).to(x.dtype)
    h, z = triton_rank.rank_features(x, stacked_down(branches, x.dtype), branches, x.dtype, rows)
    dh, d_up, small = triton_rank.rank_gradients(dy, h, branches, up, rows)
    assert d_up is not None and {t.dtype for t in (h, z, dh, d_up)} == {x.dtype}
    found = {"z": z, "dh": dh, "dB": d_up}
    for k, (branch, gradients) in enumerate(zip(branches, small, strict=True)):
        for i, (t, gradient) in enumerate(zip(small_operands(branch), gradients, strict=True)):
            assert gradient is not None and (gradient.shape, gradient.dtype) == (t.shape, t.dtype)
            found[f"small {i} of branch {k}"] = gradient
    assert torch.equal(h, torch.nn.functional.linear(x, stacked_down(branches, x.dtype)))
    return found, h, torch_stages.thin(dy, up), branches


def defined(h: Tensor, dz: Tensor, dy: Tensor, branches: list[LowRank]) -> dict[str, Tensor]:
    """The same from h and dz, by the definition and autograd in fp64."""
    branches = [with_operands(b, iter([t.double().requires_grad_() for t in operands_of(b)])) for b in branches]
    h, v = h.double().requires_grad_(), branches[0].v
    z = all_rank_spaces(h if v is None or v.ndim == 1 else h.view(len(v), -1, h.shape[1]), branches).reshape(h.shape)
    small = [t for branch in branches for t in small_operands(branch)]
    d_h, *rest = torch.autograd.grad(z, [h, *small], dz.double(), allow_unused=True)
    names = [f"small {i} of branch {k}" for k, b in enumerate(branches) for i, _ in enumerate(small_operands(b))]
    return {"z": z.detach(), "dh": d_h, "dB": dy.double().t() @ z.detach()} | dict(zip(names, rest, strict=True))


@pytest.mark.parametrize("case", cases_to_run(covering_cases()), ids=str)
def test_the_rank_space_is_the_definitions(case: Case) -> None:
    found, h, dz, branches = by_triton(case)
    dy = made(case)[1]
    reference = defined(h, dz, dy, branches)
    assert found.keys() == reference.keys()
    unit = ROUNDED_LIMITS[case.dtype]
    allowed = dict.fromkeys(reference, EXACT_LIMIT) | {"z": EXACT_LIMIT + unit, "dh": EXACT_LIMIT + unit}
    sums = (dy.double().abs().t() @ reference["z"].abs()).max() / reference["dB"].abs().max()
    allowed["dB"] += 2 * unit * sums.item()  # z and the sum are rounded, and terms cancel
    start = 0
    for k, branch in enumerate(branches):
        part = slice(start, start := start + branch.down.shape[0])
        for i, terms in enumerate(magnitudes(h[:, part].double(), dz[:, part].double(), branch)):
            name = f"small {i} of branch {k}"
            allowed[name] += TERM_LIMIT * (terms.max() / reference[name].abs().max()).item()
    for name, wanted in reference.items():
        off = error(found[name], wanted)
        assert off <= allowed[name], f"{name}: the error {off:.2e} is above {allowed[name]:.2e}"


def test_the_cases_cover_every_rank_and_several_programs() -> None:
    cases = covering_cases()
    assert {case.ranks for case in cases} == set(RANKS) and {case.m for case in cases} == set(M)
    for f in NONLINEARITIES:
        assert {case.m for case in cases if case.nonlinearity == f} == set(M)


def test_a_frozen_adapter_passes_the_gradient_on_and_makes_none_of_its_own() -> None:
    x, dy, branches = made(Case("swish", "gate", 69, (8, 8), torch.bfloat16))
    up = joined(branches, dy.shape[1]).to(x.dtype)
    h, _ = triton_rank.rank_features(x, stacked_down(branches, x.dtype), branches, x.dtype, 1)
    whole, *_ = triton_rank.rank_gradients(dy, h, branches, up, 1)
    dh, d_up, small = triton_rank.rank_gradients(dy, h, branches, up, 1, trains=False)
    assert torch.equal(dh, whole) and d_up is None and small == [[None] * 4] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch(variant: str) -> None:
    x, dy, branches = made(Case("aurora", variant, 8, (8,), torch.float32))
    if "sample" in variant:
        branches = [branch._replace(v=branch.v[:0]) for branch in branches if branch.v is not None]
    h, z = triton_rank.rank_features(x[:0], branches[0].down, branches, x.dtype, 5)
    dh, d_up, (small,) = triton_rank.rank_gradients(dy[:0], h, branches, branches[0].up, 5)
    assert h.shape == z.shape == dh.shape == (0, 8)
    assert all(t is not None and not t.any() for t in (d_up, *small))
    assert [t.shape for t in small if t is not None] == [t.shape for t in small_operands(branches[0])]


def leaves(branch: LowRank) -> LowRank:
    return with_operands(branch, iter([t.detach().clone().requires_grad_() for t in operands_of(branch)]))


@pytest.mark.parametrize("nonlinearity", ["identity", "swish", "aurora"])
@pytest.mark.parametrize("variant", ["none", "gate", "sample"])
@pytest.mark.parametrize("given", [False, True], ids=["layer", "base"])
def test_the_whole_update_is_the_definition(nonlinearity: str, variant: str, given: bool) -> None:
    """Forward and every gradient, by the backend that users name."""
    x, dy, branches = made(Case(nonlinearity, variant, 56, (8, 8), torch.float32))
    branches = [leaves(branch) for branch in branches]
    x = (0.2 * x).view(8, 7, -1).requires_grad_()
    dy = dy.view(8, 7, -1)
    weight, bias = (torch.randn(dy.shape[-1], *more, device=DEVICE) for more in ([x.shape[-1]], []))
    base = dy + 1 if given else Frozen(weight, bias)
    inputs = [x, *(t for branch in branches for t in operands_of(branch))]
    found = []
    for backend in ("triton_rank", "eager"):
        y = low_rank_delta(x, base, branches, backend=backend)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


class Counting(TorchDispatchMode):
    """How many operations run that a GPU would have to be launched for."""

    VIEWS = frozenset({"detach", "t", "transpose", "view", "_unsafe_view", "slice", "split_with_sizes"})
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in self.VIEWS and not name.startswith(("empty", "new_empty"))
        return func(*args, **kwargs or {})


def launches(branch: LowRank, stages: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of one layer, forward and backward, under bf16: operations of PyTorch and kernels of Triton."""
    x = torch.randn(2, 7, 151, device=DEVICE, requires_grad=True)
    layer, branch = Frozen(torch.randn(139, 151, device=DEVICE), None), leaves(branch)
    counting, kernels = Counting(), []
    monkeypatch.setattr(triton_rank, "launch", lambda kernel, *rest: kernels.append(kernel))
    with counting, torch.autocast(DEVICE, torch.bfloat16):
        y = autograd.low_rank_delta(x, layer, [branch], stages=stages)
        torch.autograd.grad(y, [x, *operands_of(branch)], torch.ones_like(y))
    return counting.count + len(kernels)


def test_a_nonlinear_layer_with_a_gate_takes_three_launches_more_than_a_linear_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """f and the gate forward, backward, and the sum of the small gradients."""
    _, _, (branch,) = made(Case("swish", "gate", 7, (8,), torch.float32))
    linear = branch._replace(nonlinearity="identity", theta=(), v=None, gate=None, scale=1.0)
    of_linear = launches(linear, torch_stages, monkeypatch)
    assert launches(branch, triton_rank, monkeypatch) == of_linear + 3
    assert launches(branch, torch_stages, monkeypatch) > of_linear + 25
