"""The same as one autograd node: it makes no copy of the base output, and keeps its rank space and, at most, x.

What costs time, the passes over M × D and M × E numbers, is done by hand and in place, in three stages: x to the rank
space, dy through it, and its gradients to A and x. Where x is what a norm or an activation made of something that is
kept anyway, x is made again (`origin.py`). The forward pass gives the definition's bits.
Shapes: `...` any leading dimensions, M their product, `D` in_features, `E` out_features, `R` rank of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from nolora_vision.kernels import eager, torch_stages
from nolora_vision.kernels.eager import (
    Frozen,
    LowRank,
    operands_of,
    small_operands,
    stacked_down,
    stacked_up,
    with_operands,
)
from nolora_vision.kernels.origin import Input, Origin, origin_of
from nolora_vision.kernels.products import cast, input_gradient, thin, up_gradient

LEADING = 7
"""Arguments of the node before the operands of the branches: x, base, W, b, branches, origin and stages."""
AGAIN_FROM = 2**24
"""Numbers in x from which a GPU makes it again, instead of keeping it: for fewer the kernels that this takes (one for
what an activation made, seven for a norm) would be launched for longer than they run."""


def low_rank_delta(
    x: Tensor,
    base: Tensor | Frozen,
    branches: Sequence[LowRank],
    *,
    stages: ModuleType = torch_stages,
) -> Tensor:
    """As `eager.low_rank_delta`, with less memory and fewer passes over large tensors.

    Inside `torch.func` transforms, forward-mode derivatives and `torch.jit.trace` the definition itself runs: they need
    to see every operation.
    A second derivative by x itself, where x is no leaf, misses what goes through A x, as x is made again as another
    tensor; those by parameters and by what x was made of are whole. `eager` has it.

    Args:
        stages: what computes the three stages.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return eager.low_rank_delta(x, base, branches)
    weight, bias = base if isinstance(base, Frozen) else (None, None)
    given = None if isinstance(base, Frozen) else base
    origin = _origin(x) if torch.is_grad_enabled() else None
    x = cast(x, product_type(x) if given is None else given.dtype)  # once, as W x, A x and dA all multiply it
    if torch.is_grad_enabled():
        if weight is not None and stages is torch_stages and _is_plain(branches):
            y = _Plain.apply(x, weight, bias, branches[0].down, branches[0].up, origin)
            return y.view(*x.shape[:-1], y.shape[-1])
        operands = [t for branch in branches for t in operands_of(branch)]
        y = _Update.apply(x, given, weight, bias, tuple(branches), origin, stages, *operands)
    else:
        y, *_ = forward(x, given, weight, bias, branches, stages, owned=False)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]


def _origin(x: Tensor) -> Origin | None:
    """What x is made of, where making it again is worth it."""
    return None if x.device.type == "cuda" and x.numel() < AGAIN_FROM else origin_of(x)


class _Update(torch.autograd.Function):
    """y = base + Σ s_k B_k (v_k ⊙ f_k(A_k x)); base is given, or W x + b with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Tensor | None, *rest: Any) -> Tensor:
        """y: (M, E). The node does not keep it: blocks may write into it (`qkv += bias`)."""
        weight, bias, branches, origin, stages, *operands = rest
        y, space, ctx.stacked = forward(x, given, weight, bias, branches, stages)
        kept = (x,) if origin is None else origin.tensors
        ctx.save_for_backward(weight, *space, *operands, *kept)
        ctx.branches, ctx.origin, ctx.stages, ctx.of_space = branches, _recipe_of(origin), stages, len(space)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the given base and every operand, as far as they are asked for."""
        weight, *saved = ctx.saved_tensors
        space, source = saved[: ctx.of_space], iter(saved[ctx.of_space :])
        branches = [with_operands(branch, source) for branch in ctx.branches]
        kept = Input(tuple(source), ctx.origin, ctx.shape, ctx.dtype)
        wanted = ctx.needs_input_grad
        asked = (wanted[0], *wanted[LEADING:])
        if torch.is_grad_enabled():  # a second derivative is wanted: by the definition, which autograd can follow
            found = _through_the_definition(kept.x(), weight, branches, dy, asked)
        else:
            with _AutocastOff(dy.device.type):
                found = by_hand(kept, space, weight, branches, dy, asked, ctx.stages, ctx.stacked)
        d_base = dy.view(*ctx.shape[:-1], dy.shape[-1]) if wanted[1] else None
        return found[0], d_base, *[None] * (LEADING - 2), *found[1:]


