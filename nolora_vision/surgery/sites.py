"""Which layers of a timm transformer may carry an adapter, by family and role; the bypass cure.

A role is read off names and containers (`blocks.3.attn.qkv`, `mlp.fc1`, …), because timm's 100 model files have no
common attention class. Names were collected from all 1,371 architectures of timm 1.0.31.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nolora_vision.surgery.layout import Rows, fused_rows

ATTENTION_INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("qkv", "qkvs", "qkv_proj", "pwise", "in_proj"), "qkv"),
    **dict.fromkeys(("q", "wq", "q_proj", "to_query", "query"), "q"),
    **dict.fromkeys(("k", "wk", "k_proj", "to_key", "key"), "k"),
    **dict.fromkeys(("v", "wv", "v_proj", "to_value", "value", "v_gate"), "v"),
    **{"kv": "kv", "qk": "qk"},
}
"""Role by the name of an attention's input projection. `pwise`: LowFormer."""
WITH_MLP = "in_proj"
"""The one among them that makes an MLP's fc1 as well, in one product (timm's ParallelScalingBlock)."""

ATTENTION_OUTPUTS = frozenset({"proj", "o_proj", "out_proj", "attn_out_proj", "output"})
MLP_LAYERS = frozenset({"fc1", "fc2", "fc1_g", "fc1_x", "pwconv1", "pwconv2", "mlp_out_proj"})
"""Names that mean an MLP layer in any container; other names do inside a container that is called or classed an MLP."""

MLP_NAME = re.compile(r"(mlp|ffn)(\d+|_\w+)?")
MLP_CLASS = re.compile(r"Mlp|MLP|FFN|FeedForward|SwiGLU")
PIECES = frozenset({"attn", "attns", "ffns"})
"""Containers in a block whose numbers count its pieces: `blocks.0.attns.1` (ViT 18×2), `attn.main.1` (LowFormer)."""
WRAPPERS = re.compile(r"conv|linear|ln|c|m|module|main|\d+")
"""Components that say how a layer is packed (`qkv.linear`, `proj.1.conv`), not what it is."""

NOT_TOKENS = frozenset(
    {
        "se",
        "rel_pos",
        "shared_rel_pos",
        "meta_mlp",
        "cpb_mlp",
        "mlp_add",
        "mlp_mul",
        "gate",
        "pool",
        "aligner",
        "merger",
        "patch_embed",
        "stem",
        "pre_logits",
    }
)
"""Containers whose `fc1` or `proj` does not transform tokens: channel gates, position-bias MLPs, poolings, stems."""
NOT_TOKENS_CLASS = re.compile(
    r"SE\w*|Squeeze\w*|EffectiveSE\w*|SplitAttn|SelectiveKernel\w*|GlobalContext|\w*ClassifierHead|"
    r"SpatialTransformerBlock|AttentionPool2d|RotAttentionPool2d|SepConv|LocalRepresentation"
)

ATOMS: Mapping[str, frozenset[str]] = {
    **{role: frozenset({role}) for role in ("q", "k", "v", "proj", "fc1", "fc2")},
    "qkv": frozenset("qkv"),
    "qk": frozenset("qk"),
    "kv": frozenset("kv"),
    "mlp": frozenset({"fc1", "fc2"}),
    "all": frozenset({"q", "k", "v", "proj", "fc1", "fc2"}),
    "": frozenset(),
}
"""What each role, of a layer or in `targets`, consists of."""

BYPASS_FLAG = "qkv_bias_separate"
"""timm's switch in BEiT, EVA and Swin V2: without it the block reads `qkv.weight` and never calls the layer."""


@dataclass(frozen=True)
class Site:
    """One layer that may carry an adapter, or that a name asked for."""

    path: str
    """Module path in the model."""
    role: str
    """q, k, v, qk, kv, qkv, proj, fc1, fc2, or '' for a layer without a known role."""
    block: str
    """Path of the block it belongs to, '' outside any."""
    in_features: int
    out_features: int
    parts: Mapping[str, Rows] = field(default_factory=dict)
    """Output features of q, k, v (and fc1) of a fused layer; empty if it is not fused or its layout is unknown."""

    @property
    def letters(self) -> str:
        """Which of q, k, v the layer makes."""
        return self.role if self.role in {"q", "k", "v", "qk", "kv", "qkv"} else ""

    @property
    def atoms(self) -> frozenset[str]:
        """What the whole layer consists of: its role, and fc1 where that is in one product with q, k and v."""
        return ATOMS[self.role].union(self.parts if self.role == "qkv" else ())


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the classifier's modules, as `model.get_classifier()` and the pretrained config name them."""
    heads: list[nn.Module] = []
    if callable(getattr(model, "get_classifier", None)):
        found: Any = model.get_classifier()  # type: ignore[operator]
        heads = [
            head for head in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(head, nn.Module)
        ]
    paths = {path for path, module in model.named_modules() if path and any(module is head for head in heads)}
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    existing = {path for path, _ in model.named_modules()}
    paths |= {path for path in ((named,) if isinstance(named, str) else named) if path in existing}
    return tuple(sorted(paths))


