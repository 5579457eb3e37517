"""The node as an operator of PyTorch, `nolora::update`, which `torch.compile` puts into its graph as one piece.

In eager mode an autograd.Function costs less; the compiler however looks into that, and makes its own of it.
Shapes: as in `autograd.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nolora_vision.kernels import autograd
from nolora_vision.kernels.eager import FORMULAS, Frozen, LowRank, operands_of, with_operands
from nolora_vision.kernels.origin import Input
from nolora_vision.kernels.products import exact


def low_rank_delta(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank], stages: str = "torch") -> Tensor:
    """As `eager.low_rank_delta`, by the operator; for compiled code.

    Args:
        stages: `torch` or `triton`.
    """
    weight, bias = base if isinstance(base, Frozen) else (None, None)
    given = None if isinstance(base, Frozen) else base
    operands = [t for branch in branches for t in operands_of(branch)]
    y, _ = torch.ops.nolora.update(x, given, weight, bias, operands, describe(branches), stages)
    return y.view(*x.shape[:-1], y.shape[-1])


# ------------------------------------------------------------------------------ branches as a text, which a graph holds


def describe(branches: Sequence[LowRank]) -> str:
    """What is no tensor in the branches."""
    return ";".join([_describe_one(branch) for branch in branches])


def _describe_one(branch: LowRank) -> str:
    rows = "" if branch.rows is None else ",".join([f"{start}-{stop}" for start, stop in branch.rows])
    fields = (branch.nonlinearity, branch.v is not None, branch.gate is not None, branch.scale, rows)
    return "|".join([str(field) for field in fields])


@lru_cache(maxsize=256)
def _skeletons(text: str) -> tuple[LowRank, ...]:
    """The branches of a description, with None for every tensor; not to be computed with."""
    found = []
    for part in text.split(";"):
        nonlinearity, v, gate, scale, rows = part.split("|")
        spans = [span.split("-") for span in rows.split(",")] if rows else None
        absent: Any = torch.empty(0)
        branch = LowRank(
            down=absent,
            up=absent,
            v=absent if v == "True" else None,
            gate=(absent, absent) if gate == "True" else None,
            nonlinearity=nonlinearity,
            theta=tuple(absent for _ in FORMULAS[nonlinearity].theta),
            scale=float(scale),
            rows=None if spans is None else tuple((int(start), int(stop)) for start, stop in spans),
        )
        found.append(branch)
    return tuple(found)


def _branches(text: str, operands: Sequence[Tensor]) -> list[LowRank]:
    source = iter(operands)
    return [with_operands(branch, source) for branch in _skeletons(text)]


def _stages(name: str) -> Any:
    if name == "torch":
        return autograd.torch_stages
    from nolora_vision.kernels import triton_stages

    return triton_stages


# ----------------------------------------------------------------------------------------------------------- forward


@torch.library.custom_op("nolora::update", mutates_args=())
def update(
    x: Tensor,
    given: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    operands: Sequence[Tensor],
    branches: str,
    stages: str,
) -> tuple[Tensor, Tensor]:
    """(y: (M, E), h: (M, R)); see `autograd.low_rank_delta`."""
    y, (h, *_), _ = autograd.forward(x, given, weight, bias, _branches(branches, operands), _stages(stages))
    assert h is not None
    return y, h


@update.register_fake
def _(x: Any, given: Any, weight: Any, bias: Any, operands: Any, branches: str, stages: str) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # numel() would fix the batch size
    like = weight if given is None else given
    assert like is not None
    width = like.shape[0 if given is None else -1]
    made = _branches(branches, operands)
    rank = sum(branch.down.shape[0] for branch in made)
    plain = stages == "torch" and autograd.torch_stages.passes_through(made)
    h_type = like.dtype if plain else exact(like.dtype)
    return like.new_empty(rows, width), x.new_empty(rows, rank, dtype=h_type)


def _under_autocast(device: str) -> Callable[..., Any]:
    """x, W and b in autocast's type, as the base has it already; what trains the stages cast, where it is safe."""

    def run(x: Tensor, given: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Any:
        key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
        dtype = torch.get_autocast_dtype(device)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.nolora.update(cast[0], given, cast[1], cast[2], *rest)

    return run


_library = torch.library.Library("nolora", "FRAGMENT")
_library.impl("update", _under_autocast("cpu"), "AutocastCPU")
_library.impl("update", _under_autocast("cuda"), "AutocastCUDA")


# ---------------------------------------------------------------------------------------------------------- backward


@torch.library.custom_op("nolora::update_backward", mutates_args=())
def update_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    operands: Sequence[Tensor],
    branches: str,
    stages: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of x and of each operand, in this order."""
    kept = Input((x,), None, x.shape, x.dtype)
    leaves = [t.detach().requires_grad_(asked) for t, asked in zip(operands, wanted[1:], strict=True)]
    with _autograd_inside_an_operator(), torch.no_grad():
        found = autograd.by_hand(kept, (h,), weight, _branches(branches, leaves), dy, wanted, _stages(stages))
    return [_own(t) for t in found if t is not None]


def _own(t: Tensor) -> Tensor:
    """Contiguous, and no view of another: what a graph expects of an operator's results."""
    alone = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
    return t if alone else t.clone(memory_format=torch.contiguous_format)


def _autograd_inside_an_operator() -> Any:
    """An operator's body runs below autograd; the rank space's derivative is taken by it all the same."""
    below = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        below = below.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), below)


@update_backward.register_fake
def _(dy: Any, x: Any, h: Any, weight: Any, operands: Any, branches: str, stages: str, wanted: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, asked in zip([x, *operands], wanted, strict=True)
        if asked
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, given, weight, _, operands, ctx.branches, ctx.stages = inputs
    ctx.save_for_backward(x, output[1], weight, *operands)
    ctx.mark_non_differentiable(output[1])
    ctx.given = None if given is None else given.shape


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, h, weight, *operands = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0], *needed[4]]
    found = iter(
        torch.ops.nolora.update_backward(dy, x, h, weight, operands, ctx.branches, ctx.stages, wanted)
        if any(wanted)
        else ()
    )
    gradients = [next(found) if asked else None for asked in wanted]
    d_given = dy.view(ctx.given) if needed[1] else None
    return gradients[0], d_given, None, None, gradients[1:], None, None


update.register_autograd(_backward, setup_context=_setup)
