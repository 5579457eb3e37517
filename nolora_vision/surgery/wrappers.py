"""Models inside torch.compile and data-parallel wrappers: the bare model, and names as it spells them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

COMPILED = "_orig_mod"


def bare_model(model: nn.Module) -> Any:
    """The timm model inside `torch.compile`, DistributedDataParallel or DataParallel, however they are nested."""
    while True:
        if isinstance(getattr(model, COMPILED, None), nn.Module):
            model = getattr(model, COMPILED)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def bare_name(name: str) -> str:
    """A parameter's name without what compiled submodules put into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a bare model themselves (not detached), by their bare names."""
    return {bare_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
