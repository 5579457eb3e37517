"""The timm model that an adapter's config names: tried out without memory first, then built with its weights."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nolora_vision.adapters.adapter_files import (
    AdapterMismatchError,
    AdapterNotFoundError,
    CheckpointError,
    CorruptAdapterError,
)
from nolora_vision.adapters.backbone_weights import create_model, weights_of_file
from nolora_vision.adapters.card import full_name
from nolora_vision.adapters.checkpoint import apply_adapter
from nolora_vision.adapters.hub_trouble import advice_for, reason_of
from nolora_vision.adapters.model_kwargs import plain_kwargs
from nolora_vision.surgery.wrappers import bare_state

NEEDS_VALUES = re.compile(r"item\(\) cannot be called on meta|Cannot copy out of meta tensor")
"""What many models of timm 1.0.20 say on the meta device: they are tried out in memory instead."""
MOST_TENSORS = 5_000
"""Parameters of a model, as objects; mvitv2_huge_cls, the deepest of timm 1.0.31, has 1,853."""
ROOM = 2**27
"""Weights (0.5 GB in fp32) that arguments may add to an architecture: position embeddings of larger images."""


def build_backbone(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str, weights: Path | None = None
) -> nn.Module:
    """The timm model that an adapter's config names, for the adapter's tensors to be put onto.

    Whether they fit is found out on the meta device first, where a model takes no memory; only then are the backbone's
    weights downloaded. They are not where the adapter holds every weight itself.

    Args:
        weights: a safetensors file to take the backbone's weights from instead of timm's.

    Raises:
        CheckpointError: if timm does not have it, or cannot load its weights, or the adapter does not fit.
    """
    import timm

    kwargs = plain_kwargs(config["model_kwargs"], source)
    if not timm.is_model(config["architecture"]):
        raise AdapterMismatchError(
            f"{source} is for architecture {config['architecture'][:100]!r}, which timm {timm.__version__} does not "
            f"have. Upgrade timm, or pass the backbone: from_pretrained(..., model=...)."
        )
    whole = _try_on(config, kwargs, state, source)
    name = full_name(config)
    if not whole and weights is None and config["metadata"].get("pretrained") is False:
        raise AdapterMismatchError(
            f"{source} was trained on a frozen backbone of random weights, which no file holds. Pass that very model: "
            f"from_pretrained(..., model=...)."
        )
    if weights is not None:
        kwargs["pretrained_cfg_overlay"] = weights_of_file(weights)
    try:
        return create_model(name, pretrained=not whole, num_classes=config["num_classes"], **kwargs)
    except Exception as error:  # clients raise many kinds for a failed download
        reason = reason_of(error)
        if "loading state_dict" in reason:
            raise AdapterMismatchError(
                f"timm's weights of {name} do not fit the model that {source} describes, {dict(kwargs)} ({reason}). "
                f"Pass the backbone: from_pretrained(..., model=...)."
            ) from error
        raise AdapterNotFoundError(
            f"{source} is sound, but the weights of its backbone {name} could not be loaded ({reason}). "
            f"{advice_for(error)} And if timm has no such weights, pass the backbone with your own: "
            f"from_pretrained(..., model=...)."
        ) from error


def _try_on(config: Mapping[str, Any], kwargs: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> bool:
    """Put the adapter onto a model without memory; whether it brings every weight of it."""
    name, classes = full_name(config), config["num_classes"]
    model = _untrained(name, classes, kwargs, source)
    own = bare_state(model)
    size, room = _size(model), ROOM + sum(t.numel() for t in state.values())
    if size > room and size > room + (usual := _size(_untrained(name, None, {}, source))):
        raise CorruptAdapterError(
            f"{source} describes a model of {size:,} numbers, with {dict(kwargs)} and {classes} classes, where {name} "
            f"has {usual:,}. If that is right, build it yourself: from_pretrained(..., model=timm.create_model(...))."
        )
    apply_adapter(model, config, state, source=source)
    return own.keys() <= state.keys()


def _untrained(
    name: str, num_classes: int | None, kwargs: Mapping[str, Any], source: str, device: str = "meta"
) -> nn.Module:
    import timm

    try:
        with torch.device(device), _few_tensors():
            return timm.create_model(name, num_classes=num_classes, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:  # whatever timm's models do with senseless arguments
        if device == "meta" and NEEDS_VALUES.search(str(error)):
            return _untrained(name, num_classes, kwargs, source, device="cpu")
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        if "Invalid pretrained tag" in reason:
            raise AdapterMismatchError(
                f"{source} is for {name}, and timm {timm.__version__} does not know these weights ({reason}). Upgrade "
                f"timm, or pass the backbone: from_pretrained(..., model=...)."
            ) from error
        raise CorruptAdapterError(
            f"{source}: timm {timm.__version__} cannot build {name} with num_classes={num_classes}, {dict(kwargs)} "
            f"({reason})."
        ) from error


def _size(model: nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


@contextmanager
def _few_tensors() -> Iterator[None]:
    """Stop this thread's building of a model that has no end (depth = 65,536 takes minutes even on the meta device)."""
    count, thread = 0, threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MOST_TENSORS:
            raise ValueError(f"a model of more than {MOST_TENSORS:,} tensors")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
