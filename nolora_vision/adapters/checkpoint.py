"""Save and load an adapter directory: adapter + head + where they belong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import (
    AdapterMismatchError,
    CheckpointError,
    CorruptAdapterError,
    read_adapter_files,
    write_adapter_files,
)
from nolora_vision.adapters.card import model_card
from nolora_vision.adapters.description import describe, info_of, plain_numbers, refuse_other_weights
from nolora_vision.adapters.peft_format import is_peft, read_peft, write_peft
from nolora_vision.config import AdapterConfig, ConfigError
from nolora_vision.surgery.applied import applied_to
from nolora_vision.surgery.frozen_dtype import LOADED, no_longer_held
from nolora_vision.surgery.groups import adapter_parameters, parameter_kind
from nolora_vision.surgery.inject import (
    INFO,
    SHELF,
    batches_tracked,
    inject,
    inject_alone,
    injection_of,
    is_injected,
    withdraw,
)
from nolora_vision.surgery.plan import InjectionError
from nolora_vision.surgery.sites import classifier_paths, inside
from nolora_vision.surgery.wrappers import bare_model, bare_name, bare_state

Model = TypeVar("Model", bound=nn.Module)

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    format: Literal["nolora", "peft"] = "nolora",
) -> Path:
    """Write what training changed, and which model it belongs to, as one directory.

    `adapter_model.safetensors` holds adapters, head, whatever else trains, and the BatchNorm statistics that moved, by
    their names in the bare timm model; `adapter_config.json` the rest; `README.md` is the model card. The three appear
    together or not at all; in an existing directory they replace those of the adapter that it holds, and whatever else
    is there stays. The model may be compiled or data-parallel.

    Args:
        class_names: one for each output of the head. What is None here is kept from the adapter that was loaded.
        metrics: scores by name, such as `test_top1_percent`, for the card.
        preprocessing: what evaluation did to images (input_size, mean, std, interpolation, crop_pct, crop_mode), where
            it differs from the model's own pretrained config.
        model_kwargs: what `timm.create_model` was given besides name and classes, such as img_size.
        metadata: further JSON-able facts.
        dtype: of the saved parameters; None keeps each one's own.
        format: `peft` writes PEFT's LoRA format instead, for linear adapters.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the adapter cannot be written in the format asked for, or the directory has files by the
            same names that are no adapter's.
        ValueError: if the class names do not fit the head, a metric is not finite, or the dtype or format is unknown.
    """
    bare = bare_model(model)
    for name, value, known in (("dtype", dtype, (None, *DTYPES)), ("format", format, ("nolora", "peft"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}.")
    metrics = None if metrics is None else plain_numbers(metrics, "metrics")
    said = {"class_names": class_names, "metrics": metrics, "model_kwargs": model_kwargs, "metadata": metadata}
    config = describe(bare, preprocessing=preprocessing, **said) | {"dtype": dtype or "as trained"}
    _refuse_wrong_names(config)
    state = {name: _saved(t, dtype) for name, t in trained_state(bare).items()}
    if format == "peft":
        return write_peft(bare, directory, config, state)
    return write_adapter_files(directory, config, state, model_card(config))


def load_adapter(model: Model, directory: str | Path, *, head: bool = True, check_backbone: bool = True) -> Model:
    """Put a saved adapter and head onto a model of the same architecture, injecting it first if it is bare.

    Args:
        directory: written by `save_adapter`, or by PEFT for a LoRA on a timm model.
        head: False leaves the model's own classifier, which may have other classes, and what is said of it: names,
            metrics and metadata.
        check_backbone: False accepts another pretrained tag and other frozen weights than the adapter was trained on.

    Raises:
        CheckpointError: if the directory is incomplete, or does not fit this model. The model is unchanged.
    """
    bare = bare_model(model)
    config, state = read_any_adapter(directory, bare)
    apply_adapter(bare, config, state, source=str(directory), head=head, check_backbone=check_backbone)
    return model


def read_any_adapter(directory: str | Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a directory in this library's format, or in PEFT's.

    Raises:
        CheckpointError: if it is neither, or not sound.
    """
    return read_peft(directory, model) if is_peft(directory) else read_adapter_files(directory)


