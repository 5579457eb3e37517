"""The definition: every nonlinearity and modulation in plain PyTorch.

    y = W x + b + s · B (v ⊙ f_θ(A x))

Shapes: `...` any leading dimensions (batch, tokens, windows), `D` in_features, `E` out_features, `R` rank.
f and the modulation run in at least fp32 on `(..., R)`; only the two thin products run in the base output's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision.kernels.products import cast, exact

# ---------------------------------------------------------------------------------------------- nonlinearities f_θ
# The node of autograd.py has those of derivatives.py by hand: change a formula in both, or take it out there.


def identity(h: Tensor) -> Tensor:
    """f(h) = h: LoRA (Hu et al., arXiv 2106.09685)."""
    return h


def tanh(h: Tensor) -> Tensor:
    """f(h) = tanh h; slope 1 at 0."""
    return torch.tanh(h)


def relu(h: Tensor) -> Tensor:
    """f(h) = max(h, 0); slopes 0 and 1 beside 0."""
    return F.relu(h)


def gelu(h: Tensor) -> Tensor:
    """f(h) = h Φ(h), exact; slope 1/2 at 0."""
    return F.gelu(h)


def silu(h: Tensor) -> Tensor:
    """f(h) = h σ(h); slope 1/2 at 0."""
    return F.silu(h)


def swish(h: Tensor, beta: Tensor) -> Tensor:
    """f(h) = h (1 + tanh(β h / 2)) = 2 h σ(β h), β: (R,); β = 0 is the identity, and the slope at 0 is always 1."""
    return h * (1 + torch.tanh(0.5 * beta * h))


def residual_tanh(h: Tensor, mix: Tensor, slope: Tensor) -> Tensor:
    """f(h) = h + a (tanh(b h) − h), a = `mix`: (R,), b = `slope`: (R,); a = 0 is the identity, a = 1 is tanh(b h)."""
    return h + mix * (torch.tanh(slope * h) - h)


def rational(h: Tensor, linear: Tensor, square: Tensor, pole: Tensor) -> Tensor:
    """f(h) = h (1 + p h + q h²) / (1 + (t h)²), p = `linear`, q = `square`, t = `pole`: (R,) each.

    A Padé function of order 3 / 2 that is 0 at 0 and has no pole for any θ. p = 0 and q = t² is the identity.
    """
    squared = h * h
    return h * ((1 + linear * h + square * squared) / (1 + pole * pole * squared))


SPLINE_INTERVALS = 5  # AuroRA's grid on [-1, 1]
SPLINE_ORDER = 3


def cubic_b_splines(h: Tensor) -> Tensor:
    """The 8 cubic B-splines of AuroRA's grid at h: (...) → (..., 8). Each is 0 outside four intervals of width 0.4."""
    width = 2 / SPLINE_INTERVALS
    count = SPLINE_INTERVALS + SPLINE_ORDER
    centres = (torch.arange(count, device=h.device, dtype=h.dtype) - (SPLINE_ORDER - 1) / 2) * width - 1
    distance = ((h.unsqueeze(-1) - centres) / width).abs()
    return (F.relu(2 - distance) ** 3 - 4 * F.relu(1 - distance) ** 3) / 6


def aurora(h: Tensor, mixer: Tensor, spline: Tensor) -> Tensor:
    """f(h) = tanh(H tanh h) + w · Σ_i φ(h_i), H = `mixer`: (R, R), w = `spline`: (R, 8), φ: 8 cubic B-splines.

    As published, so f(0) ≠ 0: the one exemption from the rule f(0) = 0. Source: AuroRA, arXiv 2505.18738.
    """
    return torch.tanh(torch.tanh(h) @ mixer.mT) + cubic_b_splines(h).sum(-2) @ spline.mT


class Formula(NamedTuple):
    """One nonlinearity: the function of h and θ, and how each part of θ is made for a rank."""

    function: Callable[..., Tensor]
    theta: Mapping[str, Callable[[int], Tensor]] = {}


