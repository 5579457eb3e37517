"""The branches of a layer as one rank space for Triton, or why they can't be; imports no triton.

Shapes: `B` samples, `M` rows of all samples, `R` rank of all branches, `r` rank of each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nolora_vision.kernels.eager import LowRank, small_operands

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("identity", "tanh", "relu", "gelu", "silu", "swish", "residual_tanh", "rational", "aurora")
HIGHEST_RANK = 64
"""Of all branches. At 128 the products with the gate's (R, R) matrix spill kilobytes of each thread's registers."""


class Unsupported(NotImplementedError):
    """Triton's stages don't compute such an update; the message says why. The definition in `eager` does."""


def supports(branches: Sequence[LowRank], x: Tensor, dtype: torch.dtype) -> str | None:
    """Why Triton can't compute this update, or None if it can. Looks at shapes, types and names only.

    Args:
        branches: the updates of one layer.
        x: the layer's input, or the gradient of its output.
        dtype: that of the layer's output.
    """
    if len(branches) > 1 and (mixed := _differing(branches)):
        return f"the branches of one layer differ in {' and '.join(mixed)}"
    if x.dtype not in DTYPES or dtype not in DTYPES:
        return f"x of {x.dtype} and an output of {dtype}; it takes float32, bfloat16 and float16"
    if (rank := sum(branch.down.shape[0] for branch in branches)) > HIGHEST_RANK:
        return f"rank {rank} of all branches together is above {HIGHEST_RANK}"
    if branches[0].nonlinearity not in NAMES:
        return f"no formula for the nonlinearity {branches[0].nonlinearity!r}"
    return unfit_device(x)


def _differing(branches: Sequence[LowRank]) -> list[str]:
    same = {
        "nonlinearity": {branch.nonlinearity for branch in branches},
        "rank": {branch.down.shape[0] for branch in branches},
        "scale": {branch.scale for branch in branches},
        "modulation": {(None if branch.v is None else branch.v.ndim, branch.gate is None) for branch in branches},
    }
    return [name for name, values in same.items() if len(values) > 1]


def unfit_device(x: Tensor) -> str | None:
    """Why Triton can't run where x is, or None if it can."""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if x.device.type != "cuda":
        return f"x is on the device {x.device.type}, not on a GPU"
    if torch.version.hip is not None:
        return "the GPU is AMD's, for which Triton has no sums of three tf32 products"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


class Stack(NamedTuple):
    """The rank spaces of all branches as one: their vectors end to end, their matrices below one another."""

    branches: Sequence[LowRank]
    v: Tensor | None
    """(R,) or (B, 1, R)."""
    gate: Tensor | None
    """G: (R, r)."""
    bias: Tensor | None
    """c: (R,)."""
    theta: tuple[Tensor, ...]
    """(R,) each; for aurora (R, r) and (R, 8)."""

    @property
    def rank(self) -> int:
        """R."""
        return sum(branch.down.shape[0] for branch in self.branches)

    @property
    def padded(self) -> int:
        """The power of two ≥ 16 that R is padded to: the least that `tl.dot` multiplies."""
        return max(16, 1 << (self.rank - 1).bit_length())

    @property
    def per_sample(self) -> bool:
        """Whether each sample has a v of its own."""
        return self.v is not None and self.v.ndim == 3

    @property
    def summed(self) -> list[Tensor]:
        """The operands whose gradients are sums over all rows, in the order in which the kernel stores them."""
        every = [None if self.per_sample else self.v, self.gate, self.bias, *self.theta]
        return [t for t in every if t is not None]

    def arguments(self, rows: int, rows_per_sample: int) -> dict[str, Any]:
        """What the kernels are told of the rank space.

        Raises:
            ValueError: if v has a row for each sample and the samples don't make up all rows.
        """
        if self.v is not None and self.per_sample and self.v.shape[0] * rows_per_sample != rows:
            raise ValueError(f"v is for {self.v.shape[0]} samples of {rows_per_sample} rows, x has {rows} rows.")
        first, second, third = (*self.theta, None, None, None)[:3]
        return {
            "v": self.v, "gate": self.gate, "bias": self.bias, "first": first, "second": second, "third": third,
            "M": rows, "rows_per_sample": rows_per_sample, "scale": float(self.branches[0].scale),
            "NAME": self.branches[0].nonlinearity, "PER_SAMPLE": self.per_sample,
            "RANK": self.rank, "BRANCH": self.branches[0].down.shape[0], "PADDED": self.padded,
        }  # fmt: skip

    def per_branch(self, flat: Tensor, d_v: Tensor | None) -> list[list[Tensor | None]]:
        """The gradients of v, G, c and θ of each branch, from those of all in one row, and dv of each sample."""
        whole = [
            part.view(t.shape)
            for part, t in zip(flat.split([t.numel() for t in self.summed]), self.summed, strict=True)
        ]
        found: list[list[Tensor | None]] = []
        for k, branch in enumerate(self.branches):
            r = branch.down.shape[0]
            parts = whole if len(self.branches) == 1 else [t[k * r : (k + 1) * r] for t in whole]
            if d_v is not None:
                parts.insert(0, d_v[..., k * r : (k + 1) * r])
            found.append([part.to(t.dtype) for part, t in zip(parts, small_operands(branch), strict=True)])
        return found


def stacked(branches: Sequence[LowRank], x: Tensor, dtype: torch.dtype) -> Stack:
    """The branches as one rank space.

    Raises:
        Unsupported: if `supports` gives a reason.
    """
    if reason := supports(branches, x, dtype):
        raise Unsupported(f"Triton can't compute this update: {reason}. Use the backend 'autograd' or 'eager'.")
    gates = [branch.gate for branch in branches if branch.gate is not None]
    return Stack(
        branches,
        joined([branch.v for branch in branches if branch.v is not None], -1),
        joined([weight for weight, _ in gates]),
        joined([bias for _, bias in gates]),
        tuple(t for parts in zip(*(b.theta for b in branches), strict=True) if (t := joined(parts)) is not None),
    )


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """The parts as one contiguous tensor, without a copy if there is but one; None if there is none."""
    if len(parts) < 2:
        return parts[0].contiguous() if parts else None
    return torch.cat(list(parts), dim)
