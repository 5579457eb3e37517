"""Checks of the Triton stages against the definition in fp64, by Triton's interpreter; `test_triton.py` runs them.

Alone: `TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_checks.py`. On a GPU the same checks run without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import FORMULAS, Frozen, LowRank, custom_op, triton_formulas, triton_stages
from nolora_vision.kernels import low_rank_delta as door
from nolora_vision.kernels.eager import (
    all_rank_spaces,
    low_rank_delta,
    operands_of,
    rank_space,
    small_operands,
    stacked_down,
    stacked_up,
    with_operands,
)
from tests.operands import make_branch
from tests.soak import SOAK

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@cache
def patch_for(function: Callable[..., Any]) -> None:
    interpreter._patch_lang(function)


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As the interpreter calls a function of a kernel, which patches triton.language each time: 40 % of all its time.

    A launch patches it already. Once for each function is for `tl.core`, which only `tl.sum` and its like name.
    """
    patch_for(self.fn)
    return self.rewrite()(*args, **kwargs)


if INTERPRETED and hasattr(interpreter, "_patch_lang"):  # else it takes its time
    interpreter.InterpretedFunction.__call__ = call
M = (1, 7, 133, 7, 264, 1, 133, 7, 1, 399) if INTERPRETED else (1, 7, 197, 7, 1023, 1, 197, 7, 1, 1576)
"""In turn: one block of rows, and several with a ragged last one, up to 128 rows each; the interpreter is slow."""
RANKS = ((1,), (4,), (8,), (16,), (64,), (8, 8, 8), (3, 3), (16, 16, 16))
VARIANTS = (*MODULATIONS, "sample", "sample+gate")
"""The modulations; and v for each sample, alone and with a gate."""


class Case(NamedTuple):
    """One adapter on one input."""

    nonlinearity: str
    variant: str
    m: int
    ranks: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        return f"{self.nonlinearity}-{self.variant}-m{self.m}-r{ranks}-{str(self.dtype)[6:]}"


