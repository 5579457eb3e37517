"""Load what any method trained: the method's layers are made first, then `load_adapter` fills them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from nolora_vision.adapters.adapter_files import AdapterMismatchError, CorruptAdapterError, read_adapter_config
from nolora_vision.adapters.checkpoint import load_adapter
from nolora_vision.adapters.peft_format import is_peft
from nolora_vision.config import AdapterConfig, ConfigError
from nolora_vision.methods.apply import apply_method
from nolora_vision.surgery.applied import applied_to
from nolora_vision.surgery.plan import InjectionError

Model = TypeVar("Model", bound=nn.Module)


def load_trained(model: Model, directory: str | Path, *, head: bool = True, check_backbone: bool = True) -> Model:
    """`load_adapter` for the adapters of peers too: on a bare model it applies their method, with its options, first.

    What such an adapter does not hold is made again as it was: projections and positions from their seeds, PiSSA's
    frozen remainder from the backbone's own weights.

    Raises:
        CheckpointError: if the directory is not sound or does not fit; the method's fresh adapters may then be there.
    """
    said = None if is_peft(directory) else read_adapter_config(directory).get("method")
    if said is not None and applied_to(model) is None:
        _apply_again(model, said, str(directory))
    return load_adapter(model, directory, head=head, check_backbone=check_backbone)


def _apply_again(model: nn.Module, said: Mapping[str, Any], source: str) -> None:
    try:
        name, adapter, options = (said[key] for key in ("name", "adapter", "options"))
        given = {key: value for key, value in options.items() if value is not None}
        config = AdapterConfig.from_dict(adapter)
    except (KeyError, AttributeError, TypeError, ConfigError) as error:
        raise CorruptAdapterError(f"{source}: its method is not usable ({type(error).__name__}: {error}).") from error
    try:
        apply_method(model, name, config, options=given)
    except (ConfigError, InjectionError) as error:
        raise AdapterMismatchError(f"{source} does not fit this model: {error}") from error
