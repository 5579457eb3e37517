"""Noise on v in training, `v_b = v ⊙ (1 + σ ε_b)`, one draw for each image; and how a layer knows whose its rows are.

A layer need not see images one by one: Swin's see windows, the image's one after the other. How many images there are
only the whole model's input says, so a model with noise has two hooks that tell its layers for the time of a forward.
Shapes: `B` images, `L` leading dimension of a layer's input (B, or B × windows), `R` rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_batch = threading.local()
"""`images`: (B, 0), for the batch in the model now; absent or None without one. A tensor and no number, so that a
compiler takes its length for one that may change. Each thread has its own, as DataParallel runs its replicas in
threads; no subclass, as PyTorch 2.14's compiler does not see what is set on one."""


def noisy(v: Tensor | None, x: Tensor, rank: int, sigma: float, rows_per_image: int) -> Tensor:
    """v ⊙ (1 + σ ε) with ε ~ N(0, 1) for each image and rank: (L, 1, R), or (R,) for one vector x.

    Args:
        v: (R,), or None for v = 1.
        x: (L, ..., D), the layer's input; the rows of an image follow one another.
        rows_per_image: L / B.
    """
    rows = x.shape[0] if x.ndim > 1 else 1
    dtype = torch.float32 if v is None else torch.promote_types(v.dtype, torch.float32)
    noise = torch.randn(rows // rows_per_image, 1, rank, device=x.device, dtype=dtype)
    factor = (1 + sigma * noise).expand(-1, rows_per_image, -1).reshape(rows, 1, rank)
    factor = factor if x.ndim > 1 else factor[0, 0]
    return factor if v is None else v * factor


def rows_per_image(x: Tensor) -> int | None:
    """How many entries of x's leading dimension belong to one image; 1 if B does not divide it, None if B is unknown.

    B is known while a model with noise computes. It is unknown to layers that are called on their own, and in the
    backward pass, where gradient checkpointing calls them again.
    """
    batch = _images()
    if batch is None:
        return None
    rows, images = x.shape[0], batch.shape[0]
    return rows // images if images and rows and rows % images == 0 else 1


@contextmanager
def batch_of(images: int) -> Iterator[None]:
    """Inside the block layers see the rows of so many images."""
    before = _images()
    _batch.images = torch.empty(images, 0)
    try:
        yield
    finally:
        _batch.images = before


def follow_batch(model: nn.Module, wanted: bool) -> None:
    """Put the hooks on a bare model, or take them off; whichever is so already stays."""
    hooks = ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave))
    own = [(table, key) for table, hook in hooks for key, found in table.items() if found is hook]
    if wanted and not own:
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)
    elif not wanted:
        for table, key in own:
            del table[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if model.training:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        _batch.images = None if first is None else first.new_empty(first.shape[0], 0)


def _leave(_model: nn.Module, _args: Any, _output: Any) -> None:
    if _images() is not None:
        _batch.images = None


def _images() -> Tensor | None:
    return getattr(_batch, "images", None)
