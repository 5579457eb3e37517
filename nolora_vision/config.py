"""AdapterConfig: what an adapter is and where it goes; frozen, validated, all errors at once."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Nonlinearity = Literal["identity", "tanh", "relu", "gelu", "silu", "swish", "residual_tanh", "rational", "aurora"]
Modulation = Literal["none", "vector", "gate"]
Role = Literal["q", "k", "v", "qkv", "proj", "mlp", "fc1", "fc2", "all"]

NONLINEARITIES: tuple[str, ...] = get_args(Nonlinearity)
MODULATIONS: tuple[str, ...] = get_args(Modulation)
ROLES: tuple[str, ...] = get_args(Role)


LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38
"""What 32 bits hold; no field of a config has a use for more."""


class Problem(str):
    """A sentence about what is wrong, and the fields that it is about, by their dotted names."""

    fields: tuple[str, ...]

    def __new__(cls, text: str, *fields: str) -> Problem:
        problem = super().__new__(cls, text)
        problem.fields = fields
        return problem

    def within(self, owner: str) -> Problem:
        """The same about a field's own fields."""
        return Problem(f"{owner}.{self}", *(f"{owner}.{name}" for name in self.fields))


class ConfigError(ValueError):
    """A configuration that cannot be used. The message lists every problem found, one per line."""

    def __init__(self, owner: str, problems: Iterable[str]) -> None:
        self.owner = owner
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__(f"{owner} is not usable:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the nearest known name, or '' if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long or deep: a few lines of YAML can make one of gigabytes."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 10


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
    """Rank by role, path suffix or regular expression, for layers, or parts with their own A, that need another."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alpha by role, path suffix or regular expression."""
    share_down: bool = False
    """On a fused qkv with some of q, k, v as targets: one A for all of them instead of one each."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, (str, bytes, tuple, Mapping, set, frozenset)):
                object.__setattr__(self, name, tuple(value))
        problems = [problem for check in _CHECKS for problem in check(self)]
        if problems:
            raise ConfigError("AdapterConfig", problems)
        for name in ("alpha", "dropout", "modulation_noise"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", {key: float(value) for key, value in self.alpha_pattern.items()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Build from a mapping, naming unknown keys and their nearest known ones beside whatever else is wrong."""
        known = [f.name for f in fields(cls)]
        unknown = [
            Problem(f"{shown(key)} is not a field.{did_you_mean(key, known)} Fields: {', '.join(known)}.", str(key))
            for key in values
            if key not in known
        ]
        try:
            config = cls(**{name: values[name] for name in known if name in values})
        except ConfigError as error:
            raise ConfigError("AdapterConfig", [*unknown, *error.problems]) from None
        if unknown:
            raise ConfigError("AdapterConfig", unknown)
        return config

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for one layer: alpha / rank, or alpha / sqrt(rank) when rank-stabilised; alpha None means rank."""
        numerator = float(rank) if alpha is None else float(alpha)
        return numerator / (math.sqrt(rank) if self.rank_stabilized else rank)


def _is_number(value: object) -> bool:
    """Whether it is finite, and such that float32 holds it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST_FLOAT <= value <= LARGEST_FLOAT


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST_INT <= value <= LARGEST_INT


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_whole(value) and value >= 1


def _check_numbers(config: AdapterConfig) -> Iterable[Problem]:
    kinds = (
        ("rank", _is_rank, "an integer of at least 1"),
        ("alpha", lambda a: a is None or (_is_number(a) and a > 0), "a positive number, or None for alpha = rank"),
        ("dropout", lambda p: _is_number(p) and 0 <= p < 1, "a probability in [0, 1)"),
        ("modulation_noise", lambda s: _is_number(s) and s >= 0, "a number of at least 0, 0 being off"),
    )
    for name, valid, wanted in kinds:
        value = getattr(config, name)
        if not valid(value):
            yield Problem(f"{name} must be {wanted}, got {shown(value)}.", name)


def _check_names(config: AdapterConfig) -> Iterable[Problem]:
    for name, known in (("nonlinearity", NONLINEARITIES), ("modulation", MODULATIONS)):
        value = getattr(config, name)
        if value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            yield Problem(f"{name} must be one of {', '.join(known)}, got {shown(value)}.{hint}", name)
    for name in ("rank_stabilized", "share_down"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            yield Problem(f"{name} must be True or False, got {shown(value)}.", name)


def _check_layers(config: AdapterConfig) -> Iterable[Problem]:
    layers = config.layers
    if layers is None:
        return
    if not isinstance(layers, tuple) or not all(map(_is_whole, layers)):
        yield Problem(f"layers must be None or a sequence of block numbers, got {shown(layers)}.", "layers")
    elif not layers:
        yield Problem("layers is empty, so nothing would be adapted; None means all blocks.", "layers")


def _check_selectors(config: AdapterConfig) -> Iterable[Problem]:
    for name in ("targets", "exclude"):
        value = getattr(config, name)
        if isinstance(value, str):
            if value not in ROLES:
                yield from _check_pattern(name, value)
        elif not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
            wanted = "a string or a sequence of non-empty strings"
            yield Problem(f"{name} must be {wanted}, got {shown(value)}.", name)
    if config.targets in ("", ()):
        yield Problem(f"targets is empty, so nothing would be adapted. Roles: {', '.join(ROLES)}.", "targets")


def _check_patterns(config: AdapterConfig) -> Iterable[Problem]:
    kinds = (
        ("rank_pattern", _is_rank, "integers of at least 1"),
        ("alpha_pattern", lambda a: _is_number(a) and a > 0, "positive numbers"),
    )
    for name, valid, wanted in kinds:
        value = getattr(config, name)
        if not isinstance(value, Mapping):
            yield Problem(f"{name} must map layers to numbers, got {shown(value)}.", name)
            continue
        for key, number in value.items():
            if not isinstance(key, str) or not key:
                yield Problem(f"{name} needs strings as keys, got {shown(key)}.", name)
            elif key not in ROLES:
                yield from _check_pattern(name, key)
            if not valid(number):
                yield Problem(f"{name}[{shown(key)}] must be one of the {wanted}, got {shown(number)}.", name)


def _check_pattern(name: str, pattern: str) -> Iterable[Problem]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        text = f"{name}: {shown(pattern)} is neither a role nor a regular expression ({error})."
        yield Problem(text, name)


_CHECKS = (_check_numbers, _check_names, _check_layers, _check_selectors, _check_patterns)
