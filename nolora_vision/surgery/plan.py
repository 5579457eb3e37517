"""From an AdapterConfig and a model's sites to the list of adapters to make; touches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from nolora_vision.config import ROLES, AdapterConfig, did_you_mean
from nolora_vision.surgery.adapter import ADAPTED_LAYERS
from nolora_vision.surgery.layout import Rows
from nolora_vision.surgery.sites import ATOMS, Site, classifier_paths, find_sites, inside, is_pointwise


class InjectionError(ValueError):
    """The model cannot be adapted as asked; it is as it was before the call."""


@dataclass(frozen=True)
class PlannedAdapter:
    """One adapter to make: the layer, its own ranks and alphas, and the parts of a fused layer it is for."""

    site: Site
    configs: Mapping[str, AdapterConfig]
    """By part; of '' for what is one product: the whole layer, or parts that share A."""
    parts: Mapping[str, Rows] | None = None
    """None: the whole layer."""

    @property
    def config(self) -> AdapterConfig:
        """Of its first product."""
        return next(iter(self.configs.values()))

    @property
    def role(self) -> str:
        """What the table of `summary` calls it: the role of the layer, or the parts of it that are adapted."""
        return self.site.role if self.parts is None else "+".join(self.parts)


def plan_adapters(model: nn.Module, config: AdapterConfig) -> list[PlannedAdapter]:
    """Every adapter that the config asks for on this model, in the model's order.

    Raises:
        InjectionError: if nothing matches, a name matches nothing, or a layer that matches cannot be adapted.
    """
    sites = find_sites(model)
    _refuse_multihead_attention(model, config)
    _refuse_unmatched_names(model, sites, config)
    blocks = _chosen_blocks(sites, config)
    plan = []
    for site in sites:
        if blocks is not None and site.block not in blocks:
            continue
        parts = chosen_parts(site, config)
        if parts is not None:
            plan.append(PlannedAdapter(site, _own_configs(site, config, parts), parts or None))
    if not plan:
        raise InjectionError(_nothing_matches(model, sites, config))
    _refuse_idle_patterns(sites, plan, config)
    _refuse_unsupported_layers(model, plan)
    _refuse_too_large_ranks(plan)
    return plan


def matches(selector: str, path: str, *, whole: bool) -> bool:
    """Whether a path matches a suffix (`attn.qkv`), or a regular expression for the whole path, as in PEFT."""
    if whole:
        return re.fullmatch(selector, path) is not None
    return path == selector or path.endswith("." + selector)


def _names(selection: tuple[str, ...] | str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Split targets or exclude into roles, other names, and whether those are regular expressions."""
    items = (selection,) if isinstance(selection, str) else selection
    return tuple(i for i in items if i in ROLES), tuple(i for i in items if i not in ROLES), isinstance(selection, str)


def chosen_parts(site: Site, config: AdapterConfig) -> dict[str, Rows] | None:
    """None: not chosen. {}: the whole layer. Otherwise the output features of each chosen part."""
    target_roles, names, whole = _names(config.targets)
    exclude_roles, exclude_names, exclude_whole = _names(config.exclude)
    if any(matches(name, site.path, whole=exclude_whole) for name in exclude_names):
        return None
    atoms = site.atoms
    excluded = frozenset().union(*(ATOMS[role] for role in exclude_roles))
    if any(matches(name, site.path, whole=whole) for name in names):
        wanted = atoms
        target_roles = ("all",)
        if not atoms:
            return {}
    else:
        wanted = atoms & frozenset().union(*(ATOMS[role] for role in target_roles))
    wanted = wanted - excluded
    if not wanted:
        return None
    together = bool({"qkv", "all"}.intersection(target_roles)) and not excluded & frozenset("qkv")
    if wanted == atoms and (together or len(atoms) == 1):
        return {}
    return _rows_of(site, wanted, together=together)


def _rows_of(site: Site, wanted: Iterable[str], *, together: bool) -> dict[str, Rows]:
    """The output features of the wanted parts; with `together`, q, k and v count as one part."""
    if not site.parts:
        raise InjectionError(
            f"{site.path} makes {', '.join(site.letters)} in one product, and where each lies in its output is unknown "
            f"for this model. Adapt it as a whole with the target 'qkv', or leave it out with exclude={site.path!r}."
        )
    parts = {part: rows for part, rows in site.parts.items() if part in wanted}
    letters = [part for part in parts if part in "qkv"]
    if not together or len(letters) < 2:
        return parts
    merged = tuple(sorted(pair for part in letters for pair in parts[part]))
    return {"qkv": merged, **{part: rows for part, rows in parts.items() if part not in letters}}


