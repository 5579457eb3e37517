"""What a small model with adapters must compute and hold, in plain words: no code of the library but AdapterConfig.

Shapes: `D` in_features, `E` out_features, `R` rank. Tensors are kept by the names that they have in the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nolora_vision import AdapterConfig

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
THIRDS = {"q": (0, 16), "k": (16, 32), "v": (32, 48)}
WHOLE = dict.fromkeys(LAYERS, "")
Places = dict[str, str]
"""Adapted layers of a block, each with its parts: '' for the whole layer, or some of q, k, v."""
TARGETS: dict[Any, Places] = {
    ("qkv", "mlp"): {"attn.qkv": "", "mlp.fc1": "", "mlp.fc2": ""},
    ("q", "v"): {"attn.qkv": "qv"},
    ("k", "fc1"): {"attn.qkv": "k", "mlp.fc1": ""},
    "all": WHOLE,
    "mlp": {"mlp.fc1": "", "mlp.fc2": ""},
    ("attn.proj",): {"attn.proj": ""},
    r"blocks\.1\..*fc2": {"mlp.fc2": ""},
}


def bare_model(name: str) -> nn.Module:
    """A tiny timm model in evaluation mode, whose zero-initialised parts let the blocks through."""
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=3, **TINY).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return model


def splines(h: Tensor) -> Tensor:
    """The cubic B-splines on a grid of 5 intervals on [-1, 1], by Cox and de Boor: (...) → (..., 8)."""
    knots = [-1 + 0.4 * (j - 3) for j in range(12)]
    order = [((h >= knots[j]) & (h < knots[j + 1])).to(h.dtype) for j in range(11)]
    for k in range(1, 4):
        left = [(h - knots[j]) / (0.4 * k) * order[j] for j in range(11 - k)]
        order = [left[j] + (knots[j + k + 1] - h) / (0.4 * k) * order[j + 1] for j in range(11 - k)]
    return torch.stack(order, -1)


def f_of(name: str, h: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The nonlinearity of this name."""
    match name:
        case "identity":
            return h
        case "tanh":
            return torch.tanh(h)
        case "relu":
            return h.clamp(min=0)
        case "gelu":
            return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        case "silu":
            return h * torch.sigmoid(h)
        case "swish":
            return 2 * h * torch.sigmoid(t["beta"] * h)
        case "residual_tanh":
            return (1 - t["mix"]) * h + t["mix"] * torch.tanh(t["slope"] * h)
        case "rational":
            return h * (1 + t["linear"] * h + t["square"] * h**2) / (1 + (t["pole"] * h) ** 2)
        case "aurora":
            return torch.tanh(torch.tanh(h) @ t["mixer"].T) + splines(h).sum(-2) @ t["spline"].T
    raise AssertionError(name)


THETA: dict[str, dict[str, float | None]] = {
    "swish": {"beta": 0.0},
    "residual_tanh": {"mix": 0.0, "slope": 1.0},
    "rational": {"linear": 0.0, "square": 1.0, "pole": 1.0},
    "aurora": {"mixer": None, "spline": None},
}
"""Initial values of θ; None where they are drawn."""


@dataclass
class Update:
    """One update: y[rows] += s · B (v ⊙ f(A x) ⊙ (1 + tanh(G A x + c)))."""

    path: str
    prefix: str
    """Of its tensors' names."""
    rows: list[tuple[int, int]] | None
    f: str
    modulation: str
    scale: float
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def initial(self) -> dict[str, float | None]:
        """The value that each tensor is filled with at first; None where it is drawn."""
        fixed = {"lora_A": None, "lora_B": 0.0, "v": 1.0, "gate_weight": 0.0, "gate_bias": 0.0}
        return {name: (fixed | THETA.get(self.f, {}))[name] for name in self.shapes}

    def delta(self, x: Tensor, t: dict[str, Tensor]) -> Tensor:
        """What is added to the layer's output, on its rows: (..., D) → (..., E')."""
        h = x @ t["lora_A"].T
        z = f_of(self.f, h, t)
        if self.modulation != "none":
            z = z * t["v"]
        if self.modulation == "gate":
            z = z * (1 + torch.tanh(h @ t["gate_weight"].T + t["gate_bias"]))
        return self.scale * (z @ t["lora_B"].T)


