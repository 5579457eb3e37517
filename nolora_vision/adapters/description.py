"""What a model and its adapters are, as the fields of adapter_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import FORMAT_VERSION, AdapterMismatchError
from nolora_vision.adapters.model_kwargs import image_size_of, own_kwargs
from nolora_vision.surgery.applied import applied_to
from nolora_vision.surgery.frozen_dtype import held_in, sample_of, spread_values
from nolora_vision.surgery.inject import INFO, injection_of, is_injected
from nolora_vision.surgery.sites import find_sites
from nolora_vision.surgery.wrappers import bare_model, bare_name, bare_state

PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def info_of(model: nn.Module) -> Mapping[str, Any]:
    """The config of the adapter that was loaded onto a model; empty if none was."""
    return getattr(bare_model(model), INFO, {})


def describe(
    model: nn.Module,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """What the model is, and what its adapters are, for `adapter_config.json`; what is None comes from `info_of`."""
    import timm

    from nolora_vision import __version__

    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    before, applied = info_of(model), applied_to(model)
    classes = getattr(model, "num_classes", None)
    if classes != before.get("num_classes"):
        before = {key: before[key] for key in ("preprocessing", "model_kwargs") if key in before}
    images = {**cfg, **own_input_size(model, cfg), **before.get("preprocessing", {}), **(preprocessing or {})}
    kept = {key: before.get(key) if value is None else value for key, value in facts.items()}
    names = kept.get("class_names")
    kwargs = before.get("model_kwargs", own_kwargs(model)) if model_kwargs is None else dict(model_kwargs)
    return {
        "format_version": FORMAT_VERSION,
        "adapter": asdict(injection_of(model).config) if is_injected(model) else None,
        "architecture": cfg.get("architecture", type(model).__name__),
        "pretrained_tag": cfg.get("tag") or "",
        "num_classes": classes,
        "class_names": None if names is None else [str(name) for name in names],
        "preprocessing": {key: images[key] for key in PREPROCESSING if images.get(key) is not None},
        "model_kwargs": kwargs,
        "backbone": backbone_sample(model),
        "metrics": dict(kept.get("metrics") or {}),
        "metadata": {**(kept.get("metadata") or {}), **_held_dtype(model)},
        "versions": {"nolora_vision": __version__, "torch": str(torch.__version__), "timm": timm.__version__},
        **({"method": applied.rebuilds()} if applied is not None and applied.parameters else {}),
    }


def plain_numbers(value: Any, place: str) -> Any:
    """The same with Python's numbers for those of NumPy and PyTorch, also inside mappings and sequences.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
    """
    if isinstance(value, Mapping):
        return {key: plain_numbers(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, which JSON cannot hold. Pass finite numbers, or leave it out.")
    return value


def own_input_size(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """{"input_size": (channels, height, width)} that a model was made for, if it is for one size alone."""
    size = image_size_of(model).get("img_size")
    if size is None:
        return {}
    channels, *_ = cfg["input_size"]
    return {"input_size": (channels, *((size, size) if isinstance(size, int) else size))}


def _held_dtype(model: nn.Module) -> dict[str, str]:
    """What the frozen weights were rounded to in training, if they were held so."""
    dtype = held_in(model)
    return {} if dtype is None else {"frozen_dtype": str(dtype).removeprefix("torch.")}


def backbone_sample(model: nn.Module, layers: int = 8) -> dict[str, list[float]]:
    """A few frozen weights of a few layers by name: they tell the backbone apart from another one.

    An adapter on other frozen weights computes nonsense without any error; `load_adapter` compares these numbers. Of
    held weights they are the values before.
    """
    own = bare_state(model)
    paths = [bare_name(site.path) for site in find_sites(model) if site.role]
    names = [f"{path}.weight" if f"{path}.weight" in own else f"{path}.base_layer.weight" for path in paths]  # PEFT's
    frozen = [n for n in names if isinstance(own.get(n), Tensor) and not own[n].requires_grad and not own[n].is_meta]
    chosen = [frozen[i * (len(frozen) - 1) // max(1, layers - 1)] for i in range(layers)] if frozen else []
    return {name: sample_of(model, name, own[name]) for name in dict.fromkeys(chosen)}


def refuse_other_weights(model: nn.Module, sample: Mapping[str, Sequence[float]]) -> None:
    """Compare a `backbone_sample` with a model's own weights.

    Raises:
        AdapterMismatchError: if they differ by more than rounding to another type.
    """
    own = bare_state(model)
    for name, wanted in sample.items():
        if name not in own or own[name].is_meta or not own[name].is_floating_point() or len(wanted) < 2:
            continue
        got = spread_values(own[name], len(wanted))
        if not torch.allclose(torch.tensor(got), torch.tensor(wanted), rtol=1e-2, atol=1e-5):  # bf16 rounds by 0.4 %
            raise AdapterMismatchError(
                f"The frozen weights of this model are not those that the adapter was trained on ({name} has "
                f"{got[0]:.4g} where the adapter saw {wanted[0]:.4g}, …). Build the model with pretrained=True, or "
                f"load the same weights; accept these with check_backbone=False."
            )
