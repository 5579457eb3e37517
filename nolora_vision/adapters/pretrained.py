"""A ready model from an adapter's directory or its id on the Hub, with its transform and class names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import AdapterMismatchError, CorruptAdapterError, read_adapter_files
from nolora_vision.adapters.blueprint import build_backbone
from nolora_vision.adapters.checkpoint import apply_adapter, load_adapter
from nolora_vision.adapters.description import PREPROCESSING, info_of, own_input_size
from nolora_vision.adapters.hub import find_adapter, local_directory
from nolora_vision.adapters.peft_format import is_peft
from nolora_vision.surgery.groups import parameter_kind
from nolora_vision.surgery.wrappers import bare_model

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")


def from_pretrained(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Backbone, adapters and head of a saved adapter as one timm model, in evaluation mode.

    The backbone's weights come from timm, as the adapter's config names them, unless the adapter holds every weight
    itself, or names a local file that `train.py --pretrained-path` used. `eval_transform(model)` is the preprocessing
    it was evaluated with, `class_names(model)` its classes.

    Args:
        source: a directory that `save_adapter` wrote, or the id of a repository on the Hub that holds one.
        model: a backbone to put the adapter on instead of building one; it may be compiled or data-parallel.
        revision: branch, tag or commit of the repository.
        device: where to; None leaves it on the CPU, or where `model` is.
        dtype: of the backbone and head; adapters keep fp32.

    Raises:
        CheckpointError: if there is no sound adapter there, or it does not fit, or the backbone's weights cannot be
            had. A given model is unchanged.
        TypeError: if the dtype is not a floating point one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point torch.dtype such as torch.bfloat16, got {dtype!r}.")
    where = None if device is None else torch.device(device)
    directory = find_adapter(source, revision=revision)
    if is_peft(directory):
        if model is None:
            raise AdapterMismatchError(
                f"{source} is in PEFT's format, which does not say what timm model it is for. Pass it: "
                f"from_pretrained(..., model=timm.create_model(...))."
            )
        load_adapter(model, directory)
    else:
        config, state = _read(source, directory)
        if model is None:
            model = build_backbone(config, state, source=str(source), weights=_weights_file(source, config))
        apply_adapter(bare_model(model), config, state, source=str(source))
    if dtype is not None:
        _cast_backbone(bare_model(model), dtype)
    return model.to(where).eval()


def _read(source: str | Path, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config, state = read_adapter_files(directory)
        _refuse_preprocessing(config["preprocessing"], str(directory))
        return config, state
    except CorruptAdapterError as error:
        if local_directory(source) is not None:
            raise
        raise CorruptAdapterError(
            f"{error} These are the files of {source} on the Hub, in the cache: delete {directory.parent.parent} to "
            f"download them again. If that does not help, the repository's own files are damaged."
        ) from error


def _weights_file(source: str | Path, config: Mapping[str, Any]) -> Path | None:
    """The file that the backbone was trained from, if `train.py --pretrained-path` wrote it down and it is still there.

    A path that came with a download is not followed.
    """
    said = config["metadata"].get("pretrained_path")
    if not isinstance(said, str) or local_directory(source) is None:
        return None
    path = Path(said)
    return path if path.suffix == ".safetensors" and path.is_file() else None


def eval_transform(model: nn.Module) -> Any:
    """timm's evaluation transform with the preprocessing that the adapter was evaluated with: PIL image → (C, H, W)."""
    from timm.data import create_transform

    return create_transform(**preprocessing_of(model), is_training=False)


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """input_size, mean, std, interpolation, crop_pct and crop_mode: the loaded adapter's, or else timm's own.

    The size of the images is that which the model was made for, as `save_adapter` writes it.

    Raises:
        CorruptAdapterError: if the adapter's make no sense.
    """
    from timm.data import resolve_model_data_config

    bare = bare_model(model)
    saved = info_of(bare).get("preprocessing", {})
    _refuse_preprocessing(saved, "The loaded adapter")
    config: dict[str, Any] = resolve_model_data_config(bare)
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return {**config, **own_input_size(bare, config), **said}


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the outputs, as the loaded adapter knows them; numbers where it doesn't."""
    bare = bare_model(model)
    names = info_of(bare).get("class_names")
    if names is not None and len(names) == getattr(bare, "num_classes", len(names)):
        return tuple(names)
    return tuple(str(i) for i in range(int(getattr(bare, "num_classes", None) or 0)))


def _refuse_preprocessing(saved: Mapping[str, Any], source: str) -> None:
    problems = [f"{key} = {str(saved[key])[:80]}" for key in _wrong_preprocessing(saved)]
    if problems:
        raise CorruptAdapterError(f"{source}: preprocessing that makes no sense: {'; '.join(problems)}.")


def _wrong_preprocessing(saved: Mapping[str, Any]) -> Iterable[str]:
    def numbers(value: object, low: float, high: float) -> bool:
        return isinstance(value, (list, tuple)) and all(number(n, low, high) for n in value)

    def number(value: object, low: float, high: float) -> bool:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type,operator]

    def whole(value: object) -> bool:
        return numbers(value, 1, 2**16) and all(isinstance(n, int) for n in value)  # type: ignore[union-attr]

    rules = {
        "input_size": lambda v: whole(v) and len(v) == 3,
        "mean": lambda v: numbers(v, -1e3, 1e3) and len(v) > 0,
        "std": lambda v: numbers(v, 1e-6, 1e3) and len(v) > 0,
        "interpolation": lambda v: v in INTERPOLATIONS,
        "crop_pct": lambda v: number(v, 1e-3, 1e3),
        "crop_mode": lambda v: v in CROP_MODES,
    }
    assert rules.keys() == set(PREPROCESSING)
    yield from (key for key, value in saved.items() if key not in rules or not rules[key](value))


def _cast_backbone(model: nn.Module, dtype: torch.dtype) -> None:
    """Everything but the adapters, which keep fp32."""
    kept = {name: p.data for name, p in model.named_parameters() if parameter_kind(name, ()) == "adapter"}
    model.to(dtype)
    for name, data in kept.items():
        model.get_parameter(name).data = data
