"""The three stages of the node in PyTorch: x to the rank space, dy through it, and its gradients to A and x.

Shapes: `M` rows, `D` in_features, `E` out_features, `R` rank of all branches together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.kernels.derivatives import DERIVATIVES
from nolora_vision.kernels.eager import (
    LowRank,
    all_rank_spaces,
    operands_of,
    rank_space,
    small_operands,
    with_operands,
)
from nolora_vision.kernels.products import cast, thin, thin_transposed, up_gradient


def rank_features(
    x: Tensor, down: Tensor, branches: Sequence[LowRank], dtype: torch.dtype, rows_per_sample: int
) -> tuple[Tensor, Tensor]:
    """h = A x: (M, R) and z = s v ⊙ f(h): (M, R) in `dtype`, for x: (M, D) of that type.

    Args:
        down: A: (R, D), stacked, in x's type.
        rows_per_sample: rows that share a v, where v is one per sample.
    """
    h = F.linear(x, down)  # the definition's own product: the forward pass has its bits
    return h, h if passes_through(branches) else _rank_space(h, branches, rows_per_sample).to(dtype)


def rank_gradients(
    dy: Tensor, h: Tensor, branches: Sequence[LowRank], up: Tensor, rows_per_sample: int, *, trains: bool = True
) -> tuple[Tensor, Tensor | None, list[list[Tensor | None]]]:
    """dh: (M, R), dB: (E, R) if the adapter trains, and those of v, G, c and θ of each branch, None where they don't.

    The rank space is small: it is computed again rather than kept.

    Args:
        dy: (M, E).
        up: B: (E, R), stacked, in dy's type.
    """
    dz = thin(dy, up)
    if passes_through(branches):
        z, dh, small = h, dz, [[] for _ in branches]
    else:
        z, dh, small = _through(h, branches, dz, rows_per_sample)
    return dh, up_gradient(cast(z, dy.dtype), dy) if trains else None, small


def passes_through(branches: Sequence[LowRank]) -> bool:
    """Whether z is h: the numbers then need no detour through fp32, which would give them back as they were."""
    return all(b.nonlinearity == "identity" and b.v is b.gate is None and b.scale == 1 for b in branches)


def _through(
    h: Tensor, branches: Sequence[LowRank], dz: Tensor, rows_per_sample: int
) -> tuple[Tensor, Tensor, list[list[Tensor | None]]]:
    """z: (M, R), dh: (M, R) and the small gradients of each branch, in at least fp32."""
    at_least = torch.promote_types(h.dtype, torch.float32)
    if len(branches) == 1 and not _per_sample(branches):
        z, dh, found = _back(branches[0])(cast(h, at_least), branches[0], cast(dz, at_least))
        return z, dh, [found]
    ranks = [branch.down.shape[0] for branch in branches]
    samples = (len(h),)
    if _per_sample(branches):
        samples = (len(h) // max(rows_per_sample, 1), rows_per_sample)
    parts, d_parts, small = [], [], []
    for branch, part, d_part in zip(branches, h.split(ranks, 1), dz.split(ranks, 1), strict=True):
        shape = (*samples, part.shape[1])
        z, dh, found = _back(branch)(part.to(at_least).reshape(shape), branch, d_part.to(at_least).reshape(shape))
        parts.append(z.reshape(part.shape))
        d_parts.append(dh.reshape(part.shape))
        small.append(found)
    z, dh = (both[0] if len(both) == 1 else torch.cat(both, 1) for both in (parts, d_parts))
    return z, dh, small


def _back(branch: LowRank) -> Callable[[Tensor, LowRank, Tensor], tuple[Tensor, Tensor, list[Tensor | None]]]:
    return _by_hand if branch.nonlinearity in DERIVATIVES else _by_autograd


def _by_hand(h: Tensor, branch: LowRank, dz: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """z, dh and the small gradients, for z = s v ⊙ f ⊙ (1 + t) with t = tanh(G h + c), all (..., R)."""
    theta = [cast(part, h.dtype) for part in branch.theta]
    f, pull = DERIVATIVES[branch.nonlinearity](h, *theta)
    small: list[Tensor | None] = []
    g, z = (dz, f) if branch.scale == 1 else (dz * branch.scale, f * branch.scale)
    v = None if branch.v is None else cast(branch.v, h.dtype)
    gate = t = None
    if branch.gate is not None:
        gate = cast(branch.gate[0], h.dtype)
        t = torch.tanh(F.linear(h, gate, cast(branch.gate[1], h.dtype)))
        z = torch.addcmul(z, z, t)
    if v is not None:
        small.append(_summed(dz * z, v) if branch.v is not None and branch.v.requires_grad else None)
        g, z = g * v, z * v
    df = g if t is None else torch.addcmul(g, g, t)
    dh, *d_theta = pull(df)
    if gate is not None and t is not None:
        dt = torch.ops.aten.tanh_backward(g * f, t)
        flat = dt.reshape(-1, dt.shape[-1])
        trains = [part.requires_grad for part in branch.gate or ()]
        small += [flat.t() @ h.reshape(flat.shape), flat.sum(0)] if any(trains) else [None, None]
        dh = torch.addmm(dh.reshape(flat.shape), flat, gate).view(dh.shape)
    parts = zip(d_theta, branch.theta, strict=True)
    return z, dh, small + [_summed(d, part) if part.requires_grad else None for d, part in parts]


def _by_autograd(h: Tensor, branch: LowRank, dz: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same from the definition."""
    with torch.enable_grad():
        leaf = h.detach().requires_grad_(True)
        inner = with_operands(branch, iter([t.detach().requires_grad_(t.requires_grad) for t in operands_of(branch)]))
        z = rank_space(leaf, inner)
    small = small_operands(inner)
    dh, *found = torch.autograd.grad(z, [leaf, *(t for t in small if t.requires_grad)], dz, allow_unused=True)
    source = iter(found)
    return z.detach(), dh, [next(source) if t.requires_grad else None for t in small]


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


def _rank_space(h: Tensor, branches: Sequence[LowRank], rows_per_sample: int) -> Tensor:
    """s v ⊙ f(h): (M, R) → (M, R); h is divided into samples where v is per sample."""
    if not _per_sample(branches):
        return all_rank_spaces(h, branches)
    samples = h.view(len(h) // max(rows_per_sample, 1), rows_per_sample, h.shape[1])
    return all_rank_spaces(samples, branches).reshape(h.shape)


def _per_sample(branches: Sequence[LowRank]) -> bool:
    return any(branch.v is not None and branch.v.ndim > 1 for branch in branches)