def _zeros(rank: int) -> Tensor:
    return torch.zeros(rank)


def _ones(rank: int) -> Tensor:
    return torch.ones(rank)


def _xavier_normal(rank: int) -> Tensor:
    return nn.init.xavier_normal_(torch.empty(rank, rank))


def _spline_noise(rank: int) -> Tensor:
    return nn.init.uniform_(torch.empty(rank, SPLINE_INTERVALS + SPLINE_ORDER), -0.1, 0.1)


FORMULAS: dict[str, Formula] = {
    "identity": Formula(identity),
    "tanh": Formula(tanh),
    "relu": Formula(relu),
    "gelu": Formula(gelu),
    "silu": Formula(silu),
    "swish": Formula(swish, {"beta": _zeros}),
    "residual_tanh": Formula(residual_tanh, {"mix": _zeros, "slope": _ones}),
    "rational": Formula(rational, {"linear": _zeros, "square": _ones, "pole": _ones}),
    "aurora": Formula(aurora, {"mixer": _xavier_normal, "spline": _spline_noise}),
}


# ------------------------------------------------------------------------------------------------------ modulation


def modulate(z: Tensor, h: Tensor, v: Tensor | None, gate: tuple[Tensor, Tensor] | None) -> Tensor:
    """z ⊙ v ⊙ (1 + tanh(G h + c)), leaving out what is None.

    Args:
        z: f(h), `(..., R)`.
        h: A x, `(..., R)`.
        v: `(R,)` for the layer, or `(B, 1, R)` for each sample of the leading dimension B of h.
        gate: G `(R, R)` and c `(R,)`.
    """
    if v is not None:
        z = z * _per_sample(v, h)
    if gate is not None:
        weight, bias = gate
        z = z * (1 + torch.tanh(F.linear(h, weight, bias)))
    return z


def _per_sample(v: Tensor, h: Tensor) -> Tensor:
    """v as it broadcasts over h: `(B, 1, R)` gets as many ones as h has dimensions between batch and rank."""
    if v.ndim == 1:
        return v
    if v.ndim != 3 or v.shape[1] != 1 or v.shape[0] != h.shape[0] or h.ndim < 2:
        raise ValueError(
            f"v must have shape (R,) or (B, 1, R) with B the leading dimension of x: "
            f"got {tuple(v.shape)} for A x of shape {tuple(h.shape)}. Repeat v to one row per leading entry of x."
        )
    return v.reshape(v.shape[0], *[1] * (h.ndim - 2), v.shape[2])


# ------------------------------------------------------------------------------------------------------- the update


class LowRank(NamedTuple):
    """The operands of one low-rank update; every tensor may be of any floating dtype."""

    down: Tensor
    """A: (R, D)."""
    up: Tensor
    """B: (E', R), with E' the number of output features in `rows`."""
    v: Tensor | None = None
    """(R,), or (B, 1, R) per sample, or None for v = 1."""
    gate: tuple[Tensor, Tensor] | None = None
    """G: (R, R) and c: (R,), or None."""
    nonlinearity: str = "identity"
    theta: tuple[Tensor, ...] = ()
    """The parameters of f, in the order of its Formula."""
    scale: float = 1.0
    rows: tuple[tuple[int, int], ...] | None = None
    """The output features that the update reaches, as (start, stop) in ascending order; None means all."""


def small_operands(branch: LowRank) -> list[Tensor]:
    """v, G, c and θ as far as there are any, in this order."""
    return [*([] if branch.v is None else [branch.v]), *(branch.gate or ()), *branch.theta]


def operands_of(branch: LowRank) -> list[Tensor]:
    """A, B, then the small ones."""
    return [branch.down, branch.up, *small_operands(branch)]


def with_operands(branch: LowRank, operands: Iterator[Tensor]) -> LowRank:
    """The same branch on the next of these tensors, in the order of `operands_of`."""
    return branch._replace(
        down=next(operands),
        up=next(operands),
        v=None if branch.v is None else next(operands),
        gate=None if branch.gate is None else (next(operands), next(operands)),
        theta=tuple(next(operands) for _ in branch.theta),
    )


