"""The same as one autograd node: it saves x and A x only, and makes no copy of the base output.

The rank space (M × R numbers) is computed again in the backward pass by the definition in `eager`, so that there is one
formula for each f; what costs time, the passes over M × D and M × E numbers, is done here by hand and in place.
Shapes: `...` any leading dimensions, M their product, `D` in_features, `E` out_features, `R` rank of all branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.kernels import eager
from nolora_vision.kernels.eager import Frozen, LowRank, all_rank_spaces, no_autocast, stacked_down, stacked_up

LEADING = 5
"""Arguments of the node before the operands of the branches: x, base, W, b, and the branches."""


def low_rank_delta(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """As `eager.low_rank_delta`, with less memory and fewer passes over large tensors.

    Inside `torch.func` transforms and while `torch.compile` traces, the definition itself runs: the first need a rule
    for every operation, and the second makes nodes of its own.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return eager.low_rank_delta(x, base, branches)
    weight, bias = base if isinstance(base, Frozen) else (None, None)
    given = None if isinstance(base, Frozen) else base
    if not torch.is_grad_enabled():
        y, _ = _forward(x, given, weight, bias, branches)
        return y.view(*x.shape[:-1], y.shape[-1])
    operands = [t for branch in branches for t in operands_of(branch)]
    y = _Update.apply(x, given, weight, bias, tuple(branches), *operands)  # type: ignore[assignment]
    return y.view(*x.shape[:-1], y.shape[-1])


def operands_of(branch: LowRank) -> list[Tensor]:
    """A, B, then v, G, c and θ as far as there are any."""
    return [branch.down, branch.up, *_small(branch)]


def with_operands(branch: LowRank, operands: Iterator[Tensor]) -> LowRank:
    """The same branch on the next of these tensors, in the order of `operands_of`."""
    return branch._replace(
        down=next(operands),
        up=next(operands),
        v=None if branch.v is None else next(operands),
        gate=None if branch.gate is None else (next(operands), next(operands)),
        theta=tuple(next(operands) for _ in branch.theta),
    )


class _Update(torch.autograd.Function):
    """y = base + Σ s_k B_k (v_k ⊙ f_k(A_k x)); base is given, or W x + b with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Tensor | None, *rest: Any) -> Tensor:
        """y: (M, E). The node does not keep it: blocks may write into it (`qkv += bias`)."""
        weight, bias, branches, *operands = rest
        y, h = _forward(x, given, weight, bias, branches)
        ctx.save_for_backward(x, h, weight, *operands)
        ctx.branches = branches
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the given base and every operand, as far as they are asked for."""
        x, h, weight, *operands = ctx.saved_tensors
        source = iter(operands)
        branches = [with_operands(branch, source) for branch in ctx.branches]
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is wanted: by the definition, which autograd can follow
            found = _through_the_definition(x, weight, branches, dy, (wanted[0], *wanted[LEADING:]))
        else:
            with no_autocast(dy.device.type):
                found = _by_hand(x, h, weight, branches, dy, (wanted[0], *wanted[LEADING:]))
        d_base = dy.view(*x.shape[:-1], dy.shape[-1]) if wanted[1] else None
        return found[0], d_base, None, None, None, *found[1:]


def _forward(
    x: Tensor, given: Tensor | None, weight: Tensor | None, bias: Tensor | None, branches: Sequence[LowRank]
) -> tuple[Tensor, Tensor]:
    """(y: (M, E), h: (..., R)), y a buffer of its own; with autograd off."""
    if given is None:
        assert weight is not None
        y = _owner(F.linear(x, weight, bias))  # under autocast, if it is on
    else:
        y = given.reshape(-1, given.shape[-1]).clone(memory_format=torch.contiguous_format)
    with no_autocast(x.device.type):
        h = F.linear(x.to(y.dtype), stacked_down(branches, y.dtype))
        z = all_rank_spaces(h, branches).to(y.dtype)
        up = stacked_up(branches, y.shape[-1], y.dtype)
        y.addmm_(z.reshape(-1, z.shape[-1]), up.t())
    return y, h


