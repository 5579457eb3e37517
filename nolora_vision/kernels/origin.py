"""Where a layer's input comes from: what to make it of again in the backward pass, instead of keeping it.

A norm keeps its input for its own gradient, a GELU too; the adapter's x is a function of that, so it needs no memory of
its own. The autograd graph above x says which function (and which views and casts lie between), and its nodes hand out
what they keep. What is not in the tables below is kept as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.kernels.products import cast

Rows = Callable[[Tensor], Tensor]
Make = Callable[[Iterator[Tensor]], Tensor]
"""Takes the tensors that it needs from an iterator, in the order in which they were listed."""


class Origin(NamedTuple):
    """How to make x again."""

    tensors: tuple[Tensor, ...]
    """What other nodes keep anyway."""
    make: Make
    rows_of_norm: Rows | None
    """Given if x is w ⊙ (u − μ) ρ + b of `tensors` = (u, μ, ρ, w, b), over the last axis, μ and ρ at least in fp32, its
    rows moved at most: takes a tensor that has x's rows, (..., R), to one that has u's."""

    def x(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """x again, connected to `tensors` if gradients are enabled."""
        return cast(self.make(iter(tensors)), dtype)


class Input(NamedTuple):
    """The layer's input as the node knows it in the backward pass: kept, or to be made again."""

    tensors: Sequence[Tensor]
    """x, or what its origin needs."""
    origin: Origin | None
    shape: torch.Size
    dtype: torch.dtype

    def x(self) -> Tensor:
        """x: (..., D)."""
        return self.tensors[0] if self.origin is None else self.origin.x(self.tensors, self.dtype)

    def down_gradient(self, dh: Tensor, dtype: torch.dtype, stages: ModuleType) -> Tensor:
        """dA = dhᵀ x: (R, D) for dh: (M, R).

        x is not made again if it is w ⊙ (u − μ) ρ + b, the output of a LayerNorm: with g = ρ dh,
        dA = w ⊙ (gᵀ u − gᵀ μ) + (dhᵀ 1) b. Where x has u's rows in another order (windows, shifts), dh is put into
        theirs: it is D / R times smaller than x.
        """
        if self.origin is None or self.origin.rows_of_norm is None:
            return stages.down_gradient(cast(self.x(), dtype).reshape(-1, self.shape[-1]), dh)
        dh = self.origin.rows_of_norm(dh.reshape(*self.shape[:-1], dh.shape[-1])).reshape(dh.shape)
        u, mean, rstd, weight, bias = self.tensors
        u, mean, rstd = cast(u, mean.dtype).reshape(-1, self.shape[-1]), mean.reshape(-1, 1), rstd.reshape(-1, 1)
        dh = cast(dh, mean.dtype)  # at least fp32, as what follows subtracts sums from each other
        g = dh * rstd
        centred = stages.down_gradient(u, g) - g.t() @ mean
        return torch.addcmul(torch.outer(dh.sum(0), cast(bias, dh.dtype)), centred, cast(weight, dh.dtype))


def origin_of(x: Tensor) -> Origin | None:
    """The origin of x, or None if x has to be kept. For use where gradients are enabled.

    An x that was written into since it was made, which its node knows nothing of, has to be. What was written into
    before a copy (`roll`, `contiguous`) made x of it cannot be told: write into a copy, or where gradients are enabled.
    """
    if x.grad_fn is None or x._version:
        return None
    tensors: list[Tensor] = []
    try:
        make = _recipe(x.grad_fn, x.shape, tensors)
    except _Unknown:
        return None
    if any(t.device != x.device for t in tensors):  # the cast between was a transfer
        return None
    return Origin(tuple(tensors), make, _rows_of_norm(x.grad_fn, x.shape))


def _rows_of_norm(node: Any, shape: Sequence[int]) -> Rows | None:
    """Undoes what lies between a layer norm and x, if that is views, casts and moves of whole rows."""
    steps: list[Rows] = []
    while node.name() in _MOVES:
        before, _, back = _MOVES[node.name()](node, shape)
        if back is None or before[-1] != shape[-1]:
            return None
        steps.append(back)
        node, shape = node.next_functions[0][0], before
    if node.name() != "NativeLayerNormBackward0":
        return None
    if len(node._saved_normalized_shape) != 1 or node._saved_result1.dtype.itemsize < 4:
        return None
    return lambda t: reduce(lambda rows, step: step(rows), steps, t)


class _Unknown(Exception):
    """No recipe; x is kept."""


def _recipe(node: Any, shape: Sequence[int], tensors: list[Tensor]) -> Make:
    """The function that makes the output, of this shape, of a graph node; what it needs is appended to `tensors`."""
    if node is None:
        raise _Unknown
    name = node.name()
    if name in _KEEPS:
        attributes, function = _KEEPS[name]
        tensors += [_kept(node, attribute) for attribute in attributes]
        return lambda source: function(node, *(next(source) for _ in attributes))
    if name in _MOVES:
        before, move, _ = _MOVES[name](node, shape)
        inner = _recipe(node.next_functions[0][0], before, tensors)
        return lambda source: move(inner(source))
    raise _Unknown


