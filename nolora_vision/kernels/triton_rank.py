"""The stages of the node with the rank space alone by Triton: one launch forward, one backward and its sum.

The thin products stay with PyTorch's libraries. On (M, R) numbers f, v and the gate run for microseconds, but are some
forty operations of PyTorch, and Python takes longer to launch each than a GPU to run it: that bound the steps that were
measured on an H100 (benchmarks/README.md). Shapes as in `triton_stages.py`. Importing this file imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.kernels.eager import LowRank, small_operands
from nolora_vision.kernels.products import cast, thin, up_gradient
from nolora_vision.kernels.torch_stages import add_input_gradient, down_gradient
from nolora_vision.kernels.triton_kernels import rank_kernel, space_kernel
from nolora_vision.kernels.triton_stack import Stack, stacked, supports
from nolora_vision.kernels.triton_stages import blocks_for, exact_in_rank_space, launch, types_of

__all__ = ["add_input_gradient", "down_gradient", "rank_features", "rank_gradients", "supports"]


def rank_features(
    x: Tensor, down: Tensor, branches: Sequence[LowRank], dtype: torch.dtype, rows_per_sample: int
) -> tuple[Tensor, Tensor]:
    """h = x Aᵀ and z = s · v ⊙ f(h) ⊙ (1 + tanh(G h + c)), both (M, R) in `dtype`.

    Args:
        x: (M, D) of that type.
        down: A of all branches: (R, D) of that type.
        branches: the updates of one layer, stacked in this order.
        rows_per_sample: M / B where v is (B, 1, r); any positive number otherwise.

    Raises:
        Unsupported: if `supports` gives a reason.
    """
    stack = stacked(branches, x, dtype)
    h = F.linear(x, down)
    z = torch.empty_like(h)
    _launch(space_kernel, stack, h, rows_per_sample, {"z_out": z})
    return h, z


def rank_gradients(
    dy: Tensor, h: Tensor, branches: Sequence[LowRank], up: Tensor, rows_per_sample: int, *, trains: bool = True
) -> tuple[Tensor, Tensor | None, list[list[Tensor | None]]]:
    """dh: (M, R) and dB: (E, R) in dy's type, and the gradients of v, G, c and θ of each branch, in their types.

    Args:
        dy: (M, E).
        h: (M, R), from `rank_features`.
        branches: the updates of one layer, stacked in this order.
        up: B of all branches: (E, R), in dy's type.
        rows_per_sample: M / B where v is (B, 1, r); any positive number otherwise.
        trains: otherwise only dh is made, and None stands for the rest.

    Raises:
        Unsupported: if `supports` gives a reason.
    """
    stack = stacked(branches, dy, dy.dtype)
    dz, h = thin(dy, up), cast(h, dy.dtype).contiguous()
    dh, z = torch.empty_like(dz), torch.empty_like(dz) if trains else None
    d_v = h.new_empty(h.shape, dtype=torch.float32) if trains and stack.per_sample else None
    parts = triton.cdiv(h.shape[0], blocks_for("rank", dy.dtype, stack.padded).rows)
    small = h.new_empty(parts, sum(t.numel() for t in stack.summed), dtype=torch.float32)
    outputs = {"dz": dz, "dh_out": dh, "z_out": z, "d_v": d_v, "small": small}
    _launch(rank_kernel, stack, h, rows_per_sample, outputs | {"STRIDE": small.shape[1], "SMALL": trains})
    if z is None:
        return dh, None, [[None] * len(small_operands(branch)) for branch in branches]
    if d_v is not None and stack.v is not None:
        d_v = d_v.view(len(stack.v), rows_per_sample, stack.rank).sum(1, keepdim=True)
    return dh, up_gradient(z, dy), stack.per_branch(small.sum(0), d_v)


def _launch(kernel: Any, stack: Stack, h: Tensor, rows_per_sample: int, more: dict[str, Any]) -> None:
    blocks = blocks_for("rank", h.dtype, stack.padded)
    known = stack.arguments(h.shape[0], rows_per_sample) | types_of(h.dtype) | {"h_in": h} | more
    known["EXACT"] = exact_in_rank_space(stack.padded, h.dtype)
    launch(kernel, (triton.cdiv(h.shape[0], blocks.rows),), blocks, known)
