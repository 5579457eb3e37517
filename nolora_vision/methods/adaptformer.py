"""AdaptFormer: a bottleneck beside each MLP, y = MLP(x) + s · (W_up ReLU(W_down x + b_down) + b_up).

Shapes: `...` any leading dimensions, `D` width of the tokens, `M` width of the bottleneck.
Source: Chen et al., AdaptFormer, arXiv 2205.13535, section 3.2; x is the MLP's input, after the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision.config import AdapterConfig
from nolora_vision.kernels.eager import kaiming_uniform_down
from nolora_vision.methods.catalogue import MethodError
from nolora_vision.methods.limits import refuse_settings
from nolora_vision.surgery.applied import Applied
from nolora_vision.surgery.inject import freeze_backbone
from nolora_vision.surgery.plan import PlannedAdapter, plan_adapters
from nolora_vision.surgery.reach import prove_reach
from nolora_vision.surgery.sites import block_of, mlp_of

CHILD = "adaptformer"
"""Name of the bottleneck in its MLP."""


class ParallelBottleneck(nn.Module):
    """x ↦ s · (W_up ReLU(W_down x + b_down) + b_up), 0 for every x until W_up and b_up are trained.

    Args:
        in_features: D of the input.
        out_features: D of the output, the same in a transformer.
        bottleneck: M.
        scale: s, 0.1 in the paper.
    """

    def __init__(
        self, in_features: int, out_features: int, bottleneck: int, scale: float, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(in_features, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, out_features, device=device, dtype=torch.float32)
        with torch.no_grad():
            kaiming_uniform_down(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) → (..., D), in fp32 whatever the type of the model."""
        return self.up(F.relu(self.down(x.to(self.down.weight.dtype)))) * self.scale


def _add_bottleneck(mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of an MLP."""
    return output + mlp.get_submodule(CHILD)(args[0]).to(output.dtype)


def mlp_shapes(model: nn.Module, adapter: AdapterConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every MLP whose layers the targets name, by path.

    Raises:
        InjectionError: if there is none, or one that cannot carry a bottleneck.
    """
    modules = dict(model.named_modules())
    members: dict[str, list[PlannedAdapter]] = {}
    for planned in plan_adapters(model, replace(adapter, rank=1)):
        owner = mlp_of(planned.site.path, modules) if planned.site.role in ("fc1", "fc2") else None
        if owner is not None:
            members.setdefault(owner, []).append(planned)
    if not members:
        raise MethodError(f"adaptformer sits beside MLPs, and targets={adapter.targets!r} names no layer of one.")
    return {path: _shape_of(path, modules, found) for path, found in members.items()}


def _shape_of(path: str, modules: Mapping[str, nn.Module], members: list[PlannedAdapter]) -> tuple[int, int]:
    roles = {planned.site.role for planned in members}
    layers = [modules[planned.site.path] for planned in members]
    if isinstance(modules[path], nn.Sequential) or path == block_of(members[0].site.path):
        raise MethodError(f"adaptformer needs MLPs that are modules of their own, and {path} is none.")
    if roles != {"fc1", "fc2"} or any(isinstance(layer, nn.Conv2d) for layer in layers):
        raise MethodError(f"adaptformer needs both fc1 and fc2 of an MLP to be linear and targeted: {path} has not.")
    return members[0].site.in_features, members[-1].site.out_features


def add_adaptformer(
    model: nn.Module, adapter: AdapterConfig, options: Mapping[str, Any], example_input: Any | None
) -> Applied:
    """Put a bottleneck beside each MLP that the targets name, in place, and freeze all else but the classifier.

    Raises:
        InjectionError: if it cannot be done. The model is then unchanged.
    """
    refuse_settings("adaptformer", adapter)
    shapes = mlp_shapes(model, adapter)
    options = {**options, "bottleneck": options["bottleneck"] or adapter.rank}
    hooks = []
    try:
        for path, (in_features, out_features) in shapes.items():
            mlp = model.get_submodule(path)
            device = next(mlp.parameters()).device
            bottleneck = ParallelBottleneck(in_features, out_features, options["bottleneck"], options["scale"], device)
            mlp.add_module(CHILD, bottleneck.train(mlp.training))
            hooks.append(mlp.register_forward_hook(_add_bottleneck))
        prove_reach(model, {path: model.get_submodule(f"{path}.{CHILD}") for path in shapes}, example_input)
    except BaseException:
        for hook in hooks:
            hook.remove()
        for path in shapes:
            model.get_submodule(path)._modules.pop(CHILD, None)
        raise
    freeze_backbone(model)
    names = [name for name, _ in model.named_parameters() if f".{CHILD}." in name]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    biases = frozenset(name for name in names if name.endswith(".bias"))
    return Applied("adaptformer", adapter, options, tuple(shapes), frozenset(names), undecayed=biases)
