"""Which parameters train, and at which rate; θ and v without decay, the head with its own rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.applied import Applied, applied_to
from nolora_vision.surgery.sites import classifier_paths, inside
from nolora_vision.surgery.wrappers import bare_model, bare_name

DECAYED = ("lora_A", "lora_B", "gate_weight")
"""The matrices of an adapter; v, θ and c are not decayed, as decay would pull f away from its form."""


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A, B, v, θ, G and c of every adapter, in the model's order; of a peer's adapters what they have."""
    model = bare_model(model)
    for layer in adapted_layers(model).values():
        yield from layer.adapter.parameters()
    applied = applied_to(model)
    if applied is not None and applied.parameters:
        yield from (p for name, p in model.named_parameters() if bare_name(name) in applied.parameters)


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The classifier's parameters, each once."""
    model = bare_model(model)
    seen: set[nn.Parameter] = set()
    for path in classifier_paths(model):
        for parameter in model.get_submodule(path).parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield parameter


def parameter_kind(name: str, heads: tuple[str, ...]) -> str:
    """adapter, head or backbone, by a parameter's name in the bare model."""
    if ".adapter." in f".{name}":
        return "adapter"
    return "head" if inside(name, heads) else "backbone"


def param_groups(
    model: nn.Module, *, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups of everything that trains, named adapter, head and backbone, each with a `_no_decay` twin.

    Not decayed: v, θ and c of the adapters, and what else is a factor or a bias in those of peers; biases, norms and
    `model.no_weight_decay()` elsewhere. With LoRA+'s `lr_ratio` every B is in a group of its own, adapter_b; with a
    `rank_space_lr_ratio` v, G, c and θ are, adapter_rank_space.

    Args:
        lr: of the adapters, and of backbone parameters if any train; groups with a ratio r of their own have r · lr.
        head_lr: of the classifier; None means lr.
        weight_decay: of the decayed groups.

    Raises:
        ValueError: if nothing trains.
    """
    model = bare_model(model)
    heads = classifier_paths(model)
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    applied = applied_to(model) or Applied("", AdapterConfig())
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, bare = parameter_kind(name, heads), bare_name(name)
        if bare in applied.parameters:
            kind, decayed = "adapter", bare not in applied.undecayed
        elif kind == "adapter":
            decayed = name.rpartition(".")[2] in DECAYED
        else:
            decayed = parameter.ndim > 1 and not bare.endswith(".bias") and bare not in spared
        kind = applied.groups.get(bare, kind)
        members.setdefault(kind if decayed else f"{kind}_no_decay", []).append(parameter)
    if not members:
        raise ValueError(
            "No parameter of the model requires a gradient. Call nolora_vision.inject(model), or set requires_grad."
        )
    rates = {"head": lr if head_lr is None else head_lr} | {name: r * lr for name, r in applied.ratios.items()}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name.removesuffix("_no_decay"), lr),
            "weight_decay": 0.0 if name.endswith("_no_decay") else weight_decay,
        }
        for name, parameters in sorted(members.items())
    ]
