"""f and its derivatives by hand, for the formulas where that costs less than autograd's own graph in the rank space.

A formula without an entry is computed and differentiated as it stands in `eager.py`. One that is changed there has to
be changed here, or taken out here: tests compare the two, values bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nolora_vision.kernels import eager


class ByHand(NamedTuple):
    """A formula as the node computes it, for h: (..., R) and the parts of θ."""

    bend: Callable[..., Tensor | None]
    """(h, *θ) → what is costly in f, the tanh as a rule: (..., R), kept for the backward pass; None if nothing is."""
    value: Callable[..., Tensor]
    """(h, bend, *θ) → f_θ(h), the definition's own bits."""
    pull: Callable[..., tuple[Tensor, ...]]
    """(g, h, bend, *θ) → the gradient g of f pulled back to h, and to each part of θ before the sum over rows."""


def _as_defined(function: Callable[..., Tensor], pull: Callable[..., tuple[Tensor, ...]]) -> ByHand:
    """The definition with a derivative by hand, nothing kept between the two."""
    return ByHand(lambda h, *theta: None, lambda h, _, *theta: function(h, *theta), pull)


def _tanh_pull(g: Tensor, h: Tensor, t: Tensor) -> tuple[Tensor]:
    """f' = 1 − f²."""
    return (torch.ops.aten.tanh_backward(g, t),)


def _relu_pull(g: Tensor, h: Tensor, _: None) -> tuple[Tensor]:
    """f' = [h > 0]."""
    return (g * (h > 0),)


def _gelu_pull(g: Tensor, h: Tensor, _: None) -> tuple[Tensor]:
    """f' = Φ(h) + h φ(h)."""
    return (torch.ops.aten.gelu_backward(g, h),)


def _silu_pull(g: Tensor, h: Tensor, _: None) -> tuple[Tensor]:
    """f' = σ (1 + h (1 − σ)), σ = σ(h)."""
    return (torch.ops.aten.silu_backward(g, h),)


def _swish_pull(g: Tensor, h: Tensor, t: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """With t = tanh(β h / 2) and k = h (1 − t²) / 2: ∂f/∂h = 1 + t + β k and ∂f/∂β = h k."""
    gk = torch.ops.aten.tanh_backward(g * h, t).mul_(0.5)
    return torch.addcmul(g, g, t).addcmul_(gk, beta), gk * h


def _residual_tanh_pull(g: Tensor, h: Tensor, t: Tensor, mix: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With t = tanh(b h): ∂f/∂h = 1 + a (b (1 − t²) − 1), ∂f/∂a = t − h, ∂f/∂b = a h (1 − t²)."""
    ga = torch.ops.aten.tanh_backward(g, t) * mix
    return torch.addcmul(g - g * mix, ga, slope), g * (t - h), ga * h


def _rational_pull(
    g: Tensor, h: Tensor, _: None, linear: Tensor, square: Tensor, pole: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With d = 1 + t² h² and f = h n / d: ∂f/∂p = h² / d, ∂f/∂q = h³ / d, ∂f/∂t = −2 t h³ n / d²."""
    squared, steep = h * h, pole * pole
    inverse = 1 / (1 + steep * squared)
    ratio = (1 + linear * h + square * squared) * inverse
    gi = g * inverse
    slope = linear + 2 * h * (square - steep * ratio)
    cube = gi * squared * h
    return g * ratio + gi * h * slope, gi * squared, cube, -2 * pole * cube * ratio


BY_HAND: dict[str, ByHand] = {
    "identity": _as_defined(eager.identity, lambda g, h, _: (g,)),
    "tanh": ByHand(eager.tanh, lambda h, t: t, _tanh_pull),
    "relu": _as_defined(eager.relu, _relu_pull),
    "gelu": _as_defined(eager.gelu, _gelu_pull),
    "silu": _as_defined(eager.silu, _silu_pull),
    "swish": ByHand(
        lambda h, beta: torch.tanh(0.5 * beta * h),
        lambda h, t, beta: h * (1 + t),
        _swish_pull,
    ),
    "residual_tanh": ByHand(
        lambda h, mix, slope: torch.tanh(slope * h),
        lambda h, t, mix, slope: h + mix * (t - h),
        _residual_tanh_pull,
    ),
    "rational": _as_defined(eager.rational, _rational_pull),
}