def apply_adapter(
    model: nn.Module,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    source: str,
    head: bool = True,
    check_backbone: bool = True,
    joins: bool = False,
) -> None:
    """Put tensors of a saved adapter onto a bare model, all of them or none.

    Args:
        joins: whether it will share the backbone with adapters that wait under other names.

    Raises:
        CheckpointError: if they do not fit. The model is unchanged.
    """
    if joins or hasattr(model, SHELF):
        _refuse_trained_backbone(model, state, source)
    _refuse_other_method(model, config, source)
    _refuse_other_model(model, config, head=head, check_backbone=check_backbone)
    if not head:
        heads = classifier_paths(model)
        state = {name: t for name, t in state.items() if not inside(name, heads)}
    fresh, adapter = not is_injected(model), config["adapter"]
    if fresh and adapter is not None:
        try:
            (inject_alone if joins else inject)(model, AdapterConfig.from_dict(adapter))
        except (ConfigError, InjectionError) as error:
            raise AdapterMismatchError(f"{source} does not fit this model: {error}") from error
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise CorruptAdapterError(f"{source}: its adapter config is not usable ({error}).") from error
    try:
        _refuse_other_tensors(model, state, source, head=head)
    except CheckpointError:
        if fresh and adapter is not None:
            withdraw(model)
        raise
    own, heads = bare_state(model), classifier_paths(model)
    brought = [n for n in state if isinstance(own[n], nn.Parameter) and parameter_kind(n, heads) == "backbone"]
    no_longer_held(model, brought)
    with torch.no_grad():
        for name, t in state.items():
            own[name].copy_(t)
    setattr(model, INFO, dict(config) if head else {**config, **_said_of_head(model)})
    model.__dict__.pop(LOADED, None)
    if brought:
        setattr(model, LOADED, tuple(brought))