def _owner(y: Tensor) -> Tensor:
    """A fresh (..., E) as (M, E) that is no view: only such an output of a node may be written into afterwards."""
    owner = y._base if y._is_view() else y
    flat = y.shape[:-1].numel(), y.shape[-1]
    return owner if owner is not None and owner.shape == flat and owner.is_contiguous() else y.reshape(flat).clone()


def _by_hand(
    x: Tensor, h: Tensor, weight: Tensor | None, branches: Sequence[LowRank], dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and of the operands, `wanted` in this order; each large tensor is read once for each product."""
    dtype = dy.dtype
    dz = (dy @ stacked_up(branches, dy.shape[-1], dtype)).view(h.shape)
    z, dh, d_small = _rank_space_gradients(h, branches, dz)
    dh2 = dh.reshape(-1, dh.shape[-1])
    found: list[Tensor | None] = [None]
    if wanted[0]:
        down = stacked_down(branches, dtype)
        dx = dh2 @ down if weight is None else (dy @ weight.to(dtype)).addmm_(dh2, down)
        found[0] = dx.view(x.shape).to(x.dtype)
    if any(wanted[1:]):
        d_down = dh2.t() @ x.to(dtype).reshape(-1, x.shape[-1])
        d_up = dy.t() @ z.reshape(-1, z.shape[-1])
        start = 0
        for branch, smaller in zip(branches, d_small, strict=True):
            stop = start + branch.down.shape[0]
            found.append(d_down[start:stop].to(branch.down.dtype))
            found.append(_gathered(d_up[:, start:stop], branch.rows).to(branch.up.dtype))
            found += smaller
            start = stop
    else:
        found += [None] * (len(wanted) - 1)
    return [gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)]


def _rank_space_gradients(
    h: Tensor, branches: Sequence[LowRank], dz: Tensor
) -> tuple[Tensor, Tensor, list[list[Tensor | None]]]:
    """z and dh in h's dtype, and the gradients of v, G, c and θ of each branch (None where they don't train)."""
    with torch.enable_grad():
        leaf = h.detach().requires_grad_(True)
        inner = [_detached(branch) for branch in branches]
        z = all_rank_spaces(leaf, inner)
    small = [[t if t.requires_grad else None for t in _small(branch)] for branch in inner]
    training = [t for ts in small for t in ts if t is not None]
    dh, *found = torch.autograd.grad(z, [leaf, *training], dz.to(z.dtype), allow_unused=True)
    source = iter(found)
    return z.detach().to(h.dtype), dh, [[None if t is None else next(source) for t in ts] for ts in small]


def _through_the_definition(
    x: Tensor, weight: Tensor | None, branches: Sequence[LowRank], dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    inputs = [x, *(t for branch in branches for t in operands_of(branch))]
    base = dy.new_zeros(*x.shape[:-1], dy.shape[-1]) if weight is None else Frozen(weight, None)
    y = eager.low_rank_delta(x, base, branches).to(dy.dtype).view(dy.shape)
    asked = [t for t, asks in zip(inputs, wanted, strict=True) if asks]
    source = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
    return [next(source) if asks else None for asks in wanted]


def _small(branch: LowRank) -> list[Tensor]:
    return [*([] if branch.v is None else [branch.v]), *(branch.gate or ()), *branch.theta]


def _detached(branch: LowRank) -> LowRank:
    """Leaves of a graph of their own, which require gradients where the originals do."""
    leaves = iter([t.detach().requires_grad_(t.requires_grad) for t in operands_of(branch)])
    return with_operands(branch, leaves)


def _gathered(d_up: Tensor, rows: tuple[tuple[int, int], ...] | None) -> Tensor:
    """The rows of dB: (E, R) that the branch reaches: (E', R)."""
    return d_up if rows is None else torch.cat([d_up[start:stop] for start, stop in rows])
