"""The math of one adapter, no modules, no timm; `low_rank_delta` is the one door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from nolora_vision.config import did_you_mean
from nolora_vision.kernels import autograd, eager
from nolora_vision.kernels.eager import FORMULAS, Frozen, LowRank

__all__ = ["BACKENDS", "FORMULAS", "Frozen", "LowRank", "low_rank_delta", "select_backend", "use_backend"]

BACKENDS: dict[str, Callable[[Tensor, Tensor | Frozen, Sequence[LowRank]], Tensor]] = {
    "eager": eager.low_rank_delta,
    "autograd": autograd.low_rank_delta,
}
_chosen = ["auto"]


def select_backend(backend: str) -> tuple[str, str]:
    """The backend that `low_rank_delta` will run for this request, and why.

    Raises:
        ValueError: if no backend has this name.
    """
    if backend == "auto":
        return "eager", "the definition; autograd is chosen by name until its figures are in the README"
    if backend not in BACKENDS:
        known = ("auto", *BACKENDS)
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}.{did_you_mean(backend, known)}")
    return backend, "asked for"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside the block adapters compute by this backend.

    Raises:
        ValueError: if no backend has this name.
    """
    select_backend(backend)
    before = _chosen[0]
    _chosen[0] = backend
    try:
        yield
    finally:
        _chosen[0] = before


def low_rank_delta(
    x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank], *, backend: str | None = None
) -> Tensor:
    """base + Σ_k s_k B_k (v_k ⊙ f_k(A_k x)) for x: (..., D) and base: (..., E); the result is a new tensor like base.

    Args:
        x: the frozen layer's input.
        base: the frozen layer's output, or the layer itself as `Frozen(W, b)`, which saves a pass.
        branches: one `LowRank` for the whole layer, or one for each adapted part of a fused one.
        backend: `auto`, or one of `BACKENDS`; see `select_backend`. None takes that of `use_backend`, or auto.
    """
    return BACKENDS[select_backend(backend or _chosen[0])[0]](x, base, branches)