@dataclass
class Head:
    """A classifier, and which of its parameters want a gradient."""

    tensors: dict[str, Tensor]
    wants: dict[str, bool]

    @property
    def classes(self) -> int:
        """Its outputs."""
        return len(self.tensors["head.bias"])


@dataclass
class Outfit:
    """What is on the backbone: adapters, if there is a config, and a head."""

    config: AdapterConfig | None
    updates: list[Update]
    head: Head

    def named(self) -> Iterator[tuple[str, dict[str, Tensor], str]]:
        """Name in the model of each tensor, and where it is kept here: a dict and its key."""
        for update in self.updates:
            yield from ((update.prefix + key, update.tensors, key) for key in update.tensors)
        yield from ((name, self.head.tensors, name) for name in self.head.tensors)


@dataclass
class Shelf:
    """Adapters by name, which one is set, the head that the model came with, and what wanted gradients before."""

    outfits: dict[str, Outfit]
    active: str | None
    bare_head: Head
    before: dict[str, bool]


@dataclass
class Saved:
    """What a directory holds."""

    outfit: Outfit
    brought: dict[str, Tensor]
    """Weights of the backbone that trained too."""


def planned(config: AdapterConfig) -> list[Update]:
    """The updates that a config asks for on a tiny model; none if it matches nothing."""
    found = []
    blocks = range(2) if config.layers is None else sorted({i % 2 for i in config.layers})
    for block in blocks:
        for layer, parts in TARGETS[config.targets].items():
            if not isinstance(config.targets, str) or config.targets in ("all", "mlp") or block == 1:
                found += _of_layer(f"blocks.{block}.{layer}", parts, config)
    return found


def is_plannable(config: AdapterConfig) -> bool:
    """Not with a rank or an alpha for q or v where it is a part of one product."""
    parts = TARGETS[config.targets].get("attn.qkv")
    own = {*config.rank_pattern, *config.alpha_pattern}.intersection(parts or "qkv")
    return parts is None or len(parts) == 1 or not own or (parts != "" and not config.share_down)


def _of_layer(path: str, parts: str, config: AdapterConfig) -> list[Update]:
    features = {"attn.qkv": (16, 48), "attn.proj": (16, 16), "mlp.fc1": (16, 32), "mlp.fc2": (32, 16)}
    d, e = features[path.split(".", 2)[2]]
    role = path.rpartition(".")[2]
    atoms = set(parts or ("qkv" if role == "qkv" else (role,)))
    groups = {"mlp": {"fc1", "fc2"}, "qkv": set("qkv")}
    names = [*(["v"] if config.modulation != "none" else []), *THETA.get(config.nonlinearity, {})]
    names += ["gate_weight", "gate_bias"] if config.modulation == "gate" else []

    def one(part: str, rows: list[tuple[int, int]] | None) -> Update:
        width = e if rows is None else sum(b - a for a, b in rows)
        own = set(part) or atoms
        rank = next((v for k, v in config.rank_pattern.items() if own & groups.get(k, {k})), config.rank)
        usual = rank if config.alpha is None else config.alpha
        alpha = next((v for k, v in config.alpha_pattern.items() if own & groups.get(k, {k})), usual)
        scale = alpha / (math.sqrt(rank) if config.rank_stabilized else rank)
        square, vector = (rank, rank), (rank,)
        small: dict[str, tuple[int, ...]] = {"mixer": square, "spline": (rank, 8), "gate_weight": square}
        shapes = {"lora_A": (rank, d), "lora_B": (width, rank), **{n: small.get(n, vector) for n in names}}
        prefix = f"{path}.adapter." + (f"{part}." if part else "")
        return Update(path, prefix, rows, config.nonlinearity, config.modulation, scale, shapes)

    if not parts:
        return [one("", None)]
    if config.share_down:
        return [one("", [THIRDS[p] for p in parts])]
    return [one(p, [THIRDS[p]]) for p in parts]


