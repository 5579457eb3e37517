"""AdapterConfig: what an adapter is and where it goes; frozen, validated, all errors at once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Nonlinearity = Literal["identity", "tanh", "relu", "gelu", "silu", "swish", "residual_tanh", "rational", "aurora"]
Modulation = Literal["none", "vector", "gate"]
Role = Literal["q", "k", "v", "qkv", "proj", "mlp", "fc1", "fc2", "all"]

NONLINEARITIES: tuple[str, ...] = get_args(Nonlinearity)
MODULATIONS: tuple[str, ...] = get_args(Modulation)
ROLES: tuple[str, ...] = get_args(Role)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message lists every problem found, one per line."""

    def __init__(self, owner: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{owner} is not usable:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the nearest known name, or '' if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class AdapterConfig:
    """How each adapter computes, and which layers carry one.

    `y = W x + b + s · B (v ⊙ f(A x))`, with A: (rank, in_features), B: (out_features, rank), v: (rank,).
    A string in `targets` or `exclude` that is no role is a regular expression for whole module paths; a sequence is
    roles or path suffixes, as in PEFT.

    Raises:
        ConfigError: if any field is out of range; every problem is listed.
    """

    rank: int = 8
    """Width r of the bottleneck."""
    alpha: float | None = None
    """Numerator of the scale s = alpha / rank; None means alpha = rank, so s = 1."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    nonlinearity: Nonlinearity = "swish"
    """The function f between A and B; identity makes it LoRA."""
    modulation: Modulation = "gate"
    """The factor after f: none, a trained vector v, or v with an input-dependent gate."""
    dropout: float = 0.0
    """Probability of dropping an input feature on its way into A."""
    modulation_noise: float = 0.0
    """σ of the noise on v in training, `v ⊙ (1 + σ ε)` with ε ~ N(0, 1) for each image, rank and layer; v may be 1."""
    targets: tuple[str, ...] | str = ("qkv", "mlp")
    """Roles (q k v qkv proj mlp fc1 fc2 all), path suffixes, or one regular expression for whole paths."""
    exclude: tuple[str, ...] | str = ()
    """Layers to leave alone, in the same language as targets."""
    layers: tuple[int, ...] | None = None
    """Blocks to adapt, counted from 0 in the model's order (negative: from the end); None means all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank by role, path suffix or regular expression, for the layers that need another one."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alpha by role, path suffix or regular expression."""
    share_down: bool = False
    """On a fused qkv with some of q, k, v as targets: one A for all of them instead of one each."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, (str, tuple)):
                object.__setattr__(self, name, tuple(value))
        problems = [problem for check in _CHECKS for problem in check(self)]
        if problems:
            raise ConfigError("AdapterConfig", problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Build from a mapping, naming unknown keys and their nearest known ones."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(
                "AdapterConfig",
                [f"{key!r} is not a field.{did_you_mean(key, known)} Fields: {', '.join(known)}." for key in unknown],
            )
        return cls(**values)

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for one layer: alpha / rank, or alpha / sqrt(rank) when rank-stabilised; alpha None means rank."""
        numerator = float(rank) if alpha is None else float(alpha)
        return numerator / (math.sqrt(rank) if self.rank_stabilized else rank)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_numbers(config: AdapterConfig) -> Iterable[str]:
    if not _is_rank(config.rank):
        yield f"rank must be an integer of at least 1, got {config.rank!r}."
    if config.alpha is not None and not (_is_number(config.alpha) and config.alpha > 0):
        yield f"alpha must be a positive number, or None for alpha = rank, got {config.alpha!r}."
    if not (_is_number(config.dropout) and 0 <= config.dropout < 1):
        yield f"dropout must be a probability in [0, 1), got {config.dropout!r}."
    if not (_is_number(config.modulation_noise) and config.modulation_noise >= 0):
        yield f"modulation_noise must be a number of at least 0, 0 being off, got {config.modulation_noise!r}."


def _check_names(config: AdapterConfig) -> Iterable[str]:
    for name, known in (("nonlinearity", NONLINEARITIES), ("modulation", MODULATIONS)):
        value = getattr(config, name)
        if value not in known:
            yield f"{name} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}"
    for name in ("rank_stabilized", "share_down"):
        if not isinstance(getattr(config, name), bool):
            yield f"{name} must be True or False, got {getattr(config, name)!r}."


def _check_layers(config: AdapterConfig) -> Iterable[str]:
    layers = config.layers
    if layers is None:
        return
    if not isinstance(layers, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        yield f"layers must be None or a sequence of block numbers, got {layers!r}."
    elif not layers:
        yield "layers is empty, so nothing would be adapted; None means all blocks."


def _check_selectors(config: AdapterConfig) -> Iterable[str]:
    for name in ("targets", "exclude"):
        value = getattr(config, name)
        if isinstance(value, str):
            if value not in ROLES:
                yield from _check_pattern(name, value)
        elif not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
            yield f"{name} must be a string or a sequence of non-empty strings, got {value!r}."
    if not config.targets:
        yield f"targets is empty, so nothing would be adapted. Roles: {', '.join(ROLES)}."


def _check_patterns(config: AdapterConfig) -> Iterable[str]:
    kinds = (
        ("rank_pattern", _is_rank, "integers of at least 1"),
        ("alpha_pattern", lambda a: _is_number(a) and a > 0, "positive numbers"),
    )
    for name, valid, wanted in kinds:
        value = getattr(config, name)
        if not isinstance(value, Mapping):
            yield f"{name} must map layers to numbers, got {value!r}."
            continue
        for key, number in value.items():
            if not isinstance(key, str):
                yield f"{name} needs strings as keys, got {key!r}."
            elif key not in ROLES:
                yield from _check_pattern(name, key)
            if not valid(number):
                yield f"{name}[{key!r}] must be one of the {wanted}, got {number!r}."


def _check_pattern(name: str, pattern: str) -> Iterable[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield f"{name}: {pattern!r} is neither a role nor a regular expression ({error})."


_CHECKS = (_check_numbers, _check_names, _check_layers, _check_selectors, _check_patterns)
