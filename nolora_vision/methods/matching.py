"""Methods of one size: the largest rank, block or number of frequencies whose parameters fit a budget.

Symbols: `D` in_features, `E` out_features, `r` rank, `b` block size, `M` bottleneck.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.methods.adaptformer import mlp_shapes
from nolora_vision.methods.apply import apply_method, own_config
from nolora_vision.methods.catalogue import METHODS, MethodError, chosen_options
from nolora_vision.methods.limits import DIVIDES, common_block_size, refuse_unfit_layers
from nolora_vision.methods.peft_layers import plan_layers
from nolora_vision.surgery.groups import head_parameters
from nolora_vision.surgery.low_rank_adapter import make_adapter
from nolora_vision.surgery.plan import PlannedAdapter, own_values, plan_adapters

Options = Mapping[str, Any]
Count = Callable[[int], int]
"""Parameters of all adapters at a value of the knob."""


@dataclass(frozen=True)
class Matched:
    """A method at the size that fits."""

    adapter: AdapterConfig
    options: dict[str, Any]
    parameters: int
    """That train, without the head."""
    knob: str
    """What was chosen: rank, n_frequency, block_size or bottleneck; `fixed` if the method has one size."""


def match_parameters(
    make_model: Callable[[], nn.Module],
    method: str,
    adapter: AdapterConfig,
    budget: int,
    *,
    options: Options | None = None,
) -> Matched:
    """The largest form of a method that trains no more than `budget` parameters, the head apart.

    Args:
        make_model: makes a bare model; called once, on the meta device.
        adapter: where the adapters go; its rank (if that is the knob) is what is chosen, its `rank_pattern` stays.
        budget: parameters.
        options: of the method; one that is the knob is what is chosen.

    Returns:
        What to give to `apply_method`. Of a method with one size that size, whatever the budget; of equal sizes the one
        with the larger knob.

    Raises:
        ConfigError: if there is no such method or option.
        InjectionError: if the method cannot run on the model, or its smallest form exceeds the budget (MethodError).
    """
    given, knob = dict(options or {}), METHODS[method].knob if method in METHODS else None
    chosen = chosen_options(method, given)
    with torch.device("meta"):
        model = make_model()
    if knob is None:
        apply_method(model, method, adapter, options=given)
        return Matched(adapter, given, trained_without_head(model), "fixed")
    values, count = _sizes(model, method, adapter, chosen)
    value = _largest_within(values, count, budget, rising=method != "randlora" and knob != "block_size")
    if value is None:
        least = min(map(count, values if knob == "block_size" else (values[0], values[-1])))
        raise MethodError(f"{method}: its smallest form trains {least:,} parameters, more than the {budget:,} allowed.")
    parameters = count(value)
    if knob == "rank":
        return Matched(replace(adapter, rank=value), given, parameters, knob)
    return Matched(adapter, {**given, knob: value}, parameters, knob)


def trained_without_head(model: nn.Module) -> int:
    """How many parameters train, the classifier's apart."""
    heads = set(head_parameters(model))
    return sum(p.numel() for p in model.parameters() if p.requires_grad and p not in heads)


def _largest_within(values: Sequence[int], count: Count, budget: int, *, rising: bool) -> int | None:
    """The value of the knob with the most parameters within the budget; None if each has more."""
    if rising:
        fitting = bisect_right(values, budget, key=count)
        return values[fitting - 1] if fitting else None
    sizes = [(count(value), value) for value in values]
    return max((size for size in sizes if size[0] <= budget), default=(0, None))[1]


