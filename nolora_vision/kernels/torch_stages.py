"""The three stages of the node in PyTorch: x to the rank space, dy through it, and its gradients to A and x.

Shapes: `M` rows, `D` in_features, `E` out_features, `R` rank of all branches together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.kernels.derivatives import BY_HAND
from nolora_vision.kernels.eager import (
    LowRank,
    modulate,
    operands_of,
    rank_space,
    small_operands,
    with_operands,
)
from nolora_vision.kernels.products import cast, exact, thin, thin_transposed, up_gradient


def rank_features(
    x: Tensor, down: Tensor, branches: Sequence[LowRank], dtype: torch.dtype, rows_per_sample: int
) -> tuple[Tensor | None, ...]:
    """h = A x: (M, R), z = s v ⊙ f(h): (M, R) in `dtype`, for x: (M, D) of that type, then two for each branch.

    Those are of its rank, or None: the bend of f (`derivatives.py`) and the tanh of the gate. They cost more time to
    make again than h and z together, and are small beside x. There are none where z is h.

    Args:
        down: A: (R, D), stacked, in x's type.
        rows_per_sample: rows that share a v, where v is one per sample.
    """
    h = F.linear(x, down)  # the definition's own product: the forward pass has its bits
    if passes_through(branches):
        return h, h
    h = cast(h, exact(h.dtype))
    z, bends = _spaces(h, branches, rows_per_sample)
    return h, cast(z, dtype), *bends


def rank_gradients(
    dy: Tensor,
    h: Tensor,
    branches: Sequence[LowRank],
    up: Tensor,
    rows_per_sample: int,
    *kept: Tensor | None,
    trains: bool = True,
) -> tuple[Tensor, Tensor | None, list[list[Tensor | None]]]:
    """dh: (M, R), dB: (E, R) if the adapter trains, and those of v, G, c and θ of each branch, None where they don't.

    Args:
        dy: (M, E).
        up: B: (E, R), stacked, in dy's type.
        kept: what `rank_features` gave after h; made again of h if it is not there.
    """
    dz = thin(dy, up)
    if passes_through(branches):
        return dz, up_gradient(cast(h, dy.dtype), dy) if trains else None, [[] for _ in branches]
    h, dz = cast(h, exact(h.dtype)), cast(dz, exact(h.dtype))
    z, bends = (kept[0], kept[1:]) if kept else _spaces(h, branches, rows_per_sample)
    dh, small = _through(h, branches, dz, rows_per_sample, bends)
    return dh, up_gradient(cast(z, dy.dtype), dy) if trains and z is not None else None, small


def passes_through(branches: Sequence[LowRank]) -> bool:
    """Whether z is h: the numbers then need no detour through fp32, which would give them back as they were."""
    return all(b.nonlinearity == "identity" and b.v is b.gate is None and b.scale == 1 for b in branches)


def _spaces(h: Tensor, branches: Sequence[LowRank], rows_per_sample: int) -> tuple[Tensor, list[Tensor | None]]:
    """z: (M, R) for h: (M, R), both in at least fp32, and bend and tanh of each branch, one after another."""
    found = [_space(part, branch) for part, branch in zip(_parts(h, branches, rows_per_sample), branches, strict=True)]
    return _whole([z for z, *_ in found], h), [bend for _, *bends in found for bend in bends]


def _through(
    h: Tensor, branches: Sequence[LowRank], dz: Tensor, rows_per_sample: int, bends: Sequence[Tensor | None]
) -> tuple[Tensor, list[list[Tensor | None]]]:
    """dh: (M, R) for dz: (M, R), and the small gradients of each branch, in at least fp32."""
    parts, d_parts = _parts(h, branches, rows_per_sample), _parts(dz, branches, rows_per_sample)
    found = [
        (_by_hand if branch.nonlinearity in BY_HAND else _by_autograd)(part, branch, d_part, bend, gate)
        for part, branch, d_part, bend, gate in zip(parts, branches, d_parts, bends[::2], bends[1::2], strict=True)
    ]
    return _whole([dh for dh, _ in found], h), [small for _, small in found]


def _parts(h: Tensor, branches: Sequence[LowRank], rows_per_sample: int) -> Sequence[Tensor]:
    """(M, R) as each branch's (M, r), or (B, M / B, r) where v is per sample."""
    if any(branch.v is not None and branch.v.ndim > 1 for branch in branches):
        h = h.reshape(len(h) // max(rows_per_sample, 1), rows_per_sample, h.shape[1])
    return (h,) if len(branches) == 1 else h.split([branch.down.shape[0] for branch in branches], -1)


def _whole(parts: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of `_parts`."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).reshape(like.shape)


def _space(h: Tensor, branch: LowRank) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z = s v ⊙ f ⊙ (1 + t) with t = tanh(G h + c), the definition's bits; the bend of f; t."""
    if branch.nonlinearity not in BY_HAND:
        return rank_space(h, branch), None, None
    rule, theta, t = BY_HAND[branch.nonlinearity], [cast(part, h.dtype) for part in branch.theta], None
    bend = rule.bend(h, *theta)
    z = modulate(rule.value(h, bend, *theta), h, None if branch.v is None else cast(branch.v, h.dtype), None)
    if branch.gate is not None:
        t = torch.tanh(F.linear(h, *[cast(part, h.dtype) for part in branch.gate]))
        z = z * (1 + t)
    return z if branch.scale == 1 else z * branch.scale, bend, t


def _by_hand(
    h: Tensor, branch: LowRank, dz: Tensor, bend: Tensor | None, t: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """dh and the small gradients, for z, bend and t of `_space`, all (..., R)."""
    rule, theta = BY_HAND[branch.nonlinearity], [cast(part, h.dtype) for part in branch.theta]
    small: list[Tensor | None] = []
    g = dz if branch.scale == 1 else dz * branch.scale
    v_learns = branch.v is not None and branch.v.requires_grad
    f = rule.value(h, bend, *theta) if v_learns or t is not None else None
    if branch.v is not None:
        of_v = None
        if v_learns and f is not None:
            of_v = _summed(g * (f if t is None else torch.addcmul(f, f, t)), branch.v)
        small.append(of_v)
        g = g * cast(branch.v, h.dtype)
    dh, *d_theta = rule.pull(g if t is None else torch.addcmul(g, g, t), h, bend, *theta)
    if branch.gate is not None and t is not None and f is not None:
        dt = torch.ops.aten.tanh_backward(g * f, t)
        flat = dt.reshape(-1, dt.shape[-1])
        trains = any(part.requires_grad for part in branch.gate)
        small += [flat.t() @ h.reshape(flat.shape), flat.sum(0)] if trains else [None, None]
        dh = torch.addmm(dh.reshape(flat.shape), flat, cast(branch.gate[0], h.dtype)).view(dh.shape)
    parts = zip(d_theta, branch.theta, strict=True)
    return dh, small + [_summed(d, part) if part.requires_grad else None for d, part in parts]


def _by_autograd(h: Tensor, branch: LowRank, dz: Tensor, *_: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """The same from the definition."""
    with torch.enable_grad():
        leaf = h.detach().requires_grad_(True)
        inner = with_operands(branch, iter([t.detach().requires_grad_(t.requires_grad) for t in operands_of(branch)]))
        z = rank_space(leaf, inner)
    small = small_operands(inner)
    dh, *found = torch.autograd.grad(z, [leaf, *(t for t in small if t.requires_grad)], dz, allow_unused=True)
    source = iter(found)
    return dh, [next(source) if t.requires_grad else None for t in small]


def _summed(d: Tensor, like: Tensor) -> Tensor:
    """The gradient of what was broadcast: summed over rows, or over the rows of each sample for (B, 1, R)."""
    if like.ndim == 1:
        return d.reshape(-1, d.shape[-1]).sum(0)
    return d.flatten(1, -2).sum(1, keepdim=True)


def down_gradient(x: Tensor, dh: Tensor) -> Tensor:
    """dA = dhᵀ x: (R, D) for x: (M, D) and dh: (M, R)."""
    return thin_transposed(cast(dh, x.dtype), x)


def add_input_gradient(dx: Tensor, dh: Tensor, down: Tensor) -> Tensor:
    """dx + dh A for dx: (M, D), dh: (M, R), A: (R, D), written into dx."""
    return dx.addmm_(cast(dh, dx.dtype), down)