def _said_of_head(model: nn.Module) -> dict[str, Any]:
    """What the model says of its own head, not what an adapter of another one does."""
    before, classes = info_of(model), getattr(model, "num_classes", None)
    names = before.get("class_names") if before.get("num_classes") == classes else None
    measured = {key: before.get(key, {}) for key in ("metrics", "metadata")}
    return {"num_classes": classes, "class_names": names, **measured}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, head and whatever else trains, frozen parts of them too; and the statistics of BatchNorms that ran."""
    heads, brought = classifier_paths(model), frozenset(getattr(model, LOADED, ()))
    state: dict[str, Tensor] = {}
    for name, p in ((bare_name(name), p) for name, p in model.named_parameters()):
        if p.requires_grad or name in brought or parameter_kind(name, heads) != "backbone":
            state[name] = p
    before = injection_of(model).batches_tracked if is_injected(model) else {}
    for path, count in batches_tracked(model).items():
        if count != before.get(path, 0):
            buffers = model.get_submodule(path).named_buffers(recurse=False)
            state |= {bare_name(f"{path}.{name}"): buffer for name, buffer in buffers}
    return state


def adapter_bytes(model: nn.Module) -> int:
    """Size of what training changed without the head, as the safetensors file that `save_adapter` would write."""
    from safetensors.torch import save

    bare = bare_model(model)
    heads = classifier_paths(bare)
    return len(save({n: _saved(t, None) for n, t in trained_state(bare).items() if not inside(n, heads)}))


def _saved(t: Tensor, dtype: str | None) -> Tensor:
    """On the CPU; statistics of BatchNorms keep their type, as a rounded variance would not be what evaluation used."""
    wanted = DTYPES[dtype] if dtype is not None and isinstance(t, nn.Parameter) else t.dtype
    return t.detach().to("cpu", wanted).contiguous()


def _refuse_wrong_names(config: Mapping[str, Any]) -> None:
    names, classes = config["class_names"], config["num_classes"]
    if names is not None and len(names) != classes:
        raise ValueError(f"{len(names)} class_names for a head of {classes} classes. Pass one for each, in order.")


def _refuse_other_method(model: nn.Module, config: Mapping[str, Any], source: str) -> None:
    """Adapters that `inject` does not make must be there already."""
    wanted, applied = config.get("method"), applied_to(model)
    own = None if applied is None or not applied.parameters else json.loads(json.dumps(applied.rebuilds()))
    if wanted is not None and wanted != own:
        raise AdapterMismatchError(
            f"{source} holds what the method {wanted.get('name')!r} trained, which needs its own layers in the model. "
            f"Load it with nolora_vision.methods.load_trained(model, directory), which makes them."
        )


def _refuse_trained_backbone(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    heads, own = classifier_paths(model), {bare_name(name) for name, _ in model.named_parameters()}
    changed = [n for n in state if n in own and parameter_kind(n, heads) == "backbone"]
    if changed:
        raise AdapterMismatchError(
            f"{source} holds weights of the backbone itself ({changed[0]} and {len(changed) - 1} more), which adapters "
            f"beside it could not share. Load it onto a model of its own with load_adapter or from_pretrained."
        )


def _refuse_other_model(model: nn.Module, config: Mapping[str, Any], *, head: bool, check_backbone: bool) -> None:
    mine = describe(model)
    keys = ["architecture", *(["pretrained_tag"] if check_backbone else []), *(["num_classes"] if head else [])]
    for key in keys:
        theirs = config[key]
        if mine[key] == theirs or (key == "pretrained_tag" and not (mine[key] and theirs)):
            continue
        tag = f".{config['pretrained_tag']}" if config["pretrained_tag"] else ""
        instead = {
            "num_classes": " Or take the adapters without their head: load_adapter(..., head=False).",
            "pretrained_tag": " Or accept this one with check_backbone=False.",
        }
        raise AdapterMismatchError(
            f"The adapter is for {key} {theirs!r}, this model has {mine[key]!r}. Build the model with "
            f"timm.create_model({config['architecture'] + tag!r}, num_classes={config['num_classes']})."
            + instead.get(key, "")
        )
    if check_backbone:
        refuse_other_weights(model, config["backbone"])
    if is_injected(model) and config["adapter"] is not None:
        own = json.loads(json.dumps(mine["adapter"]))  # tuples as the lists that JSON made of them
        differing = [k for k, value in config["adapter"].items() if own.get(k) != value]
        if differing:
            raise AdapterMismatchError(
                f"The model is injected with another config than the adapter's (they differ in "
                f"{', '.join(differing)}). Load onto a bare model, or inject with the same config."
            )


def _refuse_other_tensors(model: nn.Module, state: Mapping[str, Tensor], source: str, *, head: bool) -> None:
    own, heads = bare_state(model), classifier_paths(model)
    adapted = is_injected(model) or any(True for _ in adapter_parameters(model))
    wanted = trained_state(model) if adapted else {n: t for n, t in own.items() if inside(n, heads)}
    absent = sorted(name for name in wanted if name not in state and (head or not inside(name, heads)))
    missing = [name for name in absent if isinstance(wanted[name], nn.Parameter)]
    moved = [name for name in absent if adapted and name not in missing]
    unknown = sorted(name for name in state if name not in own)
    shapes = [
        f"{name}: {tuple(t.shape)}, the model has {tuple(own[name].shape)}"
        for name, t in state.items()
        if name in own and t.shape != own[name].shape
    ]
    kinds = [
        f"{name}: {t.dtype}, the model has {own[name].dtype}"
        for name, t in state.items()
        if name in own and t.is_floating_point() != own[name].is_floating_point()
    ]
    problems = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
    problems += (("of another kind of number", kinds),)
    problems += (("that moved on this model and it does not bring (load it onto a fresh model)", moved),)
    lines = [f"  - {len(n)} {what}: {', '.join(n[:4])}{' …' if len(n) > 4 else ''}" for what, n in problems if n]
    if lines:
        raise AdapterMismatchError(f"{source} does not fit this model:\n" + "\n".join(lines))
