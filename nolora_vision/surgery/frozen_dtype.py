"""Frozen weights held in the compute type of autocast: half their memory, and no cast of them in every step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.kernels.eager import autocasts
from nolora_vision.surgery.adapter import ADAPTED_LAYERS
from nolora_vision.surgery.applied import applied_to
from nolora_vision.surgery.sites import classifier_paths, inside
from nolora_vision.surgery.wrappers import bare_model, bare_name, bare_state

HELD = "_nolora_held"
"""Attribute of a model whose frozen weights are held: the `Held` of it."""
LOADED = "_nolora_loaded"
"""Attribute of a model: names of backbone parameters that an adapter brought, to be saved again though frozen."""
HOLDABLE_DTYPES = (torch.bfloat16, torch.float16)
PLAIN_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, *ADAPTED_LAYERS)
"""Exactly these: a subclass may do anything with its weight, such as standardise it in fp32 (timm's StdConv2d)."""
PADDED_CONVOLUTION = "Conv2dSame"
"""timm's: it pads, and then is a plain convolution."""
READS_DTYPE = re.compile(r"PositionalEncodingFourier|GPSA")
"""timm's modules, by class, that compute something else in the type of their layer's weight: EdgeNeXt's sines, and
ConViT's relative positions, which it keeps in that type when the weight has its own again."""


@dataclass(frozen=True)
class HeldWeight:
    """One parameter: what it was."""

    dtype: torch.dtype
    sample: tuple[float, ...]
    """Some of its values before, see `spread_values`."""
    original: Tensor | None
    """The parameter before, on the CPU, if it was asked to be kept."""


@dataclass(frozen=True)
class Held:
    """What `hold_frozen` changed."""

    dtype: torch.dtype
    weights: dict[str, HeldWeight]
    """By parameter name in the bare model."""


def hold_frozen(model: nn.Module, dtype: torch.dtype, *, keep_original: bool = True) -> Held:
    """Cast the frozen weights and biases of linear layers and convolutions to the type that autocast computes in.

    Under autocast the model's outputs and gradients stay the same, bit for bit: the casts that happened in every step
    happen once. Outside autocast the model turns autocast to this type on for its own forward; to call parts of it
    (`forward_features`), do so yourself. Adapters, the classifier, norms, embeddings, position tables and whatever
    trains keep their type, and so do weights that a peer's adapter computes with itself. An adapter that is saved names
    the weights as they were, so it fits the plain backbone.

    Args:
        model: with its frozen parameters frozen already: after `inject` or `freeze_backbone`.
        dtype: torch.bfloat16 or torch.float16, that of autocast.
        keep_original: keep the weights as they are now on the CPU, so that `release_frozen` brings them back exactly.

    Returns:
        What was changed; without weights if nothing is frozen.

    Raises:
        ValueError: if the dtype is another one, or the weights are held already in another one.
    """
    if dtype not in HOLDABLE_DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, which autocast computes in, got {dtype}.")
    bare = bare_model(model)
    held: Held = getattr(bare, HELD, Held(dtype, {}))
    if held.dtype != dtype:
        raise ValueError(f"The weights are held in {held.dtype} already. Call release_frozen(model) first.")
    for name, parameter in _holdable(bare):
        original = parameter.detach().to("cpu", copy=True) if keep_original else None
        held.weights[name] = HeldWeight(parameter.dtype, spread_values(parameter), original)
        parameter.data = parameter.data.to(dtype)
    if held.weights and not hasattr(bare, HELD):
        setattr(bare, HELD, held)
        bare.register_forward_pre_hook(_enter_autocast)
        bare.register_forward_hook(_leave_autocast, always_call=True)
    return held


def release_frozen(model: nn.Module) -> bool:
    """Undo `hold_frozen`: weights of their own type again, exactly as before if the originals were kept.

    Otherwise they stay rounded to the type that they were held in, and so do those that were loaded or trained since.

    Returns:
        Whether anything was held.
    """
    bare = bare_model(model)
    held: Held | None = getattr(bare, HELD, None)
    if held is None:
        return False
    own = bare_state(bare)
    for name, weight in held.weights.items():
        if name in own:
            own[name].data = _before(own[name].data, weight, held.dtype).to(weight.dtype)
    for hooks, hook in ((bare._forward_pre_hooks, _enter_autocast), (bare._forward_hooks, _leave_autocast)):
        for key in [key for key, found in hooks.items() if found is hook]:
            del hooks[key]
            bare._forward_hooks_always_called.pop(key, None)
    delattr(bare, HELD)
    return True


def _before(now: Tensor, weight: HeldWeight, dtype: torch.dtype) -> Tensor:
    """The original on the weight's device, if it was kept and what is there now is still the original, rounded."""
    if weight.original is None:
        return now
    original = weight.original.to(now.device)
    return original if now.is_meta or torch.equal(original.to(dtype).to(now.dtype), now) else now


def no_longer_held(model: nn.Module, names: Iterable[str]) -> None:
    """Parameters of a bare model that get other values: in their own type again, and left alone by `release_frozen`."""
    held: Held | None = getattr(model, HELD, None)
    if held is None:
        return
    own = bare_state(model)
    for name in names:
        if name in held.weights:
            own[name].data = own[name].data.to(held.weights.pop(name).dtype)


def held_in(model: nn.Module) -> torch.dtype | None:
    """The type that a model's frozen weights are held in, or None."""
    held: Held | None = getattr(bare_model(model), HELD, None)
    return None if held is None else held.dtype


def sample_of(model: nn.Module, name: str, weight: Tensor) -> list[float]:
    """`spread_values` of a weight as it was before it was held; as it is, if another was put there since."""
    now, held = spread_values(weight), getattr(bare_model(model), HELD, None)
    if held is not None and name in held.weights:
        before = held.weights[name].sample
        if torch.equal(torch.tensor(before).to(weight.dtype), torch.tensor(now).to(weight.dtype)):
            return list(before)
    return list(now)


@torch.no_grad()
def spread_values(t: Tensor, count: int = 4) -> tuple[float, ...]:
    """`count` values of a tensor, from its first to its last."""
    flat = t.detach().reshape(-1)
    return tuple(float(flat[i * (len(flat) - 1) // (count - 1)]) for i in range(count))


def _holdable(bare: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Frozen fp32 parameters that nothing reads but plain layers, by bare name."""
    kept = [*classifier_paths(bare), *(p for p, m in bare.named_modules() if READS_DTYPE.fullmatch(type(m).__name__))]
    applied = applied_to(bare)
    kept += [] if applied is None else applied.unheld
    brought = frozenset(getattr(bare, LOADED, ()))  # they will be saved: in full
    layers = {path: m for path, m in bare.named_modules() if _is_plain(m) and not inside(path, kept)}
    own = {id(layer) for layer in layers.values()}
    elsewhere = {id(p) for m in bare.modules() if id(m) not in own for p in m.parameters(recurse=False)}
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters(recurse=False):
            full = bare_name(f"{path}.{name}" if path else name)
            frozen = not parameter.requires_grad and parameter.dtype == torch.float32 and not parameter.is_meta
            if frozen and name in ("weight", "bias") and id(parameter) not in elsewhere and full not in brought:
                yield full, parameter


def _is_plain(module: nn.Module) -> bool:
    return type(module) in PLAIN_LAYERS or type(module).__name__ == PADDED_CONVOLUTION


def _enter_autocast(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a forward outside autocast: its inputs would be of another type than the held weights."""
    kind = next((x.device.type for x in args if isinstance(x, Tensor)), "meta")
    held: Held = getattr(model, HELD)
    if kind != "meta" and not autocasts(kind) and _still_held(model, held):
        (_turn_on_outside if torch.compiler.is_compiling() else _turn_on)(model, kind, held.dtype)


def _turn_on(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    model._nolora_autocast = torch.autocast(kind, dtype)  # type: ignore[assignment]
    model._nolora_autocast.__enter__()


def _still_held(model: nn.Module, held: Held) -> bool:
    """Not after `model.float()`."""
    try:
        return model.get_parameter(next(iter(held.weights))).dtype == held.dtype
    except AttributeError:  # a part of it is compiled, so that names have grown
        return True


def _leave_autocast(model: nn.Module, _args: Any, _output: Any) -> None:
    if "_nolora_autocast" in model.__dict__:
        (_turn_off_outside if torch.compiler.is_compiling() else _turn_off)(model)


def _turn_off(model: nn.Module) -> None:
    entered: Any = model.__dict__.pop("_nolora_autocast", None)
    if entered is not None:  # torch 2.10 comes here twice from a compiled model
        entered.__exit__(None, None, None)


_turn_on_outside = torch._disable_dynamo(_turn_on)  # a graph cannot enter a context that it does not leave
_turn_off_outside = torch._disable_dynamo(_turn_off)
"""By this and not by `torch.compiler.disable`, which imports the compiler at once."""
