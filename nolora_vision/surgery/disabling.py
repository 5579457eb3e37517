"""Adapters that do nothing for a while: those on the model, and those that join it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from nolora_vision.surgery.adapter import adapted_layers

DISABLED = "_nolora_disabled"
"""Attribute of a bare model for as long as its adapters do nothing."""


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block no adapter of a bare model does anything; it may be nested."""
    before = {layer: layer.adapter_enabled for layer in adapted_layers(model).values()}
    nested = is_disabled(model)
    setattr(model, DISABLED, True)
    try:
        stay_disabled(model)
        yield
    finally:
        if not nested:
            delattr(model, DISABLED)
        for layer in adapted_layers(model).values():  # not those before: eject may have made them plain again
            layer.adapter_enabled = before.get(layer, not nested)


def is_disabled(model: nn.Module) -> bool:
    """Whether a bare model is inside such a block."""
    return DISABLED in model.__dict__


def stay_disabled(model: nn.Module) -> None:
    """Inside such a block adapters that were put on the model now do nothing either."""
    if is_disabled(model):
        for layer in adapted_layers(model).values():
            layer.adapter_enabled = False
