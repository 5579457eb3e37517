"""What a method left on a model: which parameters and layers are its own, for groups, counts and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.surgery.wrappers import bare_model

APPLIED = "_nolora_applied"
"""Attribute of a model that a method was applied to: the `Applied` of it."""


@dataclass(frozen=True)
class Applied:
    """A method on a model. Names and paths are those of the bare model; none of it is needed by what `inject` made."""

    method: str
    adapter: AdapterConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    """Paths of the modules that carry an adapter which `inject` did not make."""
    parameters: frozenset[str] = frozenset()
    """Names of those adapters' parameters."""
    undecayed: frozenset[str] = frozenset()
    """Names of those of them that weight decay leaves alone: factors that start at 1, biases."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Names of adapter parameters that train at another rate → their optimizer group, as every B's with LoRA+."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """The rate of each such group over that of the other adapter parameters."""
    unheld: tuple[str, ...] = ()
    """Paths of modules that read their frozen weight otherwise than as a factor under autocast; see `hold_frozen`."""

    def rebuilds(self) -> dict[str, Any]:
        """What a saved adapter says so that the same adapters can be made again: method, adapter and options."""
        return {"name": self.method, "adapter": asdict(self.adapter), "options": dict(self.options)}


def applied_to(model: nn.Module) -> Applied | None:
    """What the method that was applied to a model left there, or None."""
    found = getattr(bare_model(model), APPLIED, None)
    return found if isinstance(found, Applied) else None
