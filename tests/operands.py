"""Random operands of an adapter, for tests of the kernels."""

from __future__ import annotations

import torch

from nolora_vision.kernels import FORMULAS, LowRank


def make_branch(nonlinearity: str, modulation: str, *, d: int = 5, e: int = 6, r: int = 3) -> LowRank:
    """Random operands in fp64, all requiring gradients."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    theta = tuple(leaf(*make(r).shape) for make in FORMULAS[nonlinearity].theta.values())
    v = None if modulation == "none" else leaf(r)
    gate = (leaf(r, r), leaf(r)) if modulation == "gate" else None
    return LowRank(leaf(r, d), leaf(e, r), v, gate, nonlinearity, theta, scale=0.7)
