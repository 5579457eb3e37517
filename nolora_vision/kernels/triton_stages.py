"""The stages of the node by Triton: rank features, rank gradients, input gradients, on plain tensors.

    K1: h = x Aᵀ,  z = s · v ⊙ f(h) ⊙ (1 + tanh(G h + c))
    K3: dz = dy B,  dB = dyᵀ z,  then dh, dv, dG, dc, dθ
    K4: dA = dhᵀ x,  dx += dh A

Shapes: `M` rows of all samples, `D` in_features, `E` out_features, `R` rank of all branches, `r` rank of each.
Large matrices are read by rows of any stride; where a row is not contiguous itself, the matrix is copied first.
Sums run in a fixed order, without atomics: the same input gives the same bits. Importing this file imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nolora_vision.kernels.eager import LowRank, small_operands
from nolora_vision.kernels.triton_kernels import features_kernel, input_kernel, rank_kernel, up_kernel
from nolora_vision.kernels.triton_stack import HIGHEST_RANK, Unsupported, stacked, supports

__all__ = [
    "Unsupported",
    "add_input_gradient",
    "down_gradient",
    "input_gradients",
    "rank_features",
    "rank_gradients",
    "supports",
]

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
HIGHEST_FUSED_RANK = 32
"""Up to here dB comes from the same read of dy. Its parts, one for 128 rows of bf16 or 64 of fp32, written and read,
are R / 32 of the bytes of dy: above 32 it is cheaper to read dy again."""
PROGRAMS = 264
"""That many programs K4 spreads over: two for each of an H100's 132 processors. Fixed, as it groups the sums of dA."""


class Blocks(NamedTuple):
    """How a kernel is cut: a program's tile, its warps, and how many tiles of its loop are on their way at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


BLOCKS = {
    ("features", 2): {16: (64, 64, 4, 4), 32: (64, 64, 4, 4), 64: (64, 64, 8, 3)},
    ("features", 4): {16: (32, 32, 4, 4), 32: (32, 32, 4, 4), 64: (16, 32, 8, 3)},
    ("up", 2): {16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (64, 64, 4, 3)},
    ("up", 4): {16: (64, 32, 8, 3), 32: (64, 32, 8, 3), 64: (32, 32, 8, 3)},
    ("rank", 2): {16: (32, 0, 4, 1), 32: (32, 0, 8, 1), 64: (16, 0, 8, 1)},
    ("rank", 4): {16: (32, 0, 4, 1), 32: (32, 0, 8, 1), 64: (16, 0, 8, 1)},
    ("input", 2): {16: (64, 128, 4, 3), 32: (64, 128, 4, 3), 64: (64, 64, 4, 3)},
    ("input", 4): {16: (32, 64, 8, 3), 32: (32, 64, 8, 3), 64: (32, 64, 8, 3)},
}
"""Rows, columns, warps and stages by kernel, bytes of the type that is multiplied, and padded rank. Chosen by what
`ptxas` reports for sm_90 over every f, modulation and type: at most 8 bytes of a thread's registers are spilled (368 by
aurora's gate at rank 64 in fp32), and two programs fit into shared memory. Not yet measured on a GPU."""


def blocks_for(kernel: str, dtype: torch.dtype, padded: int) -> Blocks:
    """The entry of BLOCKS for this kernel, compute type and padded rank.

    Raises:
        Unsupported: if there is none.
    """
    if dtype not in TYPES or padded > HIGHEST_RANK:
        raise Unsupported(f"Triton multiplies no {dtype} at rank {padded}: only {[*TYPES]} up to {HIGHEST_RANK}.")
    return Blocks(*BLOCKS[kernel, dtype.itemsize][padded])