def _own_configs(site: Site, config: AdapterConfig, parts: Iterable[str]) -> dict[str, AdapterConfig]:
    ranks = own_values(config, "rank_pattern", site, parts)
    alphas = own_values(config, "alpha_pattern", site, parts)
    found = {}
    for product, rank in ranks.items():
        changes = {} if rank is None else {"rank": int(rank)}
        changes |= {} if alphas[product] is None else {"alpha": alphas[product]}
        found[product] = replace(config, **changes) if changes else config
    return found


def own_values(
    config: AdapterConfig, name: Literal["rank_pattern", "alpha_pattern"], site: Site, parts: Iterable[str]
) -> dict[str, float | None]:
    """The value of each product of a layer: by part, or of '' if it is one; None where no key of the pattern fits.

    The first key counts that is a role of the product, or a suffix or pattern for the layer's path (as in PEFT).

    Raises:
        InjectionError: if a role is a part of a product only, which has one rank and one alpha.
    """
    products = {part: ATOMS[part] for part in parts}
    if config.share_down or not products:
        products = {"": frozenset().union(*products.values())}
    pattern: Mapping[str, float] = getattr(config, name)
    return {part: _value_of(pattern, name, site, atoms or site.atoms) for part, atoms in products.items()}


def _value_of(pattern: Mapping[str, float], name: str, site: Site, atoms: frozenset[str]) -> float | None:
    for key, value in pattern.items():
        if key not in ROLES:
            if _fits(key, site.path):
                return value
        elif atoms <= ATOMS[key] and atoms:
            return value
        elif atoms & ATOMS[key]:
            raise InjectionError(
                f"{name}: {key!r} is only a part of what {site.path} adapts as one ({', '.join(sorted(atoms))}), which "
                f"has one rank and one alpha. Target the parts, targets=('q', 'v') without share_down for example, or "
                f"name the whole."
            )
    return None


def _fits(pattern: str, path: str) -> bool:
    """Whether a pattern matches the path, or its end after a dot."""
    starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
    return any(re.fullmatch(pattern, path[start:]) for start in starts)


def _chosen_blocks(sites: Sequence[Site], config: AdapterConfig) -> set[str] | None:
    if config.layers is None:
        return None
    blocks = list(dict.fromkeys(site.block for site in sites if site.role and site.block))
    outside = [i for i in config.layers if not -len(blocks) <= i < len(blocks)]
    if outside:
        raise InjectionError(
            f"layers={list(config.layers)}: this model has {len(blocks)} blocks, numbered 0 to {len(blocks) - 1} "
            f"({blocks[0] + ' … ' + blocks[-1] if blocks else 'none'}); there is no block {outside[0]}."
        )
    return {blocks[i] for i in config.layers}


def _refuse_multihead_attention(model: nn.Module, config: AdapterConfig) -> None:
    roles, _, _ = _names(config.targets)
    if not frozenset("qkv") & frozenset().union(*(ATOMS[role] for role in roles)):
        return
    found = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if found:
        raise InjectionError(
            f"{found[0]} is a torch.nn.MultiheadAttention, which multiplies with in_proj_weight itself: no layer "
            f"makes q, k and v ({len(found)} in this model). Replace it with an attention that has a qkv Linear "
            f"(timm.layers.Attention), or target other layers, for example targets='mlp'."
        )


def _refuse_unmatched_names(model: nn.Module, sites: Sequence[Site], config: AdapterConfig) -> None:
    """A name that matches no layer is a typo, or in targets a layer that cannot be adapted; say which."""
    heads = classifier_paths(model)
    _refuse_unmatched_exceptions(sites, config, heads)
    _, names, whole = _names(config.targets)
    modules = {path: module for path, module in model.named_modules() if path}
    for name in names:
        if any(matches(name, site.path, whole=whole) for site in sites):
            continue
        hits = {path: module for path, module in modules.items() if matches(name, path, whole=whole)}
        for path, module in hits.items():
            if inside(path, heads):
                raise InjectionError(f"{path} belongs to the classifier, which is trained in full and never adapted.")
            if not is_pointwise(module):
                raise InjectionError(
                    f"{path} is a {type(module).__name__}, which cannot carry an adapter; wanted a torch.nn.Linear or "
                    f"an ungrouped 1×1 torch.nn.Conv2d. Name such layers inside it, or a role: {', '.join(ROLES)}."
                )
        raise _no_such_layer("targets", name, sites)