def _is_plain(branches: Sequence[LowRank]) -> bool:
    return len(branches) == 1 and branches[0].rows is None and torch_stages.passes_through(branches)


class _Plain(torch.autograd.Function):
    """`_Update` for y = W x + b + B A x, the products alone: a GPU is done with them sooner than Python with the rest.

    The same numbers, bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        """y: (M, E)."""
        weight, bias, down, up, origin = rest
        y = _linear(x, weight, bias)
        with _AutocastOff(x.device.type):
            ctx.cast = cast(down, y.dtype), cast(up, y.dtype)  # small, and the backward pass would make them again
            h = F.linear(x.reshape(-1, x.shape[-1]), ctx.cast[0])
            y = _plus(y, h, ctx.cast[1].t())
        ctx.save_for_backward(h, weight, down, up, *((x,) if origin is None else origin.tensors))
        ctx.origin, ctx.shape, ctx.dtype = _recipe_of(origin), x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, A and B, as far as they are asked for."""
        h, weight, down, up, *tensors = ctx.saved_tensors
        kept, dtype = Input(tensors, ctx.origin, ctx.shape, ctx.dtype), dy.dtype
        of_x, _, _, of_down, of_up, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            asked = (of_x, of_down, of_up)
            found = _through_the_definition(kept.x(), weight, [LowRank(down, up)], dy, asked)
            return found[0], None, None, *found[1:], None
        dx = d_down = d_up = None
        with _AutocastOff(dy.device.type):
            of_type = ctx.cast if ctx.cast[0].dtype == dtype else (down.to(dtype), up.to(dtype))
            dh = thin(dy, of_type[1])
            if of_x:
                dx = input_gradient(dy, cast(weight, dtype)).addmm_(dh, of_type[0])
                dx = cast(dx.view(ctx.shape), ctx.dtype)
            if of_down:
                d_down = cast(kept.down_gradient(dh, dtype, torch_stages), down.dtype)
            if of_up:
                d_up = cast(up_gradient(cast(h, dtype), dy), up.dtype)
        return dx, None, None, d_down, d_up, None


def forward(
    x: Tensor,
    given: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branches: Sequence[LowRank],
    stages: ModuleType,
    *,
    owned: bool = True,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, Tensor]]:
    """y: (M, E); h: (M, R) and what else the stages want kept; A: (R, D) and B: (E, R), stacked, in y's type.

    With autograd off. y is a buffer of its own and, if `owned`, no view of it.
    """
    if given is None:
        assert weight is not None
        y = _linear(x, weight, bias, owned=owned)
    else:
        y = given.reshape(-1, given.shape[-1]).clone(memory_format=torch.contiguous_format)
    with _AutocastOff(x.device.type):
        down, up = stacked_down(branches, y.dtype), stacked_up(branches, y.shape[-1], y.dtype)
        flat = cast(x, y.dtype).reshape(-1, x.shape[-1])
        h, z, *bends = stages.rank_features(flat, down, branches, y.dtype, _rows_per_sample(x.shape))
        y = _plus(y, z, up.t())
    return y, (h, z, *bends) if bends else (h,), (down, up)


def _plus(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, into y; not where a dispatch mode, as selective checkpointing's, may have put y aside."""
    return torch.addmm(y, a, b) if torch._C._len_torch_dispatch_stack() else y.addmm_(a, b)


def _recipe_of(origin: Origin | None) -> Origin | None:
    """Without the tensors, which `save_for_backward` keeps: autograd lets go of those after the backward pass, but the
    node itself lives as long as a loss does."""
    return None if origin is None else origin._replace(tensors=())


class _AutocastOff:
    """As `torch.autocast(kind, enabled=False)`, without its bookkeeping: that takes longer than a small product."""

    def __init__(self, kind: str) -> None:
        self.kind, self.on = kind, eager.autocasts(kind)

    def __enter__(self) -> None:
        if self.on:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *exception: object) -> None:
        if self.on:
            torch.set_autocast_enabled(self.kind, True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, owned: bool = True) -> Tensor:
    """W x + b, the frozen layer's own bits: (M, E), under autocast, if it is on."""
    if bias is None and x.is_contiguous():  # the same product as of (..., D), whose result is no view of (M, E)
        return F.linear(x.reshape(-1, x.shape[-1]), weight)
    y = F.linear(x, weight, bias)
    return _owner(y) if owned else y.reshape(-1, y.shape[-1])