def rank_features(
    x: Tensor, down: Tensor, branches: Sequence[LowRank], dtype: torch.dtype, rows_per_sample: int
) -> tuple[Tensor, Tensor]:
    """K1: h = x Aᵀ in fp32 and z = s · v ⊙ f(h) ⊙ (1 + tanh(G h + c)) in `dtype`, both (M, R), in one read of x.

    Args:
        x: (M, D); multiplied in `dtype`.
        down: A of all branches: (R, D), of any floating type.
        branches: the updates of one layer, stacked in this order.
        dtype: that of the layer's output.
        rows_per_sample: M / B where v is (B, 1, r); any positive number otherwise.

    Raises:
        Unsupported: if `supports` gives a reason.
    """
    stack, x = stacked(branches, x, dtype), _rows(x)
    h = x.new_empty(x.shape[0], stack.rank, dtype=torch.float32)
    z = torch.empty_like(h, dtype=dtype)
    blocks = blocks_for("features", dtype, stack.padded)
    arguments = stack.arguments(x.shape[0], rows_per_sample) | types_of(dtype)
    arguments |= {"x": x, "down": down.contiguous(), "h_out": h, "z_out": z, "D": x.shape[1], "x_stride": x.stride(0)}
    launch(features_kernel, (triton.cdiv(x.shape[0], blocks.rows),), blocks, arguments)
    return h, z


def rank_gradients(
    dy: Tensor, h: Tensor, branches: Sequence[LowRank], up: Tensor, rows_per_sample: int, *, trains: bool = True
) -> tuple[Tensor, Tensor | None, list[list[Tensor | None]]]:
    """K3: dh: (M, R) and dB: (E, R), both fp32, and the gradients of v, G, c and θ of each branch, in their types.

    One read of dy up to R = `HIGHEST_FUSED_RANK`; above, the kernel leaves z, and dB is a second product, dyᵀ z.

    Args:
        dy: (M, E); multiplied in its own type.
        h: (M, R), from `rank_features`.
        branches: the updates of one layer, stacked in this order.
        up: B of all branches: (E, R), 0 where a branch does not reach; of any floating type.
        rows_per_sample: M / B where v is (B, 1, r); any positive number otherwise.
        trains: otherwise only dh is made, and None stands for the rest.

    Raises:
        Unsupported: if `supports` gives a reason.
    """
    stack, dy, h, up = stacked(branches, dy, dy.dtype), _rows(dy), h.float().contiguous(), up.contiguous()
    (m, e), rank = dy.shape, stack.rank
    blocks, blocks_of_rank = (blocks_for(kernel, dy.dtype, stack.padded) for kernel in ("up", "rank"))
    parts, parts_of_rank = triton.cdiv(m, blocks.rows), triton.cdiv(m, blocks_of_rank.rows)
    fused = trains and stack.padded <= HIGHEST_FUSED_RANK
    dz, dh = torch.empty_like(h), torch.empty_like(h)
    d_up = h.new_empty(parts, e, rank) if fused else None
    z = torch.empty_like(h, dtype=dy.dtype) if trains and not fused else None
    d_v = torch.empty_like(h) if trains and stack.per_sample else None
    small = h.new_empty(parts_of_rank, sum(t.numel() for t in stack.summed))
    arguments = stack.arguments(m, rows_per_sample) | types_of(dy.dtype) | {"h_in": h}
    large = {"dy": dy, "up": up, "dz_out": dz, "d_up": d_up, "E": e, "dy_stride": dy.stride(0)}
    launch(up_kernel, (parts,), blocks, arguments | large)
    thin = {"dz": dz, "dh_out": dh, "z_out": z, "d_v": d_v, "small": small, "STRIDE": small.shape[1], "SMALL": trains}
    thin["EXACT"] = exact_in_rank_space(stack.padded, dy.dtype)
    launch(rank_kernel, (parts_of_rank,), blocks_of_rank, arguments | thin)
    if not trains:
        return dh, None, [[None] * len(small_operands(branch)) for branch in branches]
    whole_up = _total(d_up) if z is None else (dy.t() @ z).float()
    if d_v is not None and stack.v is not None:
        d_v = d_v.view(len(stack.v), rows_per_sample, rank).sum(1, keepdim=True)
    return dh, whole_up, stack.per_branch(small.sum(0), d_v)


def down_gradient(x: Tensor, dh: Tensor) -> Tensor:
    """The first half of K4: dA = dhᵀ x: (R, D) in fp32 for x: (M, D) and dh: (M, R), multiplied in x's type."""
    found, _ = input_gradients(x, dh, None, None)
    assert found is not None
    return found