def _sizes(model: nn.Module, method: str, adapter: AdapterConfig, options: Options) -> tuple[Sequence[int], Count]:
    """The values that the knob may have, and what each costs."""
    if method == "adaptformer":
        shapes = mlp_shapes(model, adapter).values()
        widest = max(max(shape) for shape in shapes)
        return range(1, widest + 1), lambda m: sum(m * (d + e) + m + e for d, e in shapes)
    if METHODS[method].group == "ours":
        return _own_sizes(model, own_config(method, adapter))
    plan = plan_layers(model, method, replace(adapter, rank=1))
    knob = METHODS[method].knob
    if knob == "block_size":
        values = [b for b in _blocks(method, plan) if _fits(model, method, adapter, {**options, "block_size": b}, plan)]
        if not values:  # say why not even the smallest fits
            refuse_unfit_layers(model, method, adapter, {**options, "block_size": 1}, plan)
            raise MethodError(f"{method} has no block size that fits every layer.")
    else:
        refuse_unfit_layers(model, method, adapter, {**options, "n_frequency": 1} if knob != "rank" else options, plan)
        values = range(1, _largest(method, plan) + 1)
    own = [next(iter(own_values(adapter, "rank_pattern", p.site, p.parts or ()).values())) for p in plan]
    layers = Counter((p.site.in_features, p.site.out_features, rank) for p, rank in zip(plan, own, strict=True))
    formula = FORMULAS[method]

    def count(value: int) -> int:
        return sum(n * formula(d, e, int(rank or value), options) for (d, e, rank), n in layers.items())

    return values, count


def _fits(model: nn.Module, method: str, adapter: AdapterConfig, options: Options, plan: list[PlannedAdapter]) -> bool:
    try:
        refuse_unfit_layers(model, method, adapter, options, plan)
    except MethodError:
        return False
    return True


def _blocks(method: str, plan: list[PlannedAdapter]) -> list[int]:
    """Divisors of every width that the block size must divide; of one feature a rotation has no parameter."""
    both = "output" in DIVIDES[method]
    common = common_block_size(plan) if both else math.gcd(*(planned.site.in_features for planned in plan))
    return [b for b in range(1 if both else 2, common + 1) if common % b == 0]


def _largest(method: str, plan: list[PlannedAdapter]) -> int:
    """Of a rank: that of the smallest layer; of VeRA's, whose matrices are free of cost, that of the widest."""
    sides = [(p.site.in_features, p.site.out_features) for p in plan]
    if method == "fourierft":
        return min(d * e for d, e in sides)
    return max(max(side) for side in sides) if method == "vera" else min(min(side) for side in sides)


FORMULAS: Mapping[str, Callable[[int, int, int, Options], int]] = {
    **dict.fromkeys(("peft-lora", "rslora", "lora-plus", "pissa", "hira"), lambda d, e, r, _options: r * (d + e)),
    "dora": lambda d, e, r, _options: r * (d + e) + e,
    "vera": lambda _d, e, r, _options: r + e,
    "fourierft": lambda _d, _e, n, _options: n,
    "peanut": lambda _d, e, r, options: 2 * r * e + 2 * options["depth"] * r * r,
    "randlora": lambda d, e, r, _options: math.ceil(min(d, e) / r) * (r + min(d, e)),
    "c3a": lambda d, e, b, _options: d * e // b,
    "oft": lambda d, _e, b, _options: d * (b - 1) // 2,
    "boft": lambda d, e, b, _options: d * b + e,
}
"""Parameters of one layer, from D, E, the knob and the options."""


def _own_sizes(model: nn.Module, adapter: AdapterConfig) -> tuple[Sequence[int], Count]:
    plan = plan_adapters(model, replace(adapter, rank=1))
    own = [tuple(own_values(adapter, "rank_pattern", p.site, p.parts or ()).items()) for p in plan]
    layers: Counter[Any] = Counter()
    for planned, ranks in zip(plan, own, strict=True):
        parts = None if planned.parts is None else tuple(planned.parts.items())
        layers[planned.site.in_features, planned.site.out_features, parts, ranks] += 1

    def count(value: int) -> int:
        total = 0
        for (d, e, parts, ranks), n in layers.items():
            configs = {part: replace(adapter, rank=int(rank or value)) for part, rank in ranks}
            first, parts = next(iter(configs.values())), None if parts is None else dict(parts)
            made = make_adapter(d, e, first, parts=parts, configs=configs, device="meta")
            total += n * sum(p.numel() for p in made.parameters())
        return total

    parts_of = [(p.site.in_features, p.parts or {"": ((0, p.site.out_features),)}) for p in plan]
    widths = [min(d, *(sum(b - a for a, b in rows) for rows in parts.values())) for d, parts in parts_of]
    return range(1, min(widths) + 1), count
