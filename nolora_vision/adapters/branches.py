"""The updates in an adapter file, from the names and shapes of its tensors alone: role, part, scale; no model.

A role is read off a name with the vocabulary of `sites`, which with a model reads the classes of modules as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import AdapterMismatchError, CorruptAdapterError
from nolora_vision.config import ROLES, AdapterConfig, ConfigError
from nolora_vision.kernels import FORMULAS, LowRank
from nolora_vision.surgery.plan import InjectionError, chosen_parts, own_values
from nolora_vision.surgery.sites import (
    ATOMS,
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    WITH_MLP,
    Site,
    meaning,
    mlp_of,
    transforms_tokens,
)

PARTS = ("q", "k", "v", "qkv", "fc1")
"""Names of the branches of a fused layer, in their order."""
MLP_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "pwconv1"), "fc1"),
    **dict.fromkeys(("fc2", "pwconv2", "mlp_out_proj"), "fc2"),
}


class NamedBranch(NamedTuple):
    """One update, and what it is for."""

    path: str
    role: str
    """The role of the layer, or its adapted parts joined by +."""
    part: str
    """'' if it is the layer's only update."""
    operands: LowRank
    """From a file without `rows`, which it does not name."""
    parameters: int


def named_branches(state: Mapping[str, Tensor], said: Mapping[str, Any], place: str) -> Iterator[NamedBranch]:
    """Every update among the tensors of an adapter file, in the order of block numbers.

    Args:
        state: tensors by their names in the bare model.
        said: the fields of the AdapterConfig.
        place: the file, for messages.

    Raises:
        CorruptAdapterError: if the tensors are not those of the config.
        AdapterMismatchError: if a scale goes by a role that a name does not say.
    """
    try:
        config = AdapterConfig.from_dict(said)
    except (ConfigError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise CorruptAdapterError(f"{place}: its adapter config is not usable ({error}).") from error
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, t in state.items():
        path, inside, rest = name.rpartition(".adapter.")
        part, _, parameter = rest.rpartition(".")
        if not inside:
            continue
        if part and part not in PARTS:
            raise CorruptAdapterError(f"{place}: {name} is of a part {part!r}; parts are {', '.join(PARTS)}.")
        found.setdefault(path, {}).setdefault(part, {})[parameter] = t
    roles = roles_of(list(found), config)
    for path, branches in sorted(found.items(), key=lambda item: in_order(item[0])):
        named = [part for part in PARTS if part in branches]
        parts = named or _shared_parts(path, roles[path], config)
        alphas = _alphas(path, roles[path], parts, config, place)
        for part in named or [""]:
            alpha = alphas.get(part)
            operands = _operands(path, branches[part], config, alpha, place)
            count = sum(t.numel() for t in branches[part].values())
            role = "+".join(sorted(parts, key=lambda p: p != "fc1"))  # in the order of the layer's output
            yield NamedBranch(path, role or roles[path], part, operands, count)


def roles_of(paths: Sequence[str], config: AdapterConfig) -> dict[str, str]:
    """Role by path, read off the names alone: '' where they do not say, mlp where they say no more than that."""
    blank: defaultdict[str, nn.Module] = defaultdict(nn.Identity)  # no classes to read, only names
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    wanted = frozenset().union(*(ATOMS.get(target, frozenset()) for target in targets)) & {"fc1", "fc2"}
    roles: dict[str, str] = dict.fromkeys(paths, "")
    members: dict[str, list[str]] = {}
    for path in sorted(paths, key=in_order):
        parts, i = meaning(path)
        if not transforms_tokens(path, blank):
            continue
        owner = mlp_of(path, blank)
        if owner is not None:
            roles[path] = MLP_ROLES.get(parts[i], "mlp")
            members.setdefault(owner, []).append(path)
        else:
            roles[path] = ATTENTION_INPUTS.get(parts[i], "proj" if parts[i] in ATTENTION_OUTPUTS else "")
    for layers in members.values():
        for path in (path for path in layers if roles[path] == "mlp" and wanted):
            last = path == layers[-1] and len(layers) > 1
            roles[path] = next(iter(wanted)) if len(wanted) == 1 else "fc2" if last else "fc1"
    return roles


def in_order(path: str) -> list[tuple[int, int, str]]:
    """A sort key of paths by which block 10 comes after block 9."""
    pieces = re.findall(r"\d+|[^\d.]+", path)
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def _operands(
    path: str, tensors: Mapping[str, Tensor], config: AdapterConfig, alpha: float | None, place: str
) -> LowRank:
    """The tensors of one branch as the kernels take them, if they are those of the config."""
    down = tensors.get("lora_A")
    rank = down.shape[0] if down is not None and down.ndim == 2 else 0
    theta = FORMULAS[config.nonlinearity].theta
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, -1), "lora_B": (-1, rank)}
    wanted |= {name: tuple(make(max(1, rank)).shape) for name, make in theta.items()}
    wanted |= {"v": (rank,)} if config.modulation != "none" else {}
    wanted |= {"gate_weight": (rank, rank), "gate_bias": (rank,)} if config.modulation == "gate" else {}
    for name in sorted(wanted.keys() | tensors.keys()):
        got = tuple(tensors[name].shape) if name in tensors else None
        shape = wanted.get(name)
        fits = got and shape and len(got) == len(shape) and all(w in (-1, g) for w, g in zip(shape, got, strict=True))
        if not fits or not rank or not tensors[name].is_floating_point():
            has = f"no {name}" if got is None else f"{name} of {tensors[name].dtype} and shape {got}"
            needs = f"floating-point of shape {shape}".replace("-1", "n") if shape else "absent"
            raise CorruptAdapterError(
                f"{place}: {path}.adapter has {has}; by the config (f = {config.nonlinearity}, modulation "
                f"{config.modulation}) it must be {needs}. Save the model again."
            )
    gate = (tensors["gate_weight"], tensors["gate_bias"]) if config.modulation == "gate" else None
    return LowRank(
        down=tensors["lora_A"],
        up=tensors["lora_B"],
        v=tensors.get("v"),
        gate=gate,
        nonlinearity=config.nonlinearity,
        theta=tuple(tensors[name] for name in theta),
        scale=config.scale(rank, alpha),
    )


def _alphas(path: str, role: str, parts: Sequence[str], config: AdapterConfig, place: str) -> dict[str, float | None]:
    """By part, of '' for the whole layer or for parts that share A."""
    by_role = [key for key in config.alpha_pattern if key in ROLES]
    unclear = by_role if not role else {"fc1", "fc2"}.intersection(by_role) if role == "mlp" else ()
    if unclear and not parts:
        raise AdapterMismatchError(
            f"{place}: alpha_pattern goes by role ({', '.join(by_role)}), and the name {path} does not say which role "
            f"the layer has, so its scale is unknown here. Load the adapter, and pass the model: anatomy(model)."
        )
    try:
        own = own_values(config, "alpha_pattern", Site(path, role, "", 0, 0), parts)
    except InjectionError as error:
        raise CorruptAdapterError(f"{place}: {error}") from error
    return {part: config.alpha if alpha is None else alpha for part, alpha in own.items()}


def _shared_parts(path: str, role: str, config: AdapterConfig) -> list[str]:
    """The parts that one A serves together, which the file does not name."""
    if not config.share_down or len(role) < 2 or not set(role) <= set("qkv"):
        return []
    names, i = meaning(path)
    parts = (*(("fc1",) if names[i] == WITH_MLP else ()), *role)
    return list(chosen_parts(Site(path, role, "", 0, 0, dict.fromkeys(parts, ((0, 1),))), config) or ())
