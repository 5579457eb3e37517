"""Every method on the same layers of the same model: ours, PEFT's, the head alone, everything; the one room of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nolora_vision import AdapterConfig, adapter_parameters, freeze_backbone, head_parameters, inject
from nolora_vision.surgery.plan import plan_adapters
from nolora_vision.surgery.sites import cure_bypass

OURS: Mapping[str, dict[str, Any]] = {
    "ours linear": {"nonlinearity": "identity", "modulation": "none"},
    "ours tanh": {"nonlinearity": "tanh", "modulation": "vector"},
    "ours swish": {"nonlinearity": "swish", "modulation": "vector"},
    "ours swish gate": {"nonlinearity": "swish", "modulation": "gate"},
}
PEERS = ("peft lora", "peft dora", "peft peanut")
METHODS = ("frozen", "head", "full", *PEERS, *OURS)


def apply_method(model: nn.Module, method: str, config: AdapterConfig, *, example_input: Any = None) -> nn.Module:
    """Make a bare model one that trains by a method, in place; adapters start at small random values, not at 0.

    PEFT's adapters sit on the layers that `inject` would adapt, with the same cure of bypassed layers.

    Args:
        method: one of METHODS. `frozen` trains nothing but lets gradients flow through every block.
        config: rank and targets; f and modulation are the method's.

    Raises:
        ValueError: if there is no such method.
        ImportError: if PEFT is needed and not installed.
    """
    if method in OURS:
        own = {**{name: getattr(config, name) for name in ("rank", "targets", "layers")}, **OURS[method]}
        inject(model, AdapterConfig(**own), example_input=example_input)
        added = list(adapter_parameters(model))
    elif method in PEERS:
        added = _inject_peer(model, method, config)
    elif method in ("frozen", "head", "full"):
        added = []
        if method != "full":
            freeze_backbone(model)
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    with torch.no_grad():
        for parameter in added:
            if not parameter.any():
                nn.init.normal_(parameter, std=0.01)
    return model


def _inject_peer(model: nn.Module, method: str, config: AdapterConfig) -> list[nn.Parameter]:
    import peft

    paths = [planned.site.path for planned in plan_adapters(model, config)]
    cure_bypass(model, paths)
    rank = config.rank
    make: Mapping[str, Callable[[], Any]] = {
        "peft lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=paths),
        "peft dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, use_dora=True),
        "peft peanut": lambda: peft.PeanutConfig(r=rank, target_modules=paths),
    }
    before = set(model.parameters())
    peft.inject_adapter_in_model(make[method](), model)
    added = [p for p in model.parameters() if p not in before]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in before)
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
    return added


def let_gradients_flow(model: nn.Module) -> None:
    """Let the backward pass of a frozen model run down to its first block, as it must with adapters there."""
    stem = getattr(model, "patch_embed", model)
    if stem is not model:
        stem.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
