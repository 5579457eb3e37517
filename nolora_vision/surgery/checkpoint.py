"""Save and load an adapter directory: adapter + head + where they belong."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nolora_vision.config import AdapterConfig, ConfigError
from nolora_vision.surgery.groups import parameter_kind
from nolora_vision.surgery.inject import batches_tracked, eject, inject, injection_of, is_injected
from nolora_vision.surgery.plan import InjectionError
from nolora_vision.surgery.sites import classifier_paths

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """An adapter directory that cannot be read, or does not belong to this model; the model is unchanged."""


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write what training changed, and which model it belongs to, as one directory.

    `adapter_model.safetensors` holds every trainable parameter and the BatchNorm statistics that moved, by their names
    in the bare timm model; `adapter_config.json` the adapter's config, the architecture and its preprocessing. The
    directory appears whole or not at all; an existing one is replaced.

    Args:
        metadata: JSON-able facts to keep with it, such as class names and metrics.
        preprocessing: what evaluation did to images (input_size, mean, std, interpolation, crop_pct, crop_mode), where
            it differs from the model's own pretrained config.

    Returns:
        The directory.
    """
    from safetensors.torch import save_file

    target = Path(directory)
    state = {name: t.detach().cpu().contiguous() for name, t in trained_state(model).items()}
    config = describe(model, preprocessing) | {"tensors": len(state), "metadata": dict(metadata or {})}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(state, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (scratch / CARD_FILE).write_text(_card(config), encoding="utf-8")
        scratch.chmod(0o777 & ~_umask())
        _swap_in(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def load_adapter(model: Model, directory: str | Path) -> Model:
    """Put a saved adapter and head onto a model of the same architecture, injecting it first if it is bare.

    Raises:
        CheckpointError: if the directory is incomplete, or does not fit this model. The model is unchanged.
    """
    config = read_adapter_config(directory)
    state = _read_weights(Path(directory) / WEIGHTS_FILE)
    _refuse_other_model(model, config)
    bare, adapter = not is_injected(model), config["adapter"]
    if bare and adapter is not None:
        try:
            inject(model, AdapterConfig.from_dict(adapter))
        except (ConfigError, InjectionError) as error:
            raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    try:
        _refuse_other_tensors(model, config, state, directory)
    except CheckpointError:
        if bare and adapter is not None:
            eject(model)
        raise
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, t in state.items():
            own[name].copy_(t)
    return model


def _refuse_other_tensors(
    model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor], directory: str | Path
) -> None:
    own = model.state_dict(keep_vars=True)
    wanted = trained_state(model) if is_injected(model) else {}
    missing = sorted(name for name in wanted if name not in state and isinstance(wanted[name], nn.Parameter))
    unknown = sorted(name for name in state if name not in own)
    shapes = [
        f"{name}: {tuple(t.shape)}, the model has {tuple(own[name].shape)}"
        for name, t in state.items()
        if name in own and t.shape != own[name].shape
    ]
    problems = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
    lines = [f"  - {len(n)} {what}: {', '.join(n[:4])}{' …' if len(n) > 4 else ''}" for what, n in problems if n]
    if len(state) != config.get("tensors"):
        lines.append(f"  - {len(state)} tensors in {WEIGHTS_FILE}, {config.get('tensors')} according to {CONFIG_FILE}")
    if lines:
        raise CheckpointError(f"{directory} does not fit this model:\n" + "\n".join(lines))


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`.

    Raises:
        CheckpointError: if it is absent, not JSON, or of a newer format.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Wanted a directory written by nolora_vision.save_adapter.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version = config["format_version"]
        if not isinstance(config["adapter"], (dict, type(None))):
            raise TypeError("'adapter' is neither null nor an object")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an adapter config ({type(error).__name__}: {error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this nolora_vision reads {FORMAT_VERSION}. Upgrade nolora-vision."
        )
    return config


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, head and whatever else trains, frozen parts of them too; and the statistics of BatchNorms that ran."""
    heads = classifier_paths(model)
    state: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad or parameter_kind(name, heads) != "backbone"
    }
    before = injection_of(model).batches_tracked if is_injected(model) else {}
    for path, count in batches_tracked(model).items():
        if count != before.get(path, 0):
            buffers = model.get_submodule(path).named_buffers(recurse=False)
            state |= {f"{path}.{name}": buffer for name, buffer in buffers}
    return state


PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def describe(model: nn.Module, preprocessing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the model is, and what its adapters are, for `adapter_config.json`."""
    from nolora_vision import __version__

    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    images = {**cfg, **(preprocessing or {})}
    return {
        "format_version": FORMAT_VERSION,
        "adapter": asdict(injection_of(model).config) if is_injected(model) else None,
        "architecture": cfg.get("architecture", type(model).__name__),
        "pretrained_tag": cfg.get("tag", ""),
        "num_classes": getattr(model, "num_classes", None),
        "preprocessing": {key: images[key] for key in PREPROCESSING if images.get(key) is not None},
        "versions": {"nolora_vision": __version__, "torch": str(torch.__version__)},
    }


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Wanted a directory written by nolora_vision.save_adapter.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from error


def _refuse_other_model(model: nn.Module, config: Mapping[str, Any]) -> None:
    mine = describe(model)
    for key in ("architecture", "num_classes"):
        if mine[key] != config.get(key):
            raise CheckpointError(
                f"The adapter is for {key} {config.get(key)!r}, this model has {mine[key]!r}. Build the model with "
                f"timm.create_model({config.get('architecture')!r}, num_classes={config.get('num_classes')})."
            )
    if is_injected(model) and config["adapter"] is not None:
        mine["adapter"] = json.loads(json.dumps(mine["adapter"]))  # tuples as the lists that JSON made of them
        differing = [k for k, value in config["adapter"].items() if mine["adapter"].get(k) != value]
    else:
        differing = []
    if differing:
        raise CheckpointError(
            f"The model is injected with another config than the adapter's (they differ in {', '.join(differing)}). "
            f"Load onto a bare model, or inject with the same config."
        )


def _swap_in(scratch: Path, target: Path) -> None:
    """Put the finished directory in place; a crash between the two renames leaves the old one beside it."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.replace(target, old)
        except OSError:
            old.rmdir()
            raise
        try:
            os.replace(scratch, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.replace(scratch, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _card(config: Mapping[str, Any]) -> str:
    name = config["architecture"] + (f".{config['pretrained_tag']}" if config["pretrained_tag"] else "")
    method = "head" if config["adapter"] is None else "NoLoRA adapter and head"
    return f"""---
library_name: nolora-vision
base_model: timm/{name}
tags: [image-classification, timm, nolora]
---
# {method} for {name}

```python
import timm, nolora_vision

model = timm.create_model("{name}", pretrained=True, num_classes={config["num_classes"]})
nolora_vision.load_adapter(model, "path/to/this/directory")
```
"""