class Frozen(NamedTuple):
    """The frozen linear layer W x + b, where its output is still to be computed."""

    weight: Tensor
    """W: (E, D)."""
    bias: Tensor | None
    """b: (E,), or None."""


def rank_space(h: Tensor, branch: LowRank) -> Tensor:
    """s · v ⊙ f_θ(h): (..., R) → (..., R), in at least fp32."""
    h = cast(h, exact(h.dtype))
    theta = tuple(cast(part, h.dtype) for part in branch.theta)
    gate = None if branch.gate is None else (cast(branch.gate[0], h.dtype), cast(branch.gate[1], h.dtype))
    v = None if branch.v is None else cast(branch.v, h.dtype)
    z = modulate(FORMULAS[branch.nonlinearity].function(h, *theta), h, v, gate)
    return z if branch.scale == 1 else z * branch.scale


def low_rank_delta(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """base + Σ_k s_k B_k (v_k ⊙ f_k(A_k x)), in the cheap form: one product down, one `addmm` into a copy of base.

    Args:
        x: (..., D), the layer's input.
        base: (..., E), what the frozen layer made of x; not modified. Or the layer itself.
        branches: updates of this layer; their A are stacked, so that x is read once.

    Returns:
        A new tensor (..., E) in base's dtype.
    """
    if isinstance(base, Frozen):
        base = F.linear(x, base.weight, base.bias)  # under autocast, if it is on
    dtype = base.dtype
    with no_autocast(x.device.type):
        z = all_rank_spaces(F.linear(x.to(dtype), stacked_down(branches, dtype)), branches)
        up = stacked_up(branches, base.shape[-1], dtype)
        flat = torch.addmm(base.reshape(-1, base.shape[-1]), z.to(dtype).reshape(-1, z.shape[-1]), up.t())
    return flat.reshape(base.shape)


def stacked_down(branches: Sequence[LowRank], dtype: torch.dtype) -> Tensor:
    """The A of all branches below one another: (R, D)."""
    if len(branches) == 1:
        return cast(branches[0].down, dtype)
    return torch.cat([branch.down.to(dtype) for branch in branches])


def stacked_up(branches: Sequence[LowRank], out_features: int, dtype: torch.dtype) -> Tensor:
    """The B of all branches beside one another, 0 where one does not reach: (E, R)."""
    if len(branches) == 1:
        return _spread(cast(branches[0].up, dtype), branches[0].rows, out_features)
    return torch.cat([_spread(branch.up.to(dtype), branch.rows, out_features) for branch in branches], dim=1)


def all_rank_spaces(h: Tensor, branches: Sequence[LowRank]) -> Tensor:
    """`rank_space` of each branch on its part of h: (..., R) → (..., R)."""
    if len(branches) == 1:
        return rank_space(h, branches[0])
    parts = h.split([branch.down.shape[0] for branch in branches], dim=-1)
    return torch.cat([rank_space(part, branch) for part, branch in zip(parts, branches, strict=True)], dim=-1)


def _spread(up: Tensor, rows: tuple[tuple[int, int], ...] | None, out_features: int) -> Tensor:
    """B: (E', R) with zeros where the update does not reach: (E, R)."""
    if rows is None:
        return up
    pieces, end = [], 0
    for part, (start, stop) in zip(up.split([stop - start for start, stop in rows]), rows, strict=True):
        pieces += [up.new_zeros(start - end, up.shape[1]), part]
        end = stop
    return torch.cat([*pieces, up.new_zeros(out_features - end, up.shape[1])])


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this kind of device; the meta device has none, and asking would raise."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Turn autocast off where it is on: the dtypes here are chosen, and the gate must stay in fp32."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def kaiming_uniform_down(down: Tensor) -> Tensor:
    """Initialise A in place as LoRA does: kaiming-uniform with a = √5, that is U(−1/√D, 1/√D)."""
    return nn.init.kaiming_uniform_(down, a=math.sqrt(5))
