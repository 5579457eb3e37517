"""The matrix products of the node, each by the library and in the orientation that measures fastest.

Shapes: `M` rows, `D` in_features, `E` out_features, `R` rank.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ONEDNN_FROM = 500_000
"""Numbers in the large factor of a thin product from which oneDNN's cost of a call is outweighed."""


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which costs some microseconds even where there is nothing to do; a node has ten of them."""
    return t if t.dtype == dtype else t.to(dtype)


def exact(dtype: torch.dtype) -> torch.dtype:
    """fp32, or the type itself if it is as wide; as `torch.promote_types`, which asks PyTorch's dispatcher."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W for dy: (M, E), W: (E, D) → a fresh (M, D).

    PyTorch sends fp32 products on a processor to MKL, which on AMD's is slower than oneDNN. Measured on 2 cores of an
    EPYC (Zen 4), M = 1576, the three layers of ViT-B, medians of 9, oneDNN / MKL: dy W 0.91 to 0.97, dy B 0.45 to 0.74,
    zᵀ dy 0.23 to 0.41. Other processors were not measured, and keep PyTorch's choice.
    """
    return _onednn(dy, weight.t()) if _by_onednn(dy) else dy @ weight


def thin(dy: Tensor, up: Tensor) -> Tensor:
    """dy B for dy: (M, E), B: (E, R) → (M, R); in fp32 on a processor from a B laid out anew, which is read faster."""
    if dy.dtype != torch.float32 or dy.device.type != "cpu":
        return dy @ up
    laid_out = up.t().contiguous()
    return _onednn(dy, laid_out) if _is_large(dy) and _by_onednn(dy) else F.linear(dy, laid_out)


def thin_transposed(z: Tensor, dy: Tensor) -> Tensor:
    """zᵀ dy for z: (M, R), dy: (M, E) → (R, E).

    This way round, and not as dyᵀ z: (E, R): the same numbers, 2.7 to 3.9 times as fast by MKL for R = 8, measured as
    above. By oneDNN only for a large dy: for ViT-Ti's 1576 × 192 it takes 1.2 to 1.6 times MKL's time.
    """
    return _onednn(z.t().contiguous(), dy.t()) if _is_large(dy) and _by_onednn(dy) else z.t() @ dy


def up_gradient(z: Tensor, dy: Tensor) -> Tensor:
    """dyᵀ z for z: (M, R), dy: (M, E) → (E, R); where it costs nothing laid out like B, whose gradient it becomes."""
    return thin_transposed(z, dy).t() if dy.device.type == "cpu" else dy.t() @ z


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _is_large(x: Tensor) -> bool:
    return x.numel() >= ONEDNN_FROM


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and _onednn_is_faster()


def _onednn_is_faster() -> bool:
    return torch.backends.mkldnn.enabled and _amd_with_onednn()


@lru_cache(maxsize=1)
def _amd_with_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
