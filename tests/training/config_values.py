"""Values for fields of configs, from the fields' own annotations: what each takes, and what hardly any does."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st

from nolora_vision.methods.catalogue import METHODS

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2.5, -0.5, math.nan, math.inf, -math.inf, 10**30, 10**400, -(10**400), 1e300),
    *("", " ", "x", "3", "1e3", "no", "a\0b", "../x", "/tmp/x", "\ud800", b"x", date(2024, 1, 1), 3j, object()),
    *((), [], [1], [0.3, 0.9], (0.3, 0.9), ["q"], [[]], {}, {"a": 1}, {1: 2}, {"": 1}, {"a": None}, {"a": [1]}),
    *({"a": math.nan}, {"a": 10**400}, {"a": {"b": 1}}, {1, 2}),
)
"""Each is nonsense for most fields."""

NAMES: Mapping[str, Sequence[Any]] = {
    "model": (
        "vit_tiny_patch16_224",
        "test_vit",
        "vit_tiny_patch16_224.augreg_in21k",
        "hf-hub:a/b",
        "test_vit.r160_in1k",
    ),
    "dataset": ("cifar10", "digits", "digits:5-9", "vtab:cifar", "a/b", "x.safetensors"),
    "method": tuple(METHODS),
    "method_options": ({}, {"lr_ratio": 16}, {"lr_ratio": 2.5}, {"n_frequency": 5}, {"block_size": 4}),
    "opt": ("adamw", "sgd", "lion", "lookahead_adam"),
    "aa": (None, "rand-m9-mstd0.5", "augmix-m3"),
    "experiment": (None, "a", "lora, r 8", "1e3", "no", "2024-01-01", "010", "é"),
    "pretrained_path": (None, "a.safetensors", "b/c.safetensors"),
    "img_size": (None, 64, 224),
    "adapter.targets": (("qkv",), ("q", "v"), ["fc1", "mlp.fc2"], "blocks.*", "all"),
    "adapter.exclude": ((), ("fc2",), "blocks.0.*"),
    "adapter.layers": (None, (0, -1), [1]),
    "adapter.rank_pattern": ({}, {"q": 2}, {"fc1": 3, "blocks.0.*": 1}),
    "adapter.alpha_pattern": ({}, {"q": 2}, {"fc1": 0.5}),
    "adapter.alpha": (None, 1, 16.0),
    "adapter.dropout": (0, 0.1),
    "adapter.modulation_noise": (0, 0.5),
    "adapter.rank": (1, 8, 64),
}
"""Good values of fields that take only some of what their annotation says."""


def takes(kind: Any, value: Any) -> bool:
    """Whether a value is one of an annotation: told anew, without pydantic."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return takes(args[0], value) and all(_fits(value, part) for part in args[1:])
    if origin in (Union, types.UnionType):
        return any(takes(arg, value) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(takes, args, value))
    if origin is dict:
        return isinstance(value, dict) and all(takes(args[0], k) and takes(args[1], v) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(takes(args[0], item) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e308
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value and "\ud800" not in value
    if kind is Path:
        return isinstance(value, Path) or (isinstance(value, str) and bool(value.strip()) and "\0" not in value)
    return isinstance(value, kind)


def _fits(value: Any, bound: Any) -> bool:
    return {
        Ge: lambda: value >= bound.ge, Gt: lambda: value > bound.gt, Le: lambda: value <= bound.le,
        Lt: lambda: value < bound.lt,
    }.get(type(bound), lambda: True)()  # fmt: skip


def good(name: str, kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes, were it alone."""
    if name in NAMES:
        return st.sampled_from(NAMES[name])
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*(good(name, arg) for arg in args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.tuples(*(good(name, arg) for arg in args)).map(sorted)
    if origin is dict:
        return st.dictionaries(st.sampled_from(["depth", "drop_rate", "patch_size"]), good(name, args[1]), max_size=2)
    if origin is list:
        return st.lists(good(name, args[0]), max_size=3)
    base, bounds = (args[0], args[1:]) if origin is Annotated else (kind, ())
    least = next((bound for part in bounds if (bound := getattr(part, "ge", getattr(part, "gt", None))) is not None), 0)
    most = next((bound for part in bounds if (bound := getattr(part, "le", getattr(part, "lt", None))) is not None), 99)
    if base is int:
        return st.integers(least, least + 9) | st.integers(least, most)
    if base is float:
        return st.floats(least, min(most, 0.99), exclude_min=any(isinstance(part, Gt) for part in bounds))
    return {bool: st.booleans(), types.NoneType: st.none()}.get(base, st.sampled_from(["a", "b/c", "e é", "7", "12e4"]))


def junk() -> st.SearchStrategy[Any]:
    """Anything that YAML can hold."""
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=6),
        st.sampled_from([value for value in ODD if type(value) not in (complex, set, object)]),
    )  # fmt: skip
    keys = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none())
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
    )
