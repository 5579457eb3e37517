"""f and its derivatives by hand, for the formulas where that costs less than autograd's own graph in the rank space.

Each entry takes h: (..., R) and θ and gives f_θ(h) with a function that pulls a gradient g of f back to h and to each
part of θ, before the sum over the leading dimensions. A formula without an entry is differentiated by autograd; one
that is changed in `eager.py` has to be changed here, or taken out here: tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Pull = Callable[[Tensor], tuple[Tensor, ...]]


def identity(h: Tensor) -> tuple[Tensor, Pull]:
    """f = h."""
    return h, lambda g: (g,)


def tanh(h: Tensor) -> tuple[Tensor, Pull]:
    """f' = 1 − f²."""
    f = torch.tanh(h)
    return f, lambda g: (torch.ops.aten.tanh_backward(g, f),)


def relu(h: Tensor) -> tuple[Tensor, Pull]:
    """f' = [h > 0]."""
    return F.relu(h), lambda g: (g * (h > 0),)


def gelu(h: Tensor) -> tuple[Tensor, Pull]:
    """f' = Φ(h) + h φ(h)."""
    return F.gelu(h), lambda g: (torch.ops.aten.gelu_backward(g, h),)


def silu(h: Tensor) -> tuple[Tensor, Pull]:
    """f' = σ (1 + h (1 − σ)), σ = σ(h)."""
    return F.silu(h), lambda g: (torch.ops.aten.silu_backward(g, h),)


def swish(h: Tensor, beta: Tensor) -> tuple[Tensor, Pull]:
    """With t = tanh(β h / 2) and k = h (1 − t²) / 2: ∂f/∂h = 1 + t + β k and ∂f/∂β = h k."""
    t = torch.tanh(0.5 * beta * h)

    def pull(g: Tensor) -> tuple[Tensor, Tensor]:
        gk = torch.ops.aten.tanh_backward(g * h, t).mul_(0.5)
        return torch.addcmul(g, g, t).addcmul_(gk, beta), gk * h

    return torch.addcmul(h, h, t), pull


def residual_tanh(h: Tensor, mix: Tensor, slope: Tensor) -> tuple[Tensor, Pull]:
    """With t = tanh(b h): ∂f/∂h = 1 + a (b (1 − t²) − 1), ∂f/∂a = t − h, ∂f/∂b = a h (1 − t²)."""
    t = torch.tanh(slope * h)
    bend = t - h

    def pull(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ga = torch.ops.aten.tanh_backward(g, t) * mix
        return torch.addcmul(g - g * mix, ga, slope), g * bend, ga * h

    return torch.addcmul(h, mix, bend), pull


def rational(h: Tensor, linear: Tensor, square: Tensor, pole: Tensor) -> tuple[Tensor, Pull]:
    """With d = 1 + t² h² and f = h n / d: ∂f/∂p = h² / d, ∂f/∂q = h³ / d, ∂f/∂t = −2 t h³ n / d²."""
    squared, steep = h * h, pole * pole
    inverse = 1 / (1 + steep * squared)
    ratio = (1 + linear * h + square * squared) * inverse

    def pull(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gi = g * inverse
        slope = linear + 2 * h * (square - steep * ratio)
        cube = gi * squared * h
        return g * ratio + gi * h * slope, gi * squared, cube, -2 * pole * cube * ratio

    return h * ratio, pull


DERIVATIVES: dict[str, Callable[..., tuple[Tensor, Pull]]] = {
    "identity": identity,
    "tanh": tanh,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
    "swish": swish,
    "residual_tanh": residual_tanh,
    "rational": rational,
}
