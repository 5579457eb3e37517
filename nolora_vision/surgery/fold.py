"""fold: v and s put into B, or a linear update into W, for inference with less to do."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from nolora_vision.surgery.adapter import AdaptedLayer, adapted_layers
from nolora_vision.surgery.frozen_dtype import release_frozen
from nolora_vision.surgery.inject import RECORD, SHELF, eject, injection_of
from nolora_vision.surgery.low_rank_adapter import LowRankAdapter, SplitAdapter
from nolora_vision.surgery.plan import InjectionError
from nolora_vision.surgery.wrappers import bare_model

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold(model: Model, *, merge: bool = False) -> Model:
    """Put v and the scale s into B, in place: the same outputs, for inference with less to do.

    Args:
        merge: also add the update to W and take the adapters out. Only a linear update (f = identity, no gate) is a
            matrix that can be added.

    Raises:
        InjectionError: if the model has no adapters; or if `merge` is asked of a nonlinear update, for a weight that
            something else uses too, or beside other adapters. The model is unchanged.
    """
    bare = bare_model(model)
    record, layers = injection_of(bare), adapted_layers(bare)
    if merge:
        for path, layer in layers.items():
            _refuse_nonlinear_merge(path, layer.adapter)
        _refuse_tied_merge(bare)
        _refuse_merge_beside_others(bare)
    for layer in layers.values():
        for branch in layer.adapter.branches():
            branch.fold_()
    modulation = "none" if record.config.modulation == "vector" else record.config.modulation
    folded = replace(record.config, alpha=None, alpha_pattern={}, rank_stabilized=False, modulation=modulation)
    setattr(bare, RECORD, replace(record, config=folded))
    if merge:
        release_frozen(bare)  # so that the update is not rounded to the type of a held weight
        for layer in layers.values():
            _add_to_weight(layer)
        eject(bare)
    return model


def _refuse_nonlinear_merge(path: str, adapter: LowRankAdapter | SplitAdapter) -> None:
    for branch in adapter.branches():
        if not branch.is_linear:
            what = branch.config.nonlinearity if branch.config.nonlinearity != "identity" else "a gate"
            raise InjectionError(
                f"{path}: an update with {what} depends on its input, so no matrix equals it and it cannot be merged "
                f"into W. Use fold(model) for faster inference, export with the adapter in the graph, or train with "
                f"nonlinearity='identity' and no gate."
            )


def tied_weight(model: nn.Module) -> tuple[str, ...]:
    """The names of an adapted weight that is also another module's or has two; empty if there is none."""
    bare = bare_model(model)
    users: dict[int, list[str]] = {id(layer.get_parameter("weight")): [] for layer in adapted_layers(bare).values()}
    for path, module in bare.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in users:
                users[id(parameter)].append(f"{path}.{name}")
    return next((tuple(names) for names in users.values() if len(names) > 1), ())


def _refuse_tied_merge(bare: nn.Module) -> None:
    names = tied_weight(bare)
    if names:
        raise InjectionError(
            f"{' and '.join(names)} are one parameter, so an update that is added to it changes every layer that uses "
            f"it. Untie them first (layer.weight = torch.nn.Parameter(layer.weight.clone())), or use fold(model)."
        )


def _refuse_merge_beside_others(bare: nn.Module) -> None:
    shelf = getattr(bare, SHELF, None)
    others = [name for name in shelf.outfits if name != shelf.active] if shelf is not None else []
    if shelf is not None and others:
        raise InjectionError(
            f"Merging {shelf.active!r} into the weights would leave no place for the adapters beside it "
            f"({', '.join(map(repr, others))}). Take them off first with nolora_vision.remove_adapter(model, name)."
        )


def _add_to_weight(layer: AdaptedLayer) -> None:
    weight = layer.get_parameter("weight")
    total = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    matrix = total.view(total.shape[0], total.shape[1])
    for branch in layer.adapter.branches():
        update, start = branch.matrix().to(matrix.dtype), 0
        for first, last in branch.rows or ((0, matrix.shape[0]),):
            matrix[first:last] += update[start : start + last - first]
            start += last - first
    weight.copy_(total)