def _refuse_unmatched_exceptions(sites: Sequence[Site], config: AdapterConfig, heads: Sequence[str]) -> None:
    """Roles that a model lacks are no typos: a config may be for several families. Nor is the head, never adapted."""
    _, excluded, whole = _names(config.exclude)
    paths = [site.path for site in sites]
    for name in excluded:
        if not any(matches(name, path, whole=whole) for path in [*paths, *heads]):
            raise _no_such_layer("exclude", name, sites)


def _refuse_idle_patterns(sites: Sequence[Site], plan: Sequence[PlannedAdapter], config: AdapterConfig) -> None:
    """Names of layers that get no adapter. Roles may be such: a config may be for several families, or targets."""
    adapted = frozenset(planned.site.path for planned in plan)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in (key for key in getattr(config, field) if key not in ROLES):
            fitting = [site.path for site in sites if _fits(key, site.path)]
            if not fitting:
                raise _no_such_layer(field, key, sites)
            if adapted.isdisjoint(fitting):
                raise InjectionError(
                    f"{field}: {key!r} fits {fitting[0]}{f' and {n} more' if (n := len(fitting) - 1) else ''}, but no "
                    f"layer that gets an adapter. Choose such a layer by targets, exclude and layers, or drop the key."
                )


def _no_such_layer(field: str, name: str, sites: Sequence[Site]) -> InjectionError:
    known = [*ROLES, *{site.path.rpartition(".")[2] for site in sites}, *(site.path for site in sites)]
    return InjectionError(f"{field}: no layer matches {name!r}.{did_you_mean(name, known)} {_what_exists(sites)}")


def _refuse_unsupported_layers(model: nn.Module, plan: Sequence[PlannedAdapter]) -> None:
    wanted = tuple(layer.base_class for layer in ADAPTED_LAYERS)
    for planned in plan:
        layer = model.get_submodule(planned.site.path)
        weight = getattr(layer, "weight", None)
        kind = type(layer).__name__ if type(layer) not in wanted else type(weight).__name__
        if type(layer) not in wanted or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise InjectionError(
                f"{planned.site.path} is of type {type(layer).__module__}.{kind}; only plain torch.nn.Linear and 1×1 "
                f"torch.nn.Conv2d with a floating-point weight can carry an adapter, not quantised or custom ones. "
                f"Load the model unquantised, or leave the layer out with exclude={planned.site.path!r}."
            )
        owner = model.get_submodule(planned.site.path.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer):
            raise InjectionError(
                f"{planned.site.path} is read by torch's fused kernel in evaluation, never called. Leave it out with "
                f"exclude={planned.site.path!r}, or use a block that calls its layers, such as timm's."
            )
        if hasattr(layer, "parametrizations"):
            raise InjectionError(f"{planned.site.path} has a parametrization; remove it before injecting.")


def _refuse_too_large_ranks(plan: Sequence[PlannedAdapter]) -> None:
    for planned in plan:
        site = planned.site
        widths = {part: sum(b - a for a, b in rows) for part, rows in (planned.parts or {}).items()}
        for part, config in planned.configs.items():
            width = widths.get(part) or min(widths.values(), default=site.out_features)
            limit = min(site.in_features, width)
            if config.rank > limit:
                raise InjectionError(
                    f"{site.path}: rank {config.rank} is larger than the layer ({part or planned.role}: "
                    f"{site.in_features} → {width} features, so at most {limit}). Choose a smaller rank, set "
                    f"rank_pattern={{{site.path!r}: {limit}}}, or leave the layer out with exclude={site.path!r}."
                )


def _nothing_matches(model: nn.Module, sites: Sequence[Site], config: AdapterConfig) -> str:
    asked = f"targets={config.targets!r}" + (f", exclude={config.exclude!r}" if config.exclude else "")
    return f"{type(model).__name__} has no layer to adapt for {asked}. {_what_exists(sites)}"


def _what_exists(sites: Sequence[Site]) -> str:
    roles = sorted({site.role for site in sites if site.role})
    examples = [site.path for site in sites if site.role] or [site.path for site in sites]
    shown = ", ".join(dict.fromkeys(_one_per_suffix(examples)))
    found = f"Roles found in it: {', '.join(roles)}." if roles else "It has no layer with a role."
    layers = f" Layers by name, for example: {shown}." if shown else " It has no Linear and no 1×1 convolution."
    return f"{found}{layers} Roles to choose from: {', '.join(ROLES)}."


def _one_per_suffix(paths: Sequence[str], most: int = 6) -> list[str]:
    return list({path.rpartition(".")[2]: path for path in reversed(paths)}.values())[::-1][:most]