def add_input_gradient(dx: Tensor, dh: Tensor, down: Tensor) -> Tensor:
    """The second half of K4: dx + dh A for dx: (M, D), dh: (M, R), A: (R, D), written into dx."""
    return input_gradients(None, dh, down, dx)[1]  # type: ignore[return-value]


def input_gradients(
    x: Tensor | None,
    dh: Tensor,
    down: Tensor | None,
    dx: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    accumulate: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """K4: dA = dhᵀ x: (R, D) in fp32 if x is given; dx += dh A in place if dx is given. One read of each.

    Args:
        x: (M, D), or None if dA is not wanted.
        dh: (M, R), from `rank_gradients`.
        down: A of all branches: (R, D), of any floating type; not needed without dx.
        dx: (M, D) with contiguous rows, holding dy W, or None if it is not wanted.
        dtype: the type that is multiplied; None takes that of dx, else of x.
        accumulate: whether dx holds something; otherwise it is written over.

    Returns:
        dA or None, and dx itself or None.

    Raises:
        ValueError: if the rows of dx are not contiguous, so that it could not be written in place.
    """
    given = dx if dx is not None else x
    if given is None:
        return None, None
    if dx is not None and dx.stride(1) != 1 and dx.shape[1] > 1:
        raise ValueError(f"dx must have contiguous rows to be added to in place, got strides {dx.stride()}.")
    x = None if x is None else _rows(x)
    (m, d), rank, dtype = given.shape, dh.shape[1], dtype or given.dtype
    padded = max(16, triton.next_power_of_2(rank))
    blocks = blocks_for("input", dtype, padded)
    across, along = triton.cdiv(d, blocks.columns), triton.cdiv(m, blocks.rows)
    groups = min(along, triton.cdiv(PROGRAMS, across))
    each = triton.cdiv(along, max(groups, 1))
    groups = triton.cdiv(along, max(each, 1))
    d_down = None if x is None else dh.new_empty(groups, rank, d, dtype=torch.float32)
    arguments = {
        "x": x, "dh": dh.contiguous(), "down": None if down is None else down.contiguous(), "dx": dx,
        "d_down": d_down, "M": m, "D": d,
        "x_stride": 0 if x is None else x.stride(0), "dx_stride": 0 if dx is None else dx.stride(0), "BLOCKS": each,
        "ACCUMULATE": accumulate, "RANK": rank, "PADDED": padded,
    }  # fmt: skip
    launch(input_kernel, (across, groups), blocks, arguments | types_of(dtype))
    return _total(d_down), dx


def types_of(dtype: torch.dtype) -> dict[str, Any]:
    """The type in which large tiles are multiplied; how fp32 ones are, there and in the rank space.

    fp32 in, fp32 products. Beside bf16 and fp16 those of the rank space may be sums of three tf32 products, near to
    fp32: exact ones do without tensor cores and, in large tiles, run out of registers.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets it as well
    return {
        "COMPUTE": TYPES[dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "EXACT": "ieee" if dtype == torch.float32 else "tf32x3",
        "INTERPRETED": not isinstance(features_kernel, triton.JITFunction),
    }


def exact_in_rank_space(padded: int, dtype: torch.dtype) -> str:
    """How a kernel multiplies that holds nothing but the rank space: exactly where its tiles are small."""
    return "ieee" if padded <= 32 or dtype == torch.float32 else "tf32x3"


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _total(parts: Tensor | None) -> Tensor | None:
    """The sum over the parts of all programs, in a fixed order."""
    return None if parts is None else parts[0] if parts.shape[0] == 1 else parts.sum(0)


def launch(kernel: Any, grid: tuple[int, ...], blocks: Blocks, known: dict[str, Any]) -> None:
    """Run the kernel once for each place of the grid, if there is any, on the GPU where its tensors are."""
    if all(grid):
        known = known | {"ROWS": blocks.rows, "COLUMNS": blocks.columns}
        arguments = [known[name] for name in kernel.arg_names]
        with _on(next(t for t in arguments if isinstance(t, Tensor))):
            kernel[grid](*arguments, num_warps=blocks.warps, num_stages=blocks.stages)


def _on(t: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
