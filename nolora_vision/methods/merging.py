"""A trained model for inference, with updates that are matrices put into the frozen weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from nolora_vision.methods.catalogue import METHODS, MethodError
from nolora_vision.surgery.applied import APPLIED, applied_to
from nolora_vision.surgery.fold import fold, tied_weight
from nolora_vision.surgery.frozen_dtype import release_frozen

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge_for_inference(model: Model) -> Model:
    """Make the model as fast for inference as its method allows without changing its outputs, in place.

    Updates of PEFT's methods and linear ones of ours go into the frozen weights and leave a plain timm model;
    nonlinear ones are folded; adaptformer and methods that add nothing stay as they are.

    Raises:
        MethodError: if no method was applied to the model.
    """
    applied = applied_to(model)
    if applied is None:
        raise MethodError("No method was applied to this model; call nolora_vision.methods.apply_method first.")
    group = METHODS[applied.method].group
    if group == "ours":
        linear = applied.adapter.nonlinearity == "identity" and applied.adapter.modulation != "gate"
        return fold(model, merge=linear and not tied_weight(model))
    if group == "peft":
        release_frozen(model)  # so that the update is not rounded to the type of a held weight
        for path in applied.layers:
            _merge_layer(model, path)
        delattr(model, APPLIED)
        model.__dict__.pop("peft_config", None)
    return model


def _merge_layer(model: nn.Module, path: str) -> None:
    layer: Any = model.get_submodule(path)
    layer.merge()
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer.get_base_layer())
