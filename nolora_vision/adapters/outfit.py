"""All that makes a backbone the model of one adapter: adapters, flags, head and statistics, put on and taken off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.config import did_you_mean
from nolora_vision.surgery.adapter import ADAPTED_LAYERS, adapted_layers, adapted_type
from nolora_vision.surgery.disabling import stay_disabled
from nolora_vision.surgery.inject import INFO, RECORD, SHELF, Injection, InjectionError, tell_images
from nolora_vision.surgery.low_rank_adapter import Adapter
from nolora_vision.surgery.sites import BYPASS_FLAG, classifier_paths, inside


@dataclass
class Outfit:
    """All that makes a backbone the model of one adapter."""

    injection: Injection | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """By layer path."""
    heads: dict[str, nn.Module] = field(default_factory=dict)
    """The classifier's modules, by path."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """BatchNorm statistics of its own, by buffer name."""
    num_classes: int | None = None
    info: dict[str, Any] | None = None


@dataclass
class Shelf:
    """The adapters of a model by name, and which one it wears; None is the backbone with the head it came with."""

    bare: Outfit
    required_grad: dict[str, bool]
    outfits: dict[str, Outfit] = field(default_factory=dict)
    active: str | None = None
    hooks: list[Any] = field(default_factory=list)
    """What serves `adapter_names=`; see `mixing.py`."""

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def outfit(self, name: str | None) -> Outfit:
        """The adapter of this name.

        Raises:
            ValueError: if there is none.
        """
        if name is not None and name not in self.outfits:
            names = ", ".join(map(repr, self.outfits)) or "none"
            raise ValueError(f"No adapter is called {name!r}.{did_you_mean(name, self.outfits)} There are: {names}.")
        return self.bare if name is None else self.outfits[name]


def shelf_of(bare: nn.Module) -> Shelf:
    """The adapters of a model.

    Raises:
        InjectionError: if none were added by name.
    """
    shelf = getattr(bare, SHELF, None)
    if shelf is None:
        raise InjectionError(f"{type(bare).__name__} has no named adapters. Call nolora_vision.add_adapter first.")
    return shelf


def current_outfit(bare: nn.Module, shelf: Shelf) -> Outfit:
    """What the model wears now: references, nothing copied."""
    if shelf.active is not None and shelf.active in shelf.outfits:
        refresh_active(bare, shelf)
        return shelf.outfits[shelf.active]
    return Outfit(
        injection=getattr(bare, RECORD, None),
        adapters={path: layer.adapter for path, layer in adapted_layers(bare).items()},
        heads=heads_of(bare),
        num_classes=getattr(bare, "num_classes", None),
        info=getattr(bare, INFO, None),
    )


def refresh_active(bare: nn.Module, shelf: Shelf) -> None:
    """Training, folding or loading may have changed what is on the model since it was set."""
    if shelf.active is None:
        return
    outfit = shelf.outfits[shelf.active]
    outfit.injection, outfit.info = getattr(bare, RECORD, None), getattr(bare, INFO, None)
    outfit.adapters = {path: layer.adapter for path, layer in adapted_layers(bare).items()}
    outfit.heads, outfit.num_classes = heads_of(bare), getattr(bare, "num_classes", None)


@torch.no_grad()
def wear(bare: nn.Module, shelf: Shelf, outfit: Outfit) -> None:
    """Change adapters, flags, head and statistics to those of an outfit, touching only what differs."""
    before: Injection | None = getattr(bare, RECORD, None)
    cured_before = set(before.cured) if before is not None else set()
    cured = set(outfit.injection.cured) if outfit.injection is not None else set()
    for path in cured_before ^ cured:
        setattr(bare.get_submodule(path), BYPASS_FLAG, path in cured)
    for path, layer in adapted_layers(bare).items():
        if path not in outfit.adapters:
            layer.release()
    for path, adapter in outfit.adapters.items():
        wear_adapter(bare.get_submodule(path), adapter)
    for path, head in outfit.heads.items():
        owner, _, name = path.rpartition(".")
        worn = bare.get_submodule(path)
        if worn is not head:
            setattr(bare.get_submodule(owner), name, fitted(head, worn).train(worn.training))
    for name, value in shelf.bare.statistics.items():
        bare.get_buffer(name).copy_(outfit.statistics.get(name, value))
    bare.num_classes = outfit.num_classes  # type: ignore[assignment]
    for attribute, value in ((RECORD, outfit.injection), (INFO, outfit.info)):
        if value is not None:
            setattr(bare, attribute, value)
        elif hasattr(bare, attribute):
            delattr(bare, attribute)
    tell_images(bare)
    stay_disabled(bare)


def wear_adapter(layer: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a layer, bare or adapted, on the layer's device and in its mode."""
    device = layer.get_parameter("weight").device
    if next(adapter.parameters()).device != device:
        adapter.to(device)
    if isinstance(layer, ADAPTED_LAYERS):
        if layer.adapter is not adapter:
            layer.adapter = adapter
            adapter.train(layer.training)
    else:
        adapted_type(layer).adopt(layer, adapter)


def fitted(head: nn.Module, worn: nn.Module) -> nn.Module:
    """A head on the device and in the type of the one whose place it takes: the model may have been moved or cast."""
    like = next(worn.parameters(), None)
    return head if like is None else head.to(like.device, like.dtype)


def heads_of(bare: nn.Module) -> dict[str, nn.Module]:
    """The classifier's modules by path."""
    paths = classifier_paths(bare)
    outermost = [p for p in paths if not inside(p, [other for other in paths if other != p])]
    return {path: bare.get_submodule(path) for path in outermost}
