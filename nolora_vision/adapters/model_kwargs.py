"""What an adapter's config may say to timm.create_model: plain numbers and words, nothing that loads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from nolora_vision.adapters.adapter_files import CorruptAdapterError

REFUSED_KWARGS = frozenset(
    {
        *("model_name", "num_classes", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"),
        *("device", "dtype", "features_only", "feature_cfg", "feature_cls", "out_indices", "kwargs_filter"),
        *("model_cfg", "cfg", "pruned"),
    }
)
"""Arguments of `timm.create_model` that name files, other weights, other code, or what the config says elsewhere.
So are all that begin with `pretrained`."""
LARGEST_NUMBER = 2**16
"""In model_kwargs. The largest that timm's own models take are widths and image sizes of a few thousand."""


def plain_kwargs(kwargs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """An adapter's `model_kwargs` as arguments of `timm.create_model`: plain numbers and words, nothing that loads.

    Raises:
        CorruptAdapterError: if there is anything else among them.
    """
    problems = [problem for key, value in kwargs.items() if (problem := _problem(key, value))]
    if problems:
        raise CorruptAdapterError(
            f"{source}: model_kwargs that are not taken from an adapter:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nIf you trust them, build the model yourself: from_pretrained(..., model=timm.create_model(...))."
        )
    return {key: _as_tuple(value) for key, value in kwargs.items()}


def _problem(key: str, value: object) -> str | None:
    if key in REFUSED_KWARGS or key.startswith("pretrained") or not re.fullmatch("[a-z][a-z0-9_]{0,63}", key):
        return f"{key[:64]!r}: it can load files or other code, or is said elsewhere in the config"
    if value is None or isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"[\w.\-]{0,64}", value)):
        return None
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) <= 64 and all(isinstance(n, bool) for n in value):
        return None
    if len(numbers) > 64 or not all(_is_plain_number(n) for n in numbers):
        return (
            f"{key} = {str(value)[:80]}: wanted a word, a boolean, or numbers from 0 to {LARGEST_NUMBER:,} (one, or a "
            f"list of at most 64)"
        )
    return None


def _is_plain_number(value: object) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value) and 0 <= value <= LARGEST_NUMBER  # type: ignore[arg-type,operator]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def own_kwargs(model: nn.Module) -> dict[str, Any]:
    """What a model was built with besides name and classes, as far as timm remembers it or its layers show it.

    Rates of dropout and the like are left out: they shape training only.
    """
    remembered: Mapping[str, Any] = getattr(model, "_model_args", None) or {}
    kept = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in remembered.items()
        if value is not None and not key.startswith("drop") and not _problem(key, _as_list(value))
    }
    return kept if "img_size" in kept else {**kept, **image_size_of(model)}


def image_size_of(model: nn.Module) -> dict[str, Any]:
    """{"img_size": …} where the patch embedding was made for another size than the pretrained config names."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    usual = tuple(cfg.get("input_size") or (0, 0, 0))[1:]
    if isinstance(size, (tuple, list)) and len(size) == 2 and usual and tuple(size) != usual:
        return {"img_size": int(size[0]) if size[0] == size[1] else [int(n) for n in size]}
    return {}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