def covering_cases() -> list[Case]:
    """Every f with every variant in both types; over these M and ranks go round, so that every f meets each of them.

    M shifts by three from one f to the next, ranks go in steps of three, so that their pairs vary too.
    """
    pairs = list(product(NONLINEARITIES, VARIANTS, (torch.float32, torch.bfloat16)))
    cases = []
    for i, (nonlinearity, variant, dtype) in enumerate(pairs):
        m = M[(i + 3 * (i // 10)) % len(M)]
        cases.append(Case(nonlinearity, variant, m, RANKS[(3 * i + i // 10 + 1) % len(RANKS)], dtype))
    return cases


def cases_to_run(every: list[Case]) -> list[Case]:
    """All on a GPU and in `make soak`; of each f and variant one type, in turn, where the interpreter takes minutes."""
    return every if SOAK or not INTERPRETED else [case for i, case in enumerate(every) if (i // 2 + i) % 2 == 0]


def width(case: Case) -> tuple[int, int]:
    """D and E: beyond one tile and no multiple of one."""
    return (72, 88) if case.m > 200 else (151, 139)


def samples_of(m: int) -> int:
    return next(n for n in (8, 7, 3, 1) if m % n == 0)


def made(case: Case) -> tuple[Tensor, Tensor, list[LowRank]]:
    """x, dy and branches, whose values the type of the case holds exactly, so that casts of inputs make no error."""
    torch.manual_seed(0)
    (d, e), samples = width(case), samples_of(case.m)

    def exact(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * std).to(case.dtype).to(DEVICE, torch.float32)

    branches = []
    for k, r in enumerate(case.ranks):
        v = None if case.variant == "none" else exact(samples, 1, r) if "sample" in case.variant else exact(r)
        gate = (exact(r, r, std=r**-0.5), exact(r)) if "gate" in case.variant else None
        theta = tuple(exact(*make(r).shape, std=0.7) for make in FORMULAS[case.nonlinearity].theta.values())
        rows = None if len(case.ranks) == 1 else ((8 * k, 8 * k + 20),)
        width_up = e if rows is None else 20
        up = exact(width_up, r)
        branches.append(LowRank(exact(r, d, std=d**-0.5), up, v, gate, case.nonlinearity, theta, 0.75, rows))
    return exact(case.m, d).to(case.dtype), exact(case.m, e).to(case.dtype), branches


def joined(branches: Sequence[LowRank], e: int) -> Tensor:
    return stacked_up(branches, e, branches[0].up.dtype)


def defined(x: Tensor, dy: Tensor, dx: Tensor, branches: list[LowRank]) -> dict[str, Tensor]:
    """Everything that the stages compute, by the definition and autograd in fp64."""
    branches = [with_operands(b, iter([t.double().requires_grad_() for t in operands_of(b)])) for b in branches]
    x, dy, up = x.double().requires_grad_(), dy.double(), joined(branches, dy.shape[1])
    h = x @ stacked_down(branches, x.dtype).t()
    v = branches[0].v
    z = all_rank_spaces(h if v is None or v.ndim == 1 else h.view(len(v), -1, h.shape[1]), branches).reshape(h.shape)
    inputs = [x, h, up, *(t for branch in branches for t in operands_of(branch))]
    d_x, d_h, d_up, *rest = torch.autograd.grad(z @ up.t(), inputs, dy, allow_unused=True)
    found = {"h": h, "z": z, "dh": d_h, "dB": d_up, "dx": dx.double() + d_x}
    source, d_down = iter(rest), []
    for k, branch in enumerate(branches):
        d_down.append(next(source))
        next(source)
        found |= {f"small {i} of branch {k}": next(source) for i, _ in enumerate(small_operands(branch))}
    return found | {"dA": torch.cat(d_down)}


def computed(x: Tensor, dy: Tensor, dx: Tensor, branches: list[LowRank]) -> dict[str, Tensor]:
    """The same by the stages."""
    v = branches[0].v
    rows = 1 if v is None or v.ndim == 1 else x.shape[0] // len(v)
    h, z = triton_stages.rank_features(x, stacked_down(branches, torch.float32), branches, x.dtype, rows)
    dh, d_up, small = triton_stages.rank_gradients(dy, h, branches, joined(branches, dy.shape[1]), rows)
    d_down, into = triton_stages.input_gradients(x, dh, stacked_down(branches, torch.float32), dx)
    assert d_up is not None and d_down is not None and into is dx
    assert (h.dtype, z.dtype, dh.dtype) == (torch.float32, x.dtype, torch.float32)
    for branch, gradients in zip(branches, small, strict=True):
        for t, gradient in zip(small_operands(branch), gradients, strict=True):
            assert gradient is not None and (gradient.shape, gradient.dtype) == (t.shape, t.dtype)
    named = {f"small {i} of branch {k}": g for k, gs in enumerate(small) for i, g in enumerate(gs) if g is not None}
    return {"h": h, "z": z, "dh": dh, "dB": d_up, "dx": dx, "dA": d_down} | named


def error(found: Tensor, reference: Tensor) -> float:
    """The largest error, in units of the largest number."""
    assert found.shape == reference.shape
    if not reference.numel():
        return 0.0
    return ((found.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


EXACT_LIMIT = 5e-6
"""fp32 sums of up to 1,576 products, and fp32 functions of them: some tens of roundings of 6e-8."""
TERM_LIMIT = 5e-7
"""Of the sum of magnitudes, for sums over all rows, whose terms may cancel: each term is off by some roundings."""
ROUNDED_LIMITS = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""What is stored or multiplied in the type of x: z, dB (from z), dA (from dh), and dx, which is both. One unit of the
last place each time, as the interpreter cuts bits off where a GPU rounds. All else is fp32 whatever the type of x."""
ROUNDED = {"z": 1, "dB": 1, "dA": 1, "dx": 2}


def magnitudes(h: Tensor, dz: Tensor, branch: LowRank) -> list[Tensor]:
    """Σ |what a row adds| for the gradients of v, G, c and θ, in fp64; where v is per sample, of all samples."""
    small = small_operands(branch)
    shared = [i for i, t in enumerate(small) if not (t is branch.v and t.ndim == 3)]

    if not shared:
        return [torch.zeros(1)] * len(small)

    def of_a_row(h: Tensor, dz: Tensor, v: Tensor | None, *operands: Tensor) -> Tensor:
        rest = iter(operands)
        parts = [next(rest) if i in shared else v for i in range(len(small))]
        row = with_operands(branch, iter([branch.down, branch.up, *parts]))
        return (rank_space(h, row) * dz).sum()

    per_row = None if len(shared) == len(small) else branch.v.expand(-1, len(h) // len(branch.v), -1).reshape(h.shape)
    inputs = (h, dz, per_row, *(small[i].double() for i in shared))
    gradient = torch.func.grad(of_a_row, argnums=tuple(range(3, len(inputs))))
    found = torch.func.vmap(gradient, in_dims=(0, 0, None if per_row is None else 0, *[None] * len(shared)))(*inputs)
    sums = dict(zip(shared, (t.abs().sum(0) for t in found), strict=True))
    return [sums.get(i, torch.zeros(1)) for i in range(len(small))]


def limits(case: Case, reference: dict[str, Tensor], dz: Tensor, branches: list[LowRank]) -> dict[str, float]:
    """The largest error of each result, in units of its largest number."""
    found = {name: EXACT_LIMIT + ROUNDED.get(name, 0) * ROUNDED_LIMITS[case.dtype] for name in reference}
    start = 0
    for k, branch in enumerate(branches):
        part = slice(start, start := start + branch.down.shape[0])
        if small_operands(branch):
            for i, sums in enumerate(magnitudes(reference["h"][:, part].detach(), dz[:, part], branch)):
                name = f"small {i} of branch {k}"
                found[name] += TERM_LIMIT * (sums.max() / reference[name].abs().max()).item()
    return found


def check(case: Case) -> None:
    """Compute it, print the errors, and fail if one is above its limit."""
    x, dy, branches = made(case)
    dx = torch.randn(x.shape).to(x)
    reference = defined(x, dy, dx, branches)
    dz = dy.double() @ joined(branches, dy.shape[1]).double()
    found, allowed = computed(x, dy, dx, branches), limits(case, reference, dz, branches)
    assert found.keys() == reference.keys()
    errors = {name: error(found[name], reference[name].detach()) for name in found}
    print("ERRORS", case, {name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        assert value <= allowed[name], f"{name}: the error {value:.2e} is above {allowed[name]:.2e}; all: {errors}"


def test_the_cases_cover_what_they_should() -> None:
    every, run = covering_cases(), cases_to_run(covering_cases())
    for nonlinearity in NONLINEARITIES:
        of_f, run_of_f = ([case for case in cases if case.nonlinearity == nonlinearity] for cases in (every, run))
        assert {case.m for case in of_f} == set(M) and {case.ranks for case in of_f} == set(RANKS)
        assert {(case.variant, case.dtype) for case in of_f} == set(product(VARIANTS, (torch.float32, torch.bfloat16)))
        assert {case.variant for case in run_of_f} == set(VARIANTS) and len({case.dtype for case in run_of_f}) == 2
    assert {case.m for case in run} == set(M) and {case.ranks for case in run} == set(RANKS)


@pytest.mark.parametrize("case", cases_to_run(covering_cases()), ids=str)
def test_the_stages_equal_the_definition(case: Case) -> None:
    check(case)


def by_eager(x: Tensor, dy: Tensor, base: Tensor, branches: list[LowRank]) -> dict[str, Tensor]:
    """y and all gradients by the definition and autograd, in the types of its operands."""
    branches = [with_operands(b, iter([t.clone().requires_grad_() for t in operands_of(b)])) for b in branches]
    x, v = x.clone().requires_grad_(), branches[0].v
    shape = (1, -1) if v is None or v.ndim == 1 else (len(v), -1)
    y = low_rank_delta(x.view(*shape, x.shape[1]), base.view(*shape, base.shape[1]), branches)
    y.backward(dy.view(y.shape))
    of_up = [branch._replace(up=branch.up.grad) for branch in branches]
    found = {"y": y.detach().view(base.shape), "dx": x.grad, "dB": joined(of_up, base.shape[1])}
    found["dA"] = torch.cat([branch.down.grad for branch in branches])
    return found | {
        f"small {i} of branch {k}": t.grad for k, b in enumerate(branches) for i, t in enumerate(small_operands(b))
    }


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bf16 off where a GPU rounds")
@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_errors_are_at_most_twice_those_of_eager(case: Case) -> None:
    no_worse_than_eager(case)


def no_worse_than_eager(case: Case) -> None:
    """Against fp64. As single numbers may be right by chance, an error of EXACT_LIMIT is always allowed."""
    x, dy, branches = made(case)
    base = torch.randn(dy.shape).to(dy)
    reference = defined(x, dy, torch.zeros_like(x), branches)
    up = joined(branches, dy.shape[1])
    reference["y"] = base.double() + reference["z"] @ up.double().t()
    eager, found = by_eager(x, dy, base, branches), computed(x, dy, torch.zeros_like(x), branches)
    found["y"] = torch.addmm(base, found["z"], up.to(base.dtype).t())
    for name, other in eager.items():
        ours, theirs = (error(t, reference[name].detach()) for t in (found[name], other))
        assert ours <= max(2 * theirs, EXACT_LIMIT), f"{name}: {ours:.2e}, eager: {theirs:.2e}"


@pytest.mark.parametrize("ranks", [(8,), (8, 8, 8), (64,)], ids=str)
def test_fp16(ranks: tuple[int, ...]) -> None:
    check(Case("rational", "gate", 133, ranks, torch.float16))


def test_k4_goes_over_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few programs as here, each has many of them, and the last too few."""
    monkeypatch.setattr(triton_stages, "PROGRAMS", 3)
    for dtype in (torch.float32, torch.bfloat16):
        check(Case("swish", "vector", 399, (8, 8, 8), dtype))


@pytest.mark.parametrize("nonlinearity", ["aurora", "rational"])
@pytest.mark.parametrize("variant", ["gate", "sample"])
@pytest.mark.parametrize("ranks", [(8, 8), (64,)], ids=str)
def test_two_runs_give_the_same_bits_and_dx_is_added_to_in_place(
    nonlinearity: str, variant: str, ranks: tuple[int, ...]
) -> None:
    x, dy, branches = made(Case(nonlinearity, variant, 69, ranks, torch.float32))
    wide = torch.randn(len(x), x.shape[1] + 3, device=DEVICE)
    first_wide, second = wide.clone(), wide[:, 1:-2].clone()
    first = computed(x, dy, first_wide[:, 1:-2], branches)  # a part of a wider buffer: its neighbours stay
    again = computed(x, dy, second, branches)
    assert {name for name, t in first.items() if not torch.equal(t, again[name])} == set()
    assert torch.equal(first_wide[:, :1], wide[:, :1]) and torch.equal(first_wide[:, -2:], wide[:, -2:])
    assert not torch.equal(second, wide[:, 1:-2])


def test_matrices_of_any_strides() -> None:
    x, dy, branches = made(Case("swish", "gate", 133, (8, 8), torch.float32))
    expected = computed(x, dy, torch.zeros_like(x), branches)
    for strided in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]):
        found = computed(strided(x), strided(dy), torch.zeros_like(x), branches)
        assert not strided(x).is_contiguous()
        assert {name for name, t in found.items() if not torch.equal(t, expected[name])} == set()
    with pytest.raises(ValueError, match="dx must have contiguous rows"):
        triton_stages.add_input_gradient(torch.zeros(72, 133).t(), expected["dh"], stacked_down(branches, x.dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [(8,), (64,)], ids=str)
def test_an_empty_batch(variant: str, ranks: tuple[int, ...]) -> None:
    x, dy, branches = made(Case("aurora", variant, 8, ranks, torch.float32))
    if "sample" in variant:
        branches = [branch._replace(v=branch.v[:0]) for branch in branches if branch.v is not None]
    h, z = triton_stages.rank_features(x[:0], stacked_down(branches, x.dtype), branches, x.dtype, 5)
    dh, d_up, small = triton_stages.rank_gradients(dy[:0], h, branches, joined(branches, dy.shape[1]), 5)
    d_down, dx = triton_stages.input_gradients(x[:0], dh, stacked_down(branches, x.dtype), x[:0].clone())
    assert h.shape == z.shape == dh.shape == (0, sum(ranks)) and dx is not None and dx.shape == x[:0].shape
    sums = [d_up, d_down, *(g for gradients in small for g in gradients)]
    assert all(t is not None and not t.any() for t in sums)
    assert [t.shape for t in sums[2:] if t is not None] == [t.shape for b in branches for t in small_operands(b)]


def test_parts_that_are_not_wanted() -> None:
    x, dy, branches = made(Case("swish", "gate", 133, (8, 8), torch.bfloat16))
    up, down, dx = joined(branches, dy.shape[1]), stacked_down(branches, torch.float32), torch.randn(x.shape).to(x)
    expected = computed(x, dy, dx.clone(), branches)
    dh, d_up, small = triton_stages.rank_gradients(dy, expected["h"], branches, up, 1, trains=False)
    assert torch.equal(dh, expected["dh"]) and d_up is None and small == [[None] * 4] * 2
    assert torch.equal(triton_stages.down_gradient(x, dh), expected["dA"])
    assert torch.equal(triton_stages.add_input_gradient(dx.clone(), dh, down), expected["dx"])
    assert triton_stages.input_gradients(None, dh, down, None) == (None, None)
    fresh = torch.full_like(dx, torch.nan)  # written over, not added to
    triton_stages.input_gradients(None, dh, down, fresh, accumulate=False)
    assert error(fresh, dh.double() @ down.double()) < 2 * ROUNDED_LIMITS[torch.bfloat16]


def test_x_of_another_type_than_the_output() -> None:
    """As under autocast: tiles are cast on their way, x and A by one unit of bf16's last place."""
    x, _, branches = made(Case("tanh", "vector", 133, (8,), torch.float32))
    h, z = triton_stages.rank_features(x, branches[0].down, branches, torch.bfloat16, 1)
    assert (h.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    assert error(h, x.double() @ branches[0].down.double().t()) < 2 * ROUNDED_LIMITS[torch.bfloat16]


def test_samples_must_make_up_the_rows() -> None:
    x, _, branches = made(Case("tanh", "sample", 7, (8,), torch.float32))
    with pytest.raises(ValueError, match="v is for 7 samples of 2 rows, x has 7 rows"):
        triton_stages.rank_features(x, branches[0].down, branches, x.dtype, 2)


def test_what_is_not_supported_is_refused() -> None:
    x, dy, branches = made(Case("tanh", "vector", 7, (8, 8), torch.float32))
    mixed = [branches[0], branches[1]._replace(nonlinearity="relu")]
    with pytest.raises(triton_stages.Unsupported, match="differ in nonlinearity"):
        triton_stages.rank_features(x, stacked_down(mixed, x.dtype), mixed, x.dtype, 1)
    with pytest.raises(triton_stages.Unsupported, match="differ in nonlinearity"):
        triton_stages.rank_gradients(dy, x[:, :16], mixed, joined(mixed, dy.shape[1]), 1)
    for wide, dtype in ((65, torch.float32), (8, torch.float64)):
        with pytest.raises(triton_stages.Unsupported, match=r"multiplies no torch.float(32|64) at rank (128|16)"):
            triton_stages.down_gradient(x.to(dtype), torch.zeros(7, wide))


@triton.jit
def tanh_kernel(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), triton_formulas.tanh(tl.load(x + tl.arange(0, N))))


def test_tanh_is_exact_to_its_own_size() -> None:
    """Slopes at 0, and the small β of a fresh swish, hang on it: 3e-7 are five roundings of fp32."""
    x = torch.cat([torch.logspace(-30, 2, 2047), torch.zeros(1)]).to(DEVICE)
    x = torch.cat([x, -x])
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, N=4096)
    expected = torch.tanh(x.double())
    assert ((y - expected).abs() <= 3e-7 * expected.abs()).all()


@pytest.mark.parametrize("given", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("operator", [False, True], ids=["node", "operator"])
def test_the_whole_update_is_the_definition(operator: bool, given: bool) -> None:
    """q, k and v with gates, forward and every gradient, by the backend that users name and as the operator."""
    torch.manual_seed(0)
    branches = []
    for start in (0, 6, 12):
        made = make_branch("swish", "gate", d=40, e=6, r=8)._replace(rows=((start, start + 6),))
        leaves = (t.detach().float().to(DEVICE).requires_grad_() for t in operands_of(made))
        branches.append(with_operands(made, iter(leaves)))
    x = (0.2 * torch.randn(2, 7, 40, device=DEVICE)).requires_grad_()  # larger, and numpy warns of e^-2x = ∞
    dy = torch.randn(2, 7, 18, device=DEVICE)
    base = dy + 1 if given else Frozen(torch.randn(18, 40, device=DEVICE), torch.randn(18, device=DEVICE))
    inputs = [x, *(t for branch in branches for t in operands_of(branch))]
    found = []
    for of_triton in (True, False):
        if not of_triton:
            y = low_rank_delta(x, base, branches)
        elif operator:
            y = custom_op.low_rank_delta(x, base, branches, "triton")
        else:
            y = door(x, base, branches, backend="triton")
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
