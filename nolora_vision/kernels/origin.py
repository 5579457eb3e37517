"""Where a layer's input comes from: what to make it of again in the backward pass, instead of keeping it.

A norm keeps its input for its own gradient, a GELU too; the adapter's x is a function of that, so it needs no memory of
its own. The autograd graph above x says which function (and which views and casts lie between), and its nodes hand out
what they keep. What is not in the tables below is kept as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Make = Callable[[Iterator[Tensor]], Tensor]
"""Takes the tensors that it needs from an iterator, in the order in which they were listed."""


class Origin(NamedTuple):
    """How to make x again."""

    tensors: tuple[Tensor, ...]
    """What other nodes keep anyway."""
    make: Make
    is_layer_norm: bool
    """x is w ⊙ (u − μ) ρ + b of `tensors` = (u, μ, ρ, w, b), cast at most; over the last axis, and u in fp32."""

    def x(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """x again, connected to `tensors` if gradients are enabled."""
        return self.make(iter(tensors)).to(dtype)


def origin_of(x: Tensor) -> Origin | None:
    """The origin of x, or None if x has to be kept. For use where gradients are enabled."""
    if x.grad_fn is None:
        return None
    tensors: list[Tensor] = []
    try:
        make = _recipe(x.grad_fn, x.shape, tensors)
    except _Unknown:
        return None
    if any(t.device != x.device for t in tensors):  # the cast between was a transfer
        return None
    return Origin(tuple(tensors), make, _is_layer_norm(x.grad_fn))


def _is_layer_norm(node: Any) -> bool:
    if node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    if node.name() != "NativeLayerNormBackward0":
        return False
    return len(node._saved_normalized_shape) == 1 and node._saved_input.dtype == torch.float32


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
        before, move = _MOVES[name](node, shape)
        inner = _recipe(node.next_functions[0][0], before, tensors)
        return lambda source: move(inner(source))
    raise _Unknown


def _kept(node: Any, attribute: str) -> Tensor:
    """A tensor that a node keeps; not if a hook holds it, as checkpointing's or offloading's: unpacking costs there."""
    saved = getattr(node, f"_raw_saved_{attribute}", None)
    if saved is None or saved.unpack_hook is not None:
        raise _Unknown
    tensor = getattr(node, f"_saved_{attribute}")
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

Move = tuple[Sequence[int], Callable[[Tensor], Tensor]]
"""The shape before, and what was done."""


def _same(node: Any, shape: Sequence[int]) -> Move:
    return shape, lambda t: t


def _reshape(node: Any, shape: Sequence[int]) -> Move:
    return node._saved_self_sym_sizes, lambda t: t.reshape(shape)


def _transpose(node: Any, shape: Sequence[int]) -> Move:
    a, b = (_axis(dim, len(shape)) for dim in (node._saved_dim0, node._saved_dim1))
    before = list(shape)
    before[a], before[b] = before[b], before[a]
    return before, lambda t: t.transpose(a, b)


def _permute(node: Any, shape: Sequence[int]) -> Move:
    dims = [_axis(dim, len(shape)) for dim in node._saved_dims]
    before = [0] * len(dims)
    for size, dim in zip(shape, dims, strict=True):
        before[dim] = size
    return before, lambda t: t.permute(dims)


def _roll(node: Any, shape: Sequence[int]) -> Move:
    shifts = [shift - 2**64 if shift >= 2**63 else shift for shift in node._saved_shifts]
    dims = [_axis(dim, len(shape)) for dim in node._saved_dims]
    return shape, lambda t: t.roll(shifts, dims)


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