def _kept(node: Any, attribute: str) -> Tensor:
    """A tensor that a node keeps; not if a hook holds it, as checkpointing's or offloading's: unpacking costs there."""
    try:
        saved = getattr(node, f"_raw_saved_{attribute}", None)
        if saved is None or saved.unpack_hook is not None:
            raise _Unknown
        tensor = getattr(node, f"_saved_{attribute}")
    except RuntimeError as error:  # a backward pass through it has been, and has freed what it kept
        raise _Unknown from error
    if tensor is None:
        raise _Unknown
    return tensor


# ------------------------------------------------------------------------------------- functions that keep their input


def _layer_norm(node: Any, u: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """w ⊙ (u − μ) ρ + b in at least fp32; for a second derivative μ and ρ are functions of u again."""
    axes, rounded = tuple(range(-weight.ndim, 0)), mean.dtype.itemsize < 4  # on a processor, of a bf16 norm
    every = (u, mean, rstd, weight, bias)
    u, mean, rstd, weight, bias = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in every)
    if torch.is_grad_enabled() or rounded:
        mean = u.mean(axes, keepdim=True)
    if torch.is_grad_enabled():
        variance = u.var(axes, unbiased=False, keepdim=True)
        rstd = (variance + (rstd.pow(-2) - variance).detach()).rsqrt()
    return torch.addcmul(bias, (u - mean) * rstd, weight)


_KEEPS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "NativeLayerNormBackward0": (("input", "result1", "result2", "weight", "bias"), _layer_norm),
    "GeluBackward0": (("self",), lambda node, h: F.gelu(h, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node, h: F.silu(h)),
    "HardswishBackward0": (("self",), lambda node, h: F.hardswish(h)),
    "MulBackward0": (("self", "other"), lambda node, a, b: a * b),
}
"""Node → what it keeps that its output is a function of, and that function."""


# ---------------------------------------------------------------------------------------- views, copies, casts between

Move = tuple[Sequence[int], Rows, Rows | None]
"""The shape before, what was done, and what undoes it on a tensor of another width; None if it splits rows."""


def _same(node: Any, shape: Sequence[int]) -> Move:
    return shape, lambda t: t, lambda t: t


def _reshape(node: Any, shape: Sequence[int]) -> Move:
    before = node._saved_self_sym_sizes
    return before, lambda t: t.reshape(shape), lambda t: t.reshape(*before[:-1], t.shape[-1])


def _transpose(node: Any, shape: Sequence[int]) -> Move:
    a, b = (_axis(dim, len(shape)) for dim in (node._saved_dim0, node._saved_dim1))
    before = list(shape)
    before[a], before[b] = before[b], before[a]
    whole = len(shape) - 1 not in (a, b)
    return before, lambda t: t.transpose(a, b), (lambda t: t.transpose(a, b)) if whole else None


def _permute(node: Any, shape: Sequence[int]) -> Move:
    dims = [_axis(dim, len(shape)) for dim in node._saved_dims]
    before, inverse = [0] * len(dims), [0] * len(dims)
    for i, (size, dim) in enumerate(zip(shape, dims, strict=True)):
        before[dim], inverse[dim] = size, i
    whole = dims[-1] == len(dims) - 1
    return before, lambda t: t.permute(dims), (lambda t: t.permute(inverse)) if whole else None


def _roll(node: Any, shape: Sequence[int]) -> Move:
    shifts = [shift - 2**64 if shift >= 2**63 else shift for shift in node._saved_shifts]
    dims = [_axis(dim, len(shape)) for dim in node._saved_dims]
    back = [-shift for shift in shifts]
    whole = bool(dims) and len(shape) - 1 not in dims  # without dims it rolls everything as one row
    return shape, lambda t: t.roll(shifts, dims), (lambda t: t.roll(back, dims)) if whole else None


def _empty_pad(node: Any, shape: Sequence[int]) -> Move:
    """Swin pads by nothing where the windows fit; a real padding has a value that the node does not tell."""
    if any(node._saved_pad):
        raise _Unknown
    return _same(node, shape)


def _axis(dim: int, ndim: int) -> int:
    """Nodes give negative numbers as unsigned ones of 64 bits."""
    return (dim - 2**64 if dim >= 2**63 else dim) % ndim


_MOVES: dict[str, Callable[[Any, Sequence[int]], Move]] = {
    "ToCopyBackward0": _same,  # a cast: the last one gives x its type, and one inside would have been rounded there
    "CloneBackward0": _same,
    "ViewBackward0": _reshape,
    "UnsafeViewBackward0": _reshape,
    "ReshapeAliasBackward0": _reshape,
    "TransposeBackward0": _transpose,
    "PermuteBackward0": _permute,
    "RollBackward0": _roll,
    "ConstantPadNdBackward0": _empty_pad,
}
