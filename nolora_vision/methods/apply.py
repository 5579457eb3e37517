"""apply_method: a bare model becomes one whose right parameters train, by any method, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.methods.adaptformer import add_adaptformer
from nolora_vision.methods.catalogue import GROUPS, METHODS, MethodError, chosen_options
from nolora_vision.methods.peft_layers import add_peft_layers
from nolora_vision.methods.selective import train_biases, train_norms
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.applied import APPLIED, Applied, applied_to
from nolora_vision.surgery.inject import freeze_backbone, inject, is_injected
from nolora_vision.surgery.wrappers import bare_model

Model = TypeVar("Model", bound=nn.Module)


def apply_method(
    model: Model,
    method: str,
    adapter: AdapterConfig | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    example_input: Any | None = None,
) -> Model:
    """Make the parameters of a method trainable, and no others but the classifier's.

    Adapters of every kind sit on the layers that `inject` would adapt for this config, with the same cure of bypassed
    layers and the same proof that the model calls each. A fresh model computes what it did before: bit for bit, but to
    rounding with pissa and boft, and where a bypass was cured.

    Args:
        model: a bare model.
        method: one of METHODS.
        adapter: where adapters go, their rank, and the rest as far as the method has it: peers take no nonlinearity
            and no modulation, alpha only those that have a scale alpha / rank.
        options: of this method, see METHODS; what is not given has its default.
        example_input: see `inject`.

    Returns:
        The same model.

    Raises:
        ConfigError: if there is no such method or option.
        InjectionError: if the method cannot run on this model or as asked (MethodError), with the reason in a sentence.
            The model is then unchanged.
    """
    adapter, chosen = adapter or AdapterConfig(), chosen_options(method, options or {})
    if is_injected(model) or applied_to(model) is not None or bare_model(model) is not model:
        raise MethodError("A method is applied to a bare model, and this one is adapted or wrapped. Build a fresh one.")
    setattr(model, APPLIED, _apply(model, method, adapter, chosen, example_input))
    return model


def _apply(
    model: nn.Module, method: str, adapter: AdapterConfig, options: Mapping[str, Any], example_input: Any | None
) -> Applied:
    if METHODS[method].group == "peft":
        return add_peft_layers(model, method, adapter, options, example_input)
    if method == "adaptformer":
        return add_adaptformer(model, adapter, options, example_input)
    if METHODS[method].group == "ours":
        return _inject_ours(model, method, adapter, options, example_input)
    if method == "full":
        model.requires_grad_(True)
    else:
        {"linear": freeze_backbone, "bitfit": train_biases, "layernorm": train_norms}[method](model)
    return Applied(method, adapter, options)


def own_config(method: str, adapter: AdapterConfig) -> AdapterConfig:
    """The adapters of nolora, lora or aurora."""
    fixed = {
        "lora": {"nonlinearity": "identity", "modulation": "none"},
        "aurora": {"nonlinearity": "aurora", "modulation": "none"},
    }
    return replace(adapter, **fixed.get(method, {}))


def _inject_ours(
    model: nn.Module, method: str, adapter: AdapterConfig, options: Mapping[str, Any], example_input: Any | None
) -> Applied:
    adapter = own_config(method, adapter)
    inject(model, adapter, example_input=example_input)
    if (gain := options["init_gain"]) != 1:
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                for branch in layer.adapter.branches():
                    branch.lora_A.mul_(gain)
    ratios = {GROUPS[name]: float(options[name]) for name in GROUPS if options.get(name, 1) != 1}
    groups = {name: _group(name) for name, _ in model.named_parameters() if ".adapter." in f".{name}"}
    groups = {name: group for name, group in groups.items() if group in ratios}
    return Applied(method, adapter, options, groups=groups, ratios=ratios)


def _group(name: str) -> str:
    """The optimizer group of an adapter's parameter, if it has a rate of its own."""
    part = name.rpartition(".")[2]
    return {"lora_A": "adapter", "lora_B": GROUPS["lr_ratio"]}.get(part, GROUPS["rank_space_lr_ratio"])
