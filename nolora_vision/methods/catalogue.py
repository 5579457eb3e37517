"""The methods by name: what each trains, its options, the rate to start from, and the knob that sets its size.

Where LoRA's rate does not fit, one was found by hand on digits with the demo's ViT and one seed, as a multiple of
LoRA's. Those of full and bitfit are common ones; fourierft's, and its scaling, are its authors' for ViT-B: what an
update is worth depends on the size of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nolora_vision.config import LARGEST_FLOAT, LARGEST_INT, ConfigError, did_you_mean, shown
from nolora_vision.surgery.plan import InjectionError

Group = Literal["ours", "peft", "own module", "selective", "whole"]
Knob = Literal["rank", "n_frequency", "block_size", "bottleneck"]


class MethodError(InjectionError):
    """The method cannot run on this model, or not as asked; the model is as it was before the call."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    description: str
    group: Group
    knob: Knob | None = None
    """What makes it larger or smaller: the adapter's rank or an option; None: its size is fixed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options and their defaults; None means that the model or the adapter's rank decides."""
    lr: float = 2e-3
    """Peak learning rate where none is given: a place to start a sweep, not a tuned one."""


GROUPS: Mapping[str, str] = {"lr_ratio": "adapter_b", "rank_space_lr_ratio": "adapter_rank_space"}
"""Options that set a rate over A's → the optimizer group that it is the rate of."""

_PRNG = {"projection_prng_key": 0}
_LORA = {"lr_ratio": 1.0, "init_gain": 1.0}  # B's rate over A's (LoRA+), and A at its start over LoRA's
_OURS = {**_LORA, "rank_space_lr_ratio": 1.0}  # the rate of v, G, c and θ over A's
METHODS: Mapping[str, Method] = {
    "nolora": Method("nonlinear low-rank adapters, as the adapter config says", "ours", "rank", _OURS),
    "lora": Method("the same without nonlinearity and modulation: LoRA", "ours", "rank", _LORA),
    "aurora": Method("AuroRA's nonlinearity between A and B, no modulation", "ours", "rank", _OURS),
    "linear": Method("the classifier alone", "whole"),
    "full": Method("everything", "whole", lr=1e-4),
    "bitfit": Method("every bias", "selective", lr=1e-3),
    "layernorm": Method("weights and biases of the norms", "selective", lr=5e-3),
    "adaptformer": Method(
        "AdaptFormer's bottleneck beside each MLP",
        "own module",
        "bottleneck",
        {"bottleneck": None, "scale": 0.1},
        lr=5e-3,
    ),
    "peft-lora": Method("PEFT's LoRA", "peft", "rank", {"lr_ratio": 1.0}),
    "rslora": Method("PEFT's LoRA scaled by alpha / sqrt(rank)", "peft", "rank", {"lr_ratio": 1.0}),
    "lora-plus": Method("PEFT's LoRA, B at lr_ratio times the rate of A", "peft", "rank", {"lr_ratio": 16.0}),
    "dora": Method("direction by LoRA, magnitude by itself", "peft", "rank", {"lr_ratio": 1.0}),
    "pissa": Method("LoRA that starts as W's principal part", "peft", "rank"),
    "vera": Method("vectors on shared random matrices", "peft", "rank", {**_PRNG, "d_initial": 0.1}, lr=2e-2),
    "fourierft": Method(
        "a few frequencies of the update's Fourier transform",
        "peft",
        "n_frequency",
        {"n_frequency": 1000, "scaling": 300.0, "random_loc_seed": 777},
        lr=3e-1,
    ),
    "hira": Method("a low-rank factor times W, entry by entry", "peft", "rank", lr=3e-2),
    "peanut": Method(
        "NEAT: a small nonlinear network of W", "peft", "rank", {"depth": 0, "scaling": 1.0, "act_fn": "relu"}
    ),
    "randlora": Method(
        "full rank from scaled random bases; a smaller rank is larger",
        "peft",
        "rank",
        {**_PRNG, "randlora_alpha": None},
        lr=5e-4,
    ),
    "c3a": Method("block-circular convolution", "peft", "block_size", {"block_size": None}, lr=5e-2),
    "oft": Method("rotation of the inputs in blocks", "peft", "block_size", {"block_size": 32}, lr=1e-3),
    "boft": Method("butterfly rotation of the inputs", "peft", "block_size", {"block_size": 4}, lr=5e-3),
    "ia3": Method("one factor for each feature", "peft", lr=3e-2),
}
"""Every method by its key in YAML and on the command line."""


def _whole(least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INT


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST_FLOAT


_RULES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("n_frequency", "block_size", "bottleneck", "randlora_alpha"), ("whole, from 1", _whole(1))),
    **dict.fromkeys(("depth", "projection_prng_key", "random_loc_seed"), ("whole, from 0", _whole(0))),
    **dict.fromkeys(
        ("lr_ratio", "rank_space_lr_ratio", "init_gain", "scale", "scaling", "d_initial"),
        ("a positive number", _positive),
    ),
    "act_fn": ("a name", lambda value: isinstance(value, str) and bool(value)),
}


def method_problems(method: str, options: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with a method's name and its options, one sentence each."""
    if method not in METHODS:
        yield f"method must be one of {', '.join(METHODS)}, got {method!r}.{did_you_mean(method, METHODS)}"
        return
    known = METHODS[method].options
    allowed = f"Options of {method}: {', '.join(known) or 'none'}."
    for name, value in options.items():
        if name not in known:
            yield f"method_options: {name!r} is no option of {method}.{did_you_mean(name, known)} {allowed}"
        elif not _RULES[name][1](value):
            yield f"method_options: {name} must be {_RULES[name][0]}, got {shown(value)}."


def chosen_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method, the given ones and the defaults of the others.

    Raises:
        ConfigError: if there is no such method or option, or a value is out of range; every problem is listed.
    """
    problems = list(method_problems(method, options))
    if problems:
        raise ConfigError("The method", problems)
    return {**METHODS[method].options, **options}
