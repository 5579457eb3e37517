"""Which of them computes an update: eager, autograd, custom_op, Triton's; chosen by name or by what measured faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from nolora_vision.config import did_you_mean
from nolora_vision.kernels import autograd, eager
from nolora_vision.kernels.eager import Frozen, LowRank

TRITON_IS_FASTER: Mapping[str, str] = {}
"""The backend of Triton by the GPU, as `torch.cuda.get_device_name()` calls it, on which a whole step of
`python -m nolora_vision.benchmark.speed` is faster with it than with the node. Empty: `triton` was measured on an H100
and was slower there, `triton_rank` was not measured."""

_chosen = ["auto"]


class TritonUnavailable(RuntimeError):
    """backend="triton" was asked for and can't run here."""


def _eager(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    return eager.low_rank_delta(x, base, branches)


def _autograd(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """The compiler gets the definition, of which it makes kernels of its own.

    A compiled step on 2 cores of an EPYC, swish + gate, by `benchmark.speed --modes compiled compiled_op`: ViT-Ti in
    bf16 209 ms that way and 246 with the operator; ViT-B in fp32 3.72 s and 3.41.
    """
    return (eager if torch.compiler.is_compiling() else autograd).low_rank_delta(x, base, branches)


def _custom_op(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """An exported graph has the definition, so that it needs nothing from here."""
    from nolora_vision.kernels import custom_op  # registering takes longer than the rest of this package's import

    return (eager if _is_exporting() else custom_op).low_rank_delta(x, base, branches)


def _triton(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """The node with its stages by Triton, as an operator where a compiler looks on.

    Raises:
        TritonUnavailable: if Triton is missing, or can't compute this update.
    """
    if _is_exporting():
        return eager.low_rank_delta(x, base, branches)
    if torch.compiler.is_compiling():
        from nolora_vision.kernels import custom_op

        return custom_op.low_rank_delta(x, base, branches, "triton")
    if reason := _why_not_triton(x, base, branches):
        raise TritonUnavailable(f'backend="triton" cannot run: {reason}. Use backend="auto" to do without.')
    return autograd.low_rank_delta(x, base, branches, stages=_triton_stages()[0])


def _triton_rank(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> Tensor:
    """The node with f and modulation by Triton; the compiler gets the definition, of which it makes such a kernel.

    Raises:
        TritonUnavailable: if Triton is missing, or can't compute this update.
    """
    if torch.compiler.is_compiling():
        return eager.low_rank_delta(x, base, branches)
    if autograd.torch_stages.passes_through(branches):  # nothing is between the products
        return autograd.low_rank_delta(x, base, branches)
    if reason := _why_not_triton(x, base, branches):
        raise TritonUnavailable(f'backend="triton_rank" cannot run: {reason}. Use backend="auto" to do without.')
    from nolora_vision.kernels import triton_rank

    return autograd.low_rank_delta(x, base, branches, stages=triton_rank)


def _is_exporting() -> bool:
    return torch.compiler.is_compiling() and torch.compiler.is_exporting()


BACKENDS: dict[str, Callable[[Tensor, Tensor | Frozen, Sequence[LowRank]], Tensor]] = {
    "eager": _eager,
    "autograd": _autograd,
    "custom_op": _custom_op,
    "triton": _triton,
    "triton_rank": _triton_rank,
}


@lru_cache(maxsize=1)
def _triton_stages() -> tuple[ModuleType, str]:
    """The stages, or PyTorch's and why Triton's are not to be had."""
    try:
        from nolora_vision.kernels import triton_stages
    except Exception as error:  # triton may be absent, broken, or of another version
        reason = f"importing triton failed ({type(error).__name__}: {error}); pip install 'nolora-vision[triton]'"
        return autograd.torch_stages, reason
    return triton_stages, ""


def _why_not_triton(x: Tensor, base: Tensor | Frozen, branches: Sequence[LowRank]) -> str | None:
    stages, reason = _triton_stages()
    if reason:
        return reason
    dtype = autograd.product_type(x) if isinstance(base, Frozen) else base.dtype
    return stages.supports(branches, x, dtype)


def select_backend(backend: str, device: torch.device | None = None) -> tuple[str, str]:
    """The backend that `low_rank_delta` will run for this request, and why.

    Args:
        device: where it will run; None for a processor.

    Raises:
        ValueError: if no backend has this name.
    """
    if backend not in ("auto", *BACKENDS):
        known = ("auto", *BACKENDS)
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}.{did_you_mean(backend, known)}")
    if backend != "auto":
        return backend, "asked for"
    if TRITON_IS_FASTER and device is not None and device.type == "cuda":
        faster = TRITON_IS_FASTER.get(torch.cuda.get_device_name(device))
        reason = _triton_stages()[1] if faster else ""
        if faster and not reason:
            return faster, "measured faster on this GPU"
        if reason:
            _warn_once(f"Adapters run without Triton, though it is faster on this GPU: {reason}.")
    return "autograd", "one node of the graph: fewer passes and less memory than the definition"


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside the block adapters compute by this backend: auto, eager, autograd, custom_op, triton or triton_rank.

    It holds for all threads of the process, so blocks of several threads must not overlap.

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
        base: the frozen layer's output, or the layer itself as `Frozen(W, b)`, which saves a pass; if W or b asks for
            a gradient it gets one, without that saving.
        branches: one `LowRank` for the whole layer, or one for each adapted part of a fused one.
        backend: `auto`, or one of `BACKENDS`; see `select_backend`. None takes that of `use_backend`, or auto.
    """
    if x.device.type == "meta" and not torch.is_grad_enabled():  # milliseconds for each operation, all to give a shape
        return F.linear(x, *base) if isinstance(base, Frozen) else torch.empty_like(base)
    if isinstance(base, Frozen) and (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)):
        base = F.linear(x, *base)  # not frozen: autograd has to see it
    asked = backend or _chosen[0]
    name = select_backend(asked, x.device)[0]
    if name.startswith("triton") and asked == "auto" and (reason := _why_not_triton(x, base, branches)):
        _warn_once(f"Some adapters run without Triton: {reason}.")
        name = "autograd"
    return BACKENDS[name](x, base, branches)
