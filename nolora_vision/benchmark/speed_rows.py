"""The rows of the speed tables: a method on a bare model, its adapters at small random values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nolora_vision import AdapterConfig, adapter_parameters
from nolora_vision.methods import apply_method

OURS: Mapping[str, dict[str, Any]] = {
    "ours linear": {"nonlinearity": "identity", "modulation": "none"},
    "ours tanh": {"nonlinearity": "tanh", "modulation": "vector"},
    "ours swish": {"nonlinearity": "swish", "modulation": "vector"},
    "ours swish gate": {"nonlinearity": "swish", "modulation": "gate"},
}
PEERS: Mapping[str, str] = {"peft lora": "peft-lora", "peft dora": "dora", "peft peanut": "peanut"}
FROZEN: Mapping[str, str] = {"frozen": "linear", "head": "linear", "full": "full"}
"""`frozen` is a linear probe whose gradients run through every block, see `let_gradients_flow`."""
ROWS = (*FROZEN, *PEERS, *OURS)


def build_row(model: nn.Module, row: str, config: AdapterConfig, *, example_input: Any = None) -> nn.Module:
    """Make a bare model that of a row, in place; what starts at 0 in its adapters gets small random values.

    Args:
        row: one of ROWS.
        config: rank and targets; f and modulation are the row's.

    Raises:
        ValueError: if there is no such row.
        InjectionError: as `apply_method`.
    """
    if row not in ROWS:
        raise ValueError(f"A row must be one of {', '.join(ROWS)}, got {row!r}.")
    method = "nolora" if row in OURS else {**PEERS, **FROZEN}[row]
    apply_method(model, method, replace(config, **OURS.get(row, {})), example_input=example_input)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            if not parameter.any():
                nn.init.normal_(parameter, std=0.01)
    return model


def let_gradients_flow(model: nn.Module) -> None:
    """Let the backward pass of a frozen model run down to its first block, as it must with adapters there."""
    stem = getattr(model, "patch_embed", model)
    if stem is not model:
        stem.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
