"""Parameters that FSDP has split over the processes: whole to be saved, split to be loaded; others are as they are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any of its parameters is split."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of it; each process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the other one is split."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
