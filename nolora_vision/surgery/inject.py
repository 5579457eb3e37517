"""inject, eject, disabled: what happens to a model, in place and undone without trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from nolora_vision.config import AdapterConfig, ConfigError, did_you_mean
from nolora_vision.surgery.adapter import adapted_layers, adapted_type
from nolora_vision.surgery.applied import APPLIED
from nolora_vision.surgery.disabling import stay_disabled, without_adapters
from nolora_vision.surgery.frozen_dtype import release_frozen
from nolora_vision.surgery.low_rank_adapter import Adapter, make_adapter
from nolora_vision.surgery.modulation_noise import follow_batch
from nolora_vision.surgery.plan import InjectionError, PlannedAdapter, plan_adapters
from nolora_vision.surgery.reach import prove_reach
from nolora_vision.surgery.sites import BYPASS_FLAG, classifier_paths, cure_bypass
from nolora_vision.surgery.wrappers import bare_model

Model = TypeVar("Model", bound=nn.Module)

RECORD = "_nolora_injection"
SHELF = "_nolora_shelf"
"""Attribute of a model that has several adapters; see `switch.py`."""
INFO = "_nolora_info"
"""Attribute of a model: the config of the adapter that was loaded last, so that saving again keeps what it said."""


@dataclass(frozen=True)
class Injection:
    """What `inject` did to a model; kept on the model so that `eject`, `summary` and `save_adapter` know."""

    config: AdapterConfig
    roles: dict[str, str]
    """Role by layer path."""
    cured: tuple[str, ...]
    """Attentions whose bypass flag was turned on."""
    required_grad: dict[str, bool]
    """requires_grad of every parameter before."""
    batches_tracked: dict[str, int]
    """How many batches each BatchNorm had seen, so that `save_adapter` knows whose statistics moved."""


def inject(
    model: Model, config: AdapterConfig | None = None, *, example_input: Any | None = None, **shortcuts: Any
) -> Model:
    """Add a nonlinear low-rank adapter to layers of a model, in place, and freeze all else but the classifier.

    With no config the attention input projections and the MLP layers of every block get one. The model stays the same
    object and class, and computes what it did before until the adapters are trained.

    Args:
        model: any timm model with attention or MLPs; other modules too, if their layers are named alike.
        config: what the adapters are and where they go.
        example_input: what to run the model on for the check that it calls every adapter; needed only if the model
            takes something else than an image of a size that its config knows.
        **shortcuts: fields of AdapterConfig, instead of or on top of `config`: `inject(model, rank=4)`.

    Returns:
        The same model.

    Raises:
        ConfigError: if the config is not usable.
        InjectionError: if the model cannot be adapted as asked. It is then unchanged.
    """
    config = _with_shortcuts(config, shortcuts)
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject needs a torch.nn.Module, got {type(model).__name__}.")
    _refuse_wrapped_or_injected(model)
    _refuse_beside_a_shelf(model)
    return inject_alone(model, config, example_input)


def inject_alone(model: Model, config: AdapterConfig, example_input: Any | None = None) -> Model:
    """`inject`, also where adapters wait under other names while the model wears none.

    Raises:
        InjectionError: if the model cannot be adapted as asked. It is then unchanged.
    """
    plan = plan_adapters(model, config)
    adapters = {planned.site.path: _make(model, planned) for planned in plan}
    cured = cure_bypass(model, (planned.site.path for planned in plan))
    try:
        for path, adapter in adapters.items():
            layer = model.get_submodule(path)
            adapted_type(layer).adopt(layer, adapter)
        prove_reach(model, adapters, example_input)
    except BaseException:
        _undo(model, cured)
        raise
    before = {name: p.requires_grad for name, p in model.named_parameters() if not _is_adapter_parameter(name)}
    roles = {planned.site.path: planned.role for planned in plan}
    setattr(model, RECORD, Injection(config, roles, tuple(cured), before, batches_tracked(model)))
    freeze_backbone(model)
    tell_images(model)
    stay_disabled(model)
    return model


def eject(model: Model) -> Model:
    """Take the adapters out again: the original module objects, timm's flags and requires_grad as before `inject`.

    Adapters that were added by name go with them, the set one and the others; the head stays that of the set one, with
    its class names; what was measured goes. Held weights are released.

    Raises:
        InjectionError: if the model has no adapters.
    """
    bare = bare_model(model)
    shelf = getattr(bare, SHELF, None)
    if shelf is None or is_injected(bare):
        withdraw(bare)
    else:
        require_as_before(bare, shelf.required_grad)
    release_frozen(bare)
    bare.__dict__.pop(APPLIED, None)
    if hasattr(bare, INFO):
        said = getattr(bare, INFO)
        setattr(bare, INFO, {key: value for key, value in said.items() if key not in ("metrics", "metadata")})
    if shelf is not None:
        shelf.close()
        delattr(bare, SHELF)
    return model


def withdraw(model: nn.Module) -> None:
    """Undo the last injection alone; adapters that wait under other names stay.

    Raises:
        InjectionError: if the model has no adapters.
    """
    record = injection_of(model)
    _undo(model, record.cured)
    require_as_before(model, record.required_grad)
    delattr(model, RECORD)
    tell_images(model)


def require_as_before(model: nn.Module, required_grad: dict[str, bool]) -> None:
    """Give parameters the requires_grad that is noted for their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required_grad.get(name, parameter.requires_grad))


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model computes without its adapters, bit for bit as the frozen backbone with its head.

    So it does with adapters that are injected, loaded or set inside the block.

    Raises:
        InjectionError: if the model has no adapters, on it or by name.
    """
    bare = bare_model(model)
    if not hasattr(bare, SHELF):  # with one and none set it computes so anyway
        injection_of(bare)
    with without_adapters(bare):
        yield model


def freeze_backbone(model: nn.Module) -> None:
    """Leave only adapters (if any) and the classifier trainable; without adapters this is a linear probe."""
    model = bare_model(model)
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.adapter.requires_grad_(True)
    for path in classifier_paths(model):
        model.get_submodule(path).requires_grad_(True)


def tell_images(model: nn.Module) -> None:
    """Let adapters with noise know how many images a batch has; without any the model gets no hook, or loses it."""
    branches = (branch for layer in adapted_layers(model).values() for branch in layer.adapter.branches())
    follow_batch(model, any(branch.config.modulation_noise for branch in branches))


def batches_tracked(model: nn.Module) -> dict[str, int]:
    """How many batches each BatchNorm has seen in training mode, by module path."""
    counts = {path: getattr(module, "num_batches_tracked", None) for path, module in model.named_modules()}
    return {path: int(n) for path, n in counts.items() if isinstance(n, torch.Tensor) and n.device.type != "meta"}


def is_injected(model: nn.Module) -> bool:
    """Whether `inject` has adapted this model."""
    return hasattr(model, RECORD)


def injection_of(model: nn.Module) -> Injection:
    """What `inject` did to the model.

    Raises:
        InjectionError: if it was not injected.
    """
    record = getattr(model, RECORD, None)
    if not isinstance(record, Injection):
        has = f"{type(model).__name__} has no adapters"
        if hasattr(model, SHELF):
            names = ", ".join(map(repr, getattr(model, SHELF).outfits))
            raise InjectionError(f"{has} on it now. Call nolora_vision.set_adapter(model, name), with one of {names}.")
        raise InjectionError(f"{has}. Call nolora_vision.inject(model) first.")
    return record


def _with_shortcuts(config: AdapterConfig | None, shortcuts: dict[str, Any]) -> AdapterConfig:
    if config is not None and not isinstance(config, AdapterConfig):
        raise TypeError(f"config must be an AdapterConfig, got {type(config).__name__}. Fields go by keyword: rank=8.")
    known = [f.name for f in fields(AdapterConfig)]
    unknown = [name for name in shortcuts if name not in known]
    if unknown:
        hints = [f"{name!r} is no field.{did_you_mean(name, known)} Fields: {', '.join(known)}." for name in unknown]
        raise ConfigError("AdapterConfig", hints)
    return replace(config or AdapterConfig(), **shortcuts)


def _refuse_wrapped_or_injected(model: nn.Module) -> None:
    if adapted_layers(model):
        raise InjectionError(
            "This model already has adapters. Call nolora_vision.eject(model) first, or build a fresh model."
        )
    for attribute, wrapper in (("_orig_mod", "torch.compile"), ("module", "a data-parallel wrapper")):
        if isinstance(getattr(model, attribute, None), nn.Module) and len(list(model.children())) == 1:
            raise InjectionError(f"The model is wrapped by {wrapper}; inject the bare model first, then wrap it.")


def _refuse_beside_a_shelf(model: nn.Module) -> None:
    shelf = getattr(model, SHELF, None)
    if shelf is not None:
        raise InjectionError(
            f"This model has adapters by name ({', '.join(map(repr, shelf.outfits))}), and set_adapter would drop one "
            f"without a name. Train it on a model of its own, save_adapter it there and add_adapter it here; or call "
            f"nolora_vision.eject(model) first."
        )


def _make(model: nn.Module, planned: PlannedAdapter) -> Adapter:
    site = planned.site
    device = model.get_submodule(site.path).get_parameter("weight").device
    sizes, configs = (site.in_features, site.out_features), planned.configs
    return make_adapter(*sizes, planned.config, parts=planned.parts, configs=configs, device=device)


def _undo(model: nn.Module, cured: tuple[str, ...] | list[str]) -> None:
    for layer in adapted_layers(model).values():
        layer.release()
    for path in cured:
        setattr(model.get_submodule(path), BYPASS_FLAG, False)


def _is_adapter_parameter(name: str) -> bool:
    return ".adapter." in f".{name}"