def folded(outfit: Outfit) -> None:
    """Put v and s into B."""
    config = outfit.config
    assert config is not None
    for u in outfit.updates:
        factor = torch.full_like(u.tensors["lora_B"][0], u.scale) * u.tensors.get("v", torch.ones(1)).detach()
        u.tensors["lora_B"], u.scale = (u.tensors["lora_B"] * factor).to(u.tensors["lora_B"].dtype), 1.0
        if u.modulation == "vector":
            del u.tensors["v"]
            u.modulation = "none"
        elif u.modulation == "gate":
            u.tensors["v"] = torch.ones_like(u.tensors["v"])
    modulation = "none" if config.modulation == "vector" else config.modulation
    outfit.config = replace(config, alpha=None, alpha_pattern={}, rank_stabilized=False, modulation=modulation)


def merged(outfit: Outfit, base: dict[str, Tensor]) -> None:
    """Add the updates, which are matrices, to the weights."""
    for u in outfit.updates:
        v = u.tensors.get("v", torch.ones(1))
        matrix = u.scale * (u.tensors["lora_B"].double() * v.double()) @ u.tensors["lora_A"].double()
        name, start = f"{u.path}.weight", 0
        weight = base[name].double()
        for a, b in u.rows or [(0, len(weight))]:
            weight[a:b] += matrix[start : start + b - a]
            start += b - a
        base[name] = weight.to(base[name].dtype)


class Reference:
    """The same function by hooks on layers of a pristine copy, which no code of the library has touched."""

    def __init__(self, pristine: nn.Module) -> None:
        self.plain, self.double = copy.deepcopy(pristine), copy.deepcopy(pristine).double()
        self.buffers = {name: b for name, b in pristine.named_buffers() if b.is_floating_point()}

    def exact(self, base: dict[str, Tensor], outfit: Outfit, x: Tensor, held: torch.dtype | None) -> Tensor:
        """Without updates, in the types that everything has: what the pristine model gives, bit for bit."""
        self._flags(self.plain, outfit)
        dtype = next(t.dtype for name, t in base.items() if name.endswith("norm1.weight"))
        values = {**base, **outfit.head.tensors, **{n: b.to(dtype) for n, b in self.buffers.items()}}
        with torch.autocast("cpu", held) if held else nullcontext():
            return functional_call(self.plain, values, (x.to(dtype),))

    def close(self, base: dict[str, Tensor], outfit: Outfit, x: Tensor, *, active: bool = True) -> Tensor:
        """In double precision, with updates unless they are not active; gradients reach the tensors."""
        self._flags(self.double, outfit)
        hooks = []
        for path in dict.fromkeys(u.path for u in outfit.updates) if active else ():
            own = [u for u in outfit.updates if u.path == path]
            hooks.append(self.double.get_submodule(path).register_forward_hook(_adding(own)))
        try:
            values = {name: t.double() for name, t in (base | outfit.head.tensors).items()}
            return functional_call(self.double, values, (x.double(),))
        finally:
            for hook in hooks:
                hook.remove()

    def _flags(self, model: nn.Module, outfit: Outfit) -> None:
        """BEiT's attentions call their qkv where an adapter is on any of their layers, and only there."""
        owners = cured(outfit)
        for path, module in model.named_modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = path in owners


def cured(outfit: Outfit) -> set[str]:
    """Attentions with an adapter on one of their layers."""
    return {u.path.rpartition(".")[0] for u in outfit.updates if ".attn." in u.path}


def _adding(updates: list[Update]) -> Any:
    def hook(_layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        for u in updates:
            delta = u.delta(inputs[0], {name: t.double() for name, t in u.tensors.items()})
            full, start = torch.zeros_like(out), 0
            for a, b in u.rows or [(0, out.shape[-1])]:
                full[..., a:b] = delta[..., start : start + b - a]
                start += b - a
            out = out + full
        return out

    return hook