def _owner(y: Tensor) -> Tensor:
    """A fresh (..., E) as (M, E) that is no view: only such an output of a node may be written into afterwards."""
    owner = y._base if y._is_view() else y
    flat = y.shape[:-1].numel(), y.shape[-1]
    return owner if owner is not None and owner.shape == flat and owner.is_contiguous() else y.reshape(flat).clone()


def product_type(x: Tensor) -> torch.dtype:
    """The type of W x: autocast's where it is on, else x's own."""
    kind = x.device.type
    if eager.autocasts(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _rows_per_sample(shape: torch.Size) -> int:
    return shape[1:-1].numel() if len(shape) > 1 else 1


def by_hand(
    kept: Input,
    space: Sequence[Tensor | None],
    weight: Tensor | None,
    branches: Sequence[LowRank],
    dy: Tensor,
    wanted: Sequence[bool],
    stages: ModuleType,
    stacked: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor | None]:
    """Gradients of x and of the operands, `wanted` in this order; each large tensor is read once for each product.

    Args:
        space: what `forward` wants kept, or the first of it, h, alone.
        stacked: A and B of all branches, from `forward`; small, and costly for Python to make again.
    """
    dtype, shape = dy.dtype, kept.shape
    if stacked is None or stacked[0].dtype != dtype:
        stacked = stacked_down(branches, dtype), stacked_up(branches, dy.shape[-1], dtype)
    down, up = stacked
    rows = _rows_per_sample(shape)
    h, *more = space
    dh, d_up, d_small = stages.rank_gradients(dy, h, branches, up, rows, *more, trains=any(wanted[1:]))
    found: list[Tensor | None] = [None]
    if wanted[0]:
        if weight is None:
            dx = cast(dh, dtype) @ down
        else:
            dx = stages.add_input_gradient(input_gradient(dy, cast(weight, dtype)), dh, down)
        found[0] = cast(dx.view(shape), kept.dtype)
    if d_up is not None:
        d_down = kept.down_gradient(dh, dtype, stages)
        ranks = [branch.down.shape[0] for branch in branches]
        parts = [(d_down, d_up)] if len(ranks) == 1 else zip(d_down.split(ranks), d_up.split(ranks, 1), strict=True)
        for branch, (of_down, of_up), smaller in zip(branches, parts, d_small, strict=True):
            of_up = cast(_gathered(of_up, branch.rows), branch.up.dtype)
            found += [cast(of_down, branch.down.dtype), of_up]
            pairs = zip(smaller, small_operands(branch), strict=True)
            found += [None if d is None else cast(d, t.dtype) for d, t in pairs]
    else:
        found += [None] * (len(wanted) - 1)
    return [gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)]


def _through_the_definition(
    x: Tensor, weight: Tensor | None, branches: Sequence[LowRank], dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as functions, in the types of the forward pass: dy has that of its products, autocast on or not."""
    branches = [with_operands(b, iter([t.view_as(t) for t in operands_of(b)])) for b in branches]  # one may be in two
    inputs = [x, *(t for branch in branches for t in operands_of(branch))]
    with _AutocastOff(dy.device.type):
        base = dy.new_zeros(*x.shape[:-1], dy.shape[-1]) if weight is None else Frozen(cast(weight, dy.dtype), None)
        y = eager.low_rank_delta(cast(x, dy.dtype), base, branches).view(dy.shape)
    asked = [t for t, asks in zip(inputs, wanted, strict=True) if asks]
    source = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
    return [next(source) if asks else None for asks in wanted]


def _gathered(d_up: Tensor, rows: tuple[tuple[int, int], ...] | None) -> Tensor:
    """The rows of dB: (E, R) that the branch reaches: (E', R)."""
    return d_up if rows is None else torch.cat([d_up[start:stop] for start, stop in rows])
