"""The math of one adapter, no modules, no timm; `low_rank_delta` is the one door."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nolora_vision.config import did_you_mean
from nolora_vision.kernels import eager
from nolora_vision.kernels.eager import FORMULAS, LowRank

__all__ = ["BACKENDS", "FORMULAS", "LowRank", "low_rank_delta", "select_backend"]

BACKENDS: dict[str, Callable[[Tensor, Tensor, Sequence[LowRank]], Tensor]] = {"eager": eager.low_rank_delta}


def select_backend(backend: str) -> tuple[str, str]:
    """The backend that `low_rank_delta` will run for this request, and why.

    Raises:
        ValueError: if no backend has this name.
    """
    if backend == "auto":
        return "eager", "the only backend so far"
    if backend not in BACKENDS:
        known = ("auto", *BACKENDS)
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}.{did_you_mean(backend, known)}")
    return backend, "asked for"


def low_rank_delta(x: Tensor, base: Tensor, branches: Sequence[LowRank], *, backend: str = "auto") -> Tensor:
    """base + Σ_k s_k B_k (v_k ⊙ f_k(A_k x)) for x: (..., D) and base: (..., E); the result is a new tensor like base.

    Args:
        x: the frozen layer's input.
        base: the frozen layer's output.
        branches: one `LowRank` for the whole layer, or one for each adapted part of a fused one.
        backend: `auto`, or one of `BACKENDS`; see `select_backend`.
    """
    return BACKENDS[select_backend(backend)[0]](x, base, branches)
