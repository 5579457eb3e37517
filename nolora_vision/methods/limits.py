"""Which layers and settings a peer's method takes: what it cannot is refused in a sentence, before anything is done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.methods.catalogue import MethodError
from nolora_vision.surgery.plan import PlannedAdapter

LORA_FAMILY = frozenset({"peft-lora", "rslora", "lora-plus", "dora", "pissa"})
WITH_PATTERNS = LORA_FAMILY | {"hira"}
WITH_DROPOUT = LORA_FAMILY | {"vera", "hira", "randlora"}
WITH_CONVOLUTIONS = LORA_FAMILY - {"pissa"}
DIVIDES: Mapping[str, tuple[str, ...]] = {"oft": ("input",), "boft": ("input",), "c3a": ("input", "output")}
"""Sides of a layer that the block size must divide."""


def refuse_unfit_layers(
    model: nn.Module, method: str, adapter: AdapterConfig, options: Mapping[str, Any], plan: Sequence[PlannedAdapter]
) -> dict[str, Any]:
    """Options with a block size for None, once it is clear that every layer can carry the method.

    Raises:
        MethodError: with one reason, if not.
    """
    refuse_settings(method, adapter)
    for planned in plan:
        path = planned.site.path
        if planned.parts is not None:
            raise MethodError(
                f"{method} cannot run on a part of a fused layer: {path} makes {', '.join(planned.site.letters)} in "
                f"one product and the targets name {', '.join(planned.parts)} of it. Target qkv."
            )
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Conv2d) and method not in WITH_CONVOLUTIONS:
            raise MethodError(f"{method} cannot run on convolutions, and {path} is one. Leave it out with exclude=.")
    options = dict(options)
    if options.get("block_size", 0) is None:
        options["block_size"] = common_block_size(plan)
    _refuse_sizes(method, options, plan)
    return options


def common_block_size(plan: Sequence[PlannedAdapter]) -> int:
    """The greatest common divisor of all in_features and out_features: C3A's smallest form."""
    return math.gcd(*(n for planned in plan for n in (planned.site.in_features, planned.site.out_features)))


def refuse_settings(method: str, adapter: AdapterConfig) -> None:
    """Refuse what the adapter config asks for and the method has not.

    Raises:
        MethodError: naming the fields.
    """
    problems = [text for _, text in setting_problems(method, adapter)]
    if problems:
        raise MethodError("\n".join(problems))


def setting_problems(method: str, adapter: AdapterConfig) -> Iterator[tuple[str, str]]:
    """Fields of the adapter config that the method has no use for, each with a sentence."""
    if adapter.dropout and method not in WITH_DROPOUT:
        text = f"{method} has no dropout, and the adapter config asks for {adapter.dropout:g}. Set it to 0."
        yield "dropout", text
    if adapter.modulation_noise:
        text = f"{method} has no v, so modulation_noise {adapter.modulation_noise:g} does nothing. Set it to 0."
        yield "modulation_noise", text
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(adapter, name) and method not in WITH_PATTERNS:
            yield name, f"{method} is the same on every layer: it takes no {name}."


def _refuse_sizes(method: str, options: Mapping[str, Any], plan: Sequence[PlannedAdapter]) -> None:
    for planned in plan:
        site = planned.site
        for side in DIVIDES.get(method, ()):
            width = site.in_features if side == "input" else site.out_features
            if width % options["block_size"]:
                raise MethodError(
                    f"{method} needs a block size that divides every layer's {side}: {site.path} has {width} features "
                    f"there, block_size is {options['block_size']}."
                )
        if method == "fourierft" and options["n_frequency"] > site.in_features * site.out_features:
            most = site.in_features * site.out_features
            raise MethodError(
                f"fourierft: n_frequency {options['n_frequency']:,} exceeds {site.path}'s {most:,} entries."
            )
