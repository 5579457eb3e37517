"""Several adapters on one backbone: add, set, remove; the backbone's weights are never copied."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import AdapterMismatchError
from nolora_vision.adapters.checkpoint import apply_adapter, read_any_adapter, trained_state
from nolora_vision.adapters.mixing import AdapterNames
from nolora_vision.adapters.outfit import (
    Outfit,
    Shelf,
    current_outfit,
    fitted,
    heads_of,
    refresh_active,
    shelf_of,
    wear,
)
from nolora_vision.adapters.pretrained import find_adapter
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.frozen_dtype import release_frozen
from nolora_vision.surgery.groups import parameter_kind
from nolora_vision.surgery.inject import INFO, RECORD, SHELF, freeze_backbone, is_injected, require_as_before
from nolora_vision.surgery.sites import classifier_paths
from nolora_vision.surgery.wrappers import bare_model

DEFAULT_NAME = "default"
"""What the adapters that are on a model already are called once others join them."""


def add_adapter(model: nn.Module, name: str, source: str | Path, *, revision: str | None = None) -> nn.Module:
    """Put a saved adapter with its head beside the others of a model; the first one on a bare model is set.

    The weights of the backbone are shared, not copied. Adapters that were already on the model are called `default`.

    Args:
        model: a timm model, bare or with adapters; compiled or data-parallel ones too.
        name: what `set_adapter` and `adapter_names` will call it.
        source: a directory, or the id of a repository on the Hub.

    Raises:
        CheckpointError: if it cannot be read or does not fit; the model is unchanged.
        ValueError: if the name is taken or empty.
    """
    bare = bare_model(model)
    shelf = getattr(bare, SHELF, None) or _new_shelf(bare)
    if not isinstance(name, str) or not name or name in shelf.outfits:
        taken = ", ".join(map(repr, shelf.outfits)) or "none"
        raise ValueError(f"An adapter needs a name of its own, got {name!r}. Taken: {taken}.")
    config, state = read_any_adapter(find_adapter(source, revision=revision), bare)
    if shelf.outfits:
        _refuse_trained_here(bare)
    worn = current_outfit(bare, shelf)
    _keep_statistics(bare, shelf, state)
    try:
        with torch.random.fork_rng(devices=[]):  # initial values are replaced, and should not move the caller's seed
            wear(bare, shelf, replace(shelf.bare, heads=_fresh_heads(bare, config["num_classes"])))
            bare.num_classes = config["num_classes"]
            apply_adapter(bare, config, state, source=str(source), joins=True)
            freeze_backbone(bare)  # also where it is only a head: nobody else's backbone may train with it
            added = _taken_off(bare, shelf, statistics={n: t.clone() for n, t in state.items() if n in _buffers(bare)})
    finally:
        wear(bare, shelf, worn)
    shelf.outfits[name] = added
    if not hasattr(bare, SHELF):
        setattr(bare, SHELF, shelf)
        shelf.hooks = AdapterNames().serve(bare)
    if len(shelf.outfits) == 1:
        set_adapter(model, name)
    return model


def set_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Make the model that of one of its adapters, with its head; None is the backbone with the head it came with.

    Nothing of the backbone is copied, and a compiled model is not compiled again if the shapes are the same. Don't
    call it between a forward and its backward pass under gradient checkpointing: that computes again with the adapter
    that is set then.

    Raises:
        ValueError: if no adapter has this name; the model is unchanged.
    """
    bare = bare_model(model)
    shelf = shelf_of(bare)
    outfit = shelf.outfit(name)
    refresh_active(bare, shelf)
    wear(bare, shelf, outfit)
    shelf.active = name
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter. If it was set, the bare backbone is; without any left, the model is as before the first.

    Held weights are then released.

    Raises:
        ValueError: if no adapter has this name.
    """
    bare = bare_model(model)
    shelf = shelf_of(bare)
    shelf.outfit(name)
    if shelf.active == name:
        set_adapter(model, None)
    del shelf.outfits[name]
    if not shelf.outfits:
        require_as_before(bare, shelf.required_grad)
        release_frozen(bare)
        shelf.close()
        delattr(bare, SHELF)
    return model


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that were added to a model."""
    shelf = getattr(bare_model(model), SHELF, None)
    return tuple(shelf.outfits) if shelf is not None else ()


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that is set; None for the bare backbone."""
    shelf = getattr(bare_model(model), SHELF, None)
    return shelf.active if shelf is not None else None


def _new_shelf(bare: nn.Module) -> Shelf:
    injected = is_injected(bare)
    required = (
        getattr(bare, RECORD).required_grad if injected else {n: p.requires_grad for n, p in bare.named_parameters()}
    )
    heads = heads_of(bare)
    shelf = Shelf(Outfit(heads=heads, num_classes=getattr(bare, "num_classes", None)), dict(required))
    if injected:
        moved = [name for name, t in trained_state(bare).items() if not isinstance(t, nn.Parameter)]
        if moved:
            raise AdapterMismatchError(
                f"BatchNorm statistics moved while the adapters on this model trained ({moved[0]}), so the backbone "
                f"as it was is lost. Save the adapter, build the model afresh, and add it by name."
            )
        shelf.outfits[DEFAULT_NAME], shelf.active = current_outfit(bare, shelf), DEFAULT_NAME
    return shelf


def _buffers(bare: nn.Module) -> set[str]:
    return {name for name, _ in bare.named_buffers()}


def _taken_off(bare: nn.Module, shelf: Shelf, statistics: dict[str, Tensor]) -> Outfit:
    record = getattr(bare, RECORD, None)
    return Outfit(
        injection=None if record is None else replace(record, required_grad=shelf.required_grad),
        adapters={path: layer.adapter for path, layer in adapted_layers(bare).items()},
        heads=heads_of(bare),
        statistics=statistics,
        num_classes=getattr(bare, "num_classes", None),
        info=getattr(bare, INFO, None),
    )


def _fresh_heads(bare: nn.Module, num_classes: int | None) -> dict[str, nn.Module]:
    """New classifier modules for so many classes; the model keeps its own."""
    heads, own = heads_of(bare), getattr(bare, "num_classes", None)
    if num_classes == own:
        return copy.deepcopy(heads)
    try:
        bare.reset_classifier(num_classes)  # type: ignore[operator]
        return {path: fitted(head, heads[path]) for path, head in heads_of(bare).items()}
    finally:
        for path, head in heads.items():
            owner, _, name = path.rpartition(".")
            setattr(bare.get_submodule(owner), name, head)
        bare.num_classes = own  # type: ignore[assignment]


def _keep_statistics(bare: nn.Module, shelf: Shelf, state: dict[str, Tensor]) -> None:
    """Remember the backbone's own values of the statistics that this adapter brings."""
    for name in _buffers(bare).intersection(state):
        shelf.bare.statistics.setdefault(name, bare.get_buffer(name).clone())


def _refuse_trained_here(bare: nn.Module) -> None:
    """The adapters that are on the model would share what they have trained of the backbone."""
    heads = classifier_paths(bare)
    state = trained_state(bare).items()
    moved = [n for n, t in state if isinstance(t, nn.Parameter) and parameter_kind(n, heads) == "backbone"]
    if moved:
        raise AdapterMismatchError(
            f"The adapters on this model train weights of the backbone itself ({moved[0]} and {len(moved) - 1} more), "
            f"which adapters beside them could not share. Save them, build the model afresh, and add adapters there."
        )