def inside(path: str, parents: Iterable[str]) -> bool:
    """Whether a module path is one of the parents or below one."""
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def is_linear_like(module: nn.Module) -> bool:
    """A Linear, a convolution, or something that calls itself a linear layer (quantised ones, for example)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return True
    return "Linear" in type(module).__name__ and hasattr(module, "in_features")


def is_pointwise(module: nn.Module) -> bool:
    """A layer that maps the features of each position by itself: any linear layer, or an ungrouped 1×1 convolution."""
    if not isinstance(module, nn.Conv2d):
        return is_linear_like(module)
    return module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), 0, "valid", "same")


def find_sites(model: nn.Module) -> list[Site]:
    """Every pointwise layer outside the classifier, in the model's order, with its role ('' where it has none)."""
    modules = dict(model.named_modules())
    heads = classifier_paths(model)
    layers = {p: m for p, m in modules.items() if p and is_pointwise(m) and not inside(p, heads)}
    roles = _attention_roles(layers, modules) | _mlp_roles(layers, modules)
    sites = []
    for path, layer in layers.items():
        role = roles.get(path, "")
        in_features, out_features = layer_shape(layer)
        parts = fused_rows(role, modules[_container(path)], out_features)
        sites.append(Site(path, role, block_of(path), in_features, out_features, parts))
    return sites


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear, (in_channels, out_channels) of a convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def bypassing_attentions(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths of the attentions among the owners of these layers that read the layer's weight and never call it."""
    owners = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    modules = ((owner, model.get_submodule(owner)) for owner in owners)
    return [
        owner
        for owner, attention in modules
        if getattr(attention, BYPASS_FLAG, True) is False and getattr(attention, "q_bias", None) is not None
    ]


def cure_bypass(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Make the blocks of these layers call them; returns the paths of the attentions whose flag was turned on."""
    cured = bypassing_attentions(model, paths)
    for owner in cured:
        setattr(model.get_submodule(owner), BYPASS_FLAG, True)
    return cured


def meaning(path: str) -> tuple[list[str], int]:
    """The components of a path, and the index of the one that says what the layer is."""
    parts = path.split(".")
    i = len(parts) - 1
    while i > 0 and WRAPPERS.fullmatch(parts[i]):
        i -= 1
    if i > 0 and parts[i] == "proj" and parts[i - 1] in {*ATTENTION_INPUTS, "output"}:  # `query.proj`, `q.proj.conv`
        i -= 1
    return parts, i


def _container(path: str) -> str:
    """Path of the module that holds the layer's meaningful name: the attention or the MLP."""
    parts, i = meaning(path)
    return ".".join(parts[:i])


def block_of(path: str) -> str:
    """Path of the block that a layer belongs to, '' outside any."""
    parts, i = meaning(path)
    end = next((k for k in range(i) if parts[k] in PIECES), i)
    numbered = [k for k in range(end) if parts[k].isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else ""


def transforms_tokens(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer acts on tokens, not on a channel gate, a position bias, a pooling or the stem."""
    parts, _ = meaning(path)
    above = (".".join(parts[:k]) for k in range(1, len(parts)))
    return not NOT_TOKENS.intersection(parts[:-1]) and not any(
        NOT_TOKENS_CLASS.fullmatch(type(modules[p]).__name__) for p in above
    )


def _attention_roles(layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    roles: dict[str, str] = {}
    outputs: list[str] = []
    for path in layers:
        parts, i = meaning(path)
        if not transforms_tokens(path, modules):
            continue
        if parts[i] in ATTENTION_INPUTS:
            roles[path] = ATTENTION_INPUTS[parts[i]]
        elif parts[i] in ATTENTION_OUTPUTS:
            outputs.append(path)
    attentions = {_container(path) for path in roles}
    return roles | {path: "proj" for path in outputs if _container(path) in attentions}


def _mlp_roles(layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """fc2 for the last layer of each MLP, fc1 for the ones before it (a gated MLP has two)."""
    members: dict[str, list[str]] = {}
    for path in layers:
        owner = mlp_of(path, modules)
        if owner is not None and transforms_tokens(path, modules):
            members.setdefault(owner, []).append(path)
    return {path: "fc2" if path == paths[-1] else "fc1" for paths in members.values() for path in paths}


def mlp_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the MLP that a layer belongs to, or None."""
    parts, i = meaning(path)
    if parts[i] in ATTENTION_INPUTS or parts[i] in ATTENTION_OUTPUTS:
        return None
    for k in range(len(parts) - 1, max(0, len(parts) - 5), -1):
        name, owner = parts[k - 1], ".".join(parts[:k])
        if (
            MLP_NAME.fullmatch(name)
            or MLP_CLASS.search(type(modules[owner]).__name__)
            or _is_mlp_sequence(modules[owner])
        ):
            return owner
        if not WRAPPERS.fullmatch(name) and k <= i:
            break
    return ".".join(parts[:i]) if parts[i] in MLP_LAYERS else None


def _is_mlp_sequence(module: nn.Module) -> bool:
    """A plain Sequential that widens, activates and narrows again (CPUBone's MLP has no class of its own)."""
    if type(module) is not nn.Sequential:
        return False
    layers = [child for child in module if is_pointwise(child)]
    if len(layers) != 2 or any(isinstance(child, nn.Conv2d) and child not in layers for child in module):
        return False
    (d, e), (e2, d2) = map(layer_shape, layers)
    return d == d2 and e == e2 and e > d
