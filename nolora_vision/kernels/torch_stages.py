"""The three stages of the node in PyTorch: x to the rank space, dy through it, and its gradients to A and x.

Shapes: `M` rows, `D` in_features, `E` out_features, `R` rank of all branches together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nolora_vision.kernels.eager import (
    LowRank,
    all_rank_spaces,
    operands_of,
    small_operands,
    stacked_down,
    with_operands,
)
from nolora_vision.kernels.products import affine, thin_transposed


def rank_features(
    x: Tensor, branches: Sequence[LowRank], dtype: torch.dtype, rows_per_sample: int
) -> tuple[Tensor, Tensor]:
    """h = A x: (M, R) and z = s v ⊙ f(h): (M, R) in `dtype`, for x: (M, D) of that type.

    Args:
        rows_per_sample: rows that share a v, where v is one per sample.
    """
    h = affine(x, stacked_down(branches, dtype))
    return h, _rank_space(h, branches, rows_per_sample).to(dtype)


def rank_gradients(
    dy: Tensor, h: Tensor, branches: Sequence[LowRank], up: Tensor, rows_per_sample: int, *, trains: bool = True
) -> tuple[Tensor, Tensor | None, list[list[Tensor | None]]]:
    """dh: (M, R), dB: (E, R) if the adapter trains, and those of v, G, c and θ of each branch, None where they don't.

    The rank space is small: it is computed again by the definition, so that there is one formula for each f.

    Args:
        dy: (M, E).
        up: B: (E, R), stacked, in dy's type.
    """
    dz = affine(dy, up.t().contiguous())
    with torch.enable_grad():
        leaf = h.detach().requires_grad_(True)
        inner = [_detached(branch) for branch in branches]
        z = _rank_space(leaf, inner, rows_per_sample)
    small = [[t if t.requires_grad else None for t in small_operands(branch)] for branch in inner]
    training = [t for ts in small for t in ts if t is not None]
    dh, *found = torch.autograd.grad(z, [leaf, *training], dz.to(z.dtype), allow_unused=True)
    source = iter(found)
    d_small = [[None if t is None else next(source) for t in ts] for ts in small]
    return dh, thin_transposed(z.detach().to(dy.dtype), dy).t() if trains else None, d_small


def down_gradient(x: Tensor, dh: Tensor) -> Tensor:
    """dA = dhᵀ x: (R, D) for x: (M, D) and dh: (M, R)."""
    return thin_transposed(dh.to(x.dtype), x)


def add_input_gradient(dx: Tensor, dh: Tensor, down: Tensor) -> Tensor:
    """dx + dh A for dx: (M, D), dh: (M, R), A: (R, D), written into dx."""
    return dx.addmm_(dh.to(dx.dtype), down)


def _rank_space(h: Tensor, branches: Sequence[LowRank], rows_per_sample: int) -> Tensor:
    """s v ⊙ f(h): (M, R) → (M, R); h is divided into samples where v is per sample."""
    if not any(branch.v is not None and branch.v.ndim > 1 for branch in branches):
        return all_rank_spaces(h, branches)
    samples = h.view(len(h) // max(rows_per_sample, 1), rows_per_sample, h.shape[1])
    return all_rank_spaces(samples, branches).reshape(h.shape)


def _detached(branch: LowRank) -> LowRank:
    """Leaves of a graph of their own, which require gradients where the originals do."""
    return with_operands(branch, iter([t.detach().requires_grad_(t.requires_grad) for t in operands_of(branch)]))
