"""One run of a sweep: its config, the name of its record, and whether a record is of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from nolora_vision.benchmark.settings import FORMER_OPTIONS
from nolora_vision.config import ConfigError, shown
from nolora_vision.methods.catalogue import METHODS, chosen_options
from nolora_vision.training.config_file import as_plain, make_run_config
from nolora_vision.training.neutral import NEUTRAL
from nolora_vision.training.run_config import RunConfig

if TYPE_CHECKING:
    from nolora_vision.benchmark.sweep_plan import Sweep

Point = Mapping[str, Any]
"""Values of axes by their dotted names: `{"lr": 2e-3, "adapter.rank": 8}`."""
Phase = Literal["choose", "final"]
Results = Mapping[str, Mapping[str, Any]]
"""Records by the name of their task."""


@dataclass(frozen=True)
class Task:
    """One run."""

    label: str
    phase: Phase
    cell: Point
    point: Point
    """The cell's values and the candidate."""
    seed: int
    config: RunConfig

    @cached_property
    def name(self) -> str:
        """Of its result's file: made of what differs from the defaults, so that new fields leave it as it is."""
        usual, options = _usual(), _options_then(self.config.method)
        facts = {k: v for k, v in self._settings.items() if k != "method_options" and v != usual.get(k)}
        if own := {k: v for k, v in self._settings["method_options"].items() if v != options.get(k)}:
            facts["method_options"] = own
        text = json.dumps({"phase": self.phase, **facts}, sort_keys=True)
        slug = "".join(c if c.isalnum() else "-" for c in self.label)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def record_in(self, results: Results) -> Mapping[str, Any] | None:
        """Its record, unless that was made under other defaults."""
        record = results.get(self.name)
        if record is None:
            return None
        then, now = _flat(_with_options(record["config"])), self._settings
        return record if all(then[key] == now[key] for key in then.keys() & now.keys()) else None

    @cached_property
    def stated(self) -> dict[str, Any]:
        """Its config as its record has it, with every option of the method."""
        options = chosen_options(self.config.method, self.config.method_options)
        return as_plain({**asdict(self.config), "method_options": options})

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return _flat(self.stated)


def make_task(sweep: Sweep, label: str, phase: Phase, cell: Point, point: Point, seed: int) -> Task:
    """The run of a method at a point, its config made and checked."""
    own = {name: value for name, value in sweep.methods[label].items() if name not in ("choose", "only")}
    settings: dict[str, Any] = {}
    for layer in (sweep.base, own, point, {"seed": seed}):
        _merge(settings, layer)
    owner = f"{label} of {sweep.name or 'the sweep'}"
    config = make_run_config(settings, owner=owner).resolved()
    if phase == "choose" and config.train_on == "train_val":
        raise ConfigError(
            owner, ["train_on is train_val, so no validation images are left to choose by: set it to train."]
        )
    return Task(label, phase, cell, point, seed, config)


# ---------------------------------------------------------------------------------------------------------- the values


@cache
def _usual() -> Mapping[str, Any]:
    return _flat(as_plain(asdict(RunConfig())))


def _options_then(method: str) -> dict[str, Any]:
    """Defaults of a method's options when records did not state them yet."""
    return {**(METHODS[method].options if method in METHODS else {}), **FORMER_OPTIONS.get(method, {})}


def _with_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's config with the options that it does not state."""
    return {**config, "method_options": _options_then(config["method"]) | (config.get("method_options") or {})}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names → values, without what changes no result; a mapping that may hold anything stays one value."""
    found = {}
    for name, value in values.items():
        if name == "adapter" and isinstance(value, Mapping):
            found |= _flat(value, "adapter.")
        elif name not in NEUTRAL:
            found[prefix + name] = value
    return found


def _merge(settings: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put values into nested settings; a dotted name reaches into a nested one."""
    for name, value in layer.items():
        head, _, rest = name.partition(".") if isinstance(name, str) else (name, "", "")
        if not rest and not isinstance(value, Mapping):
            settings[head] = value
            continue
        inner = settings.setdefault(head, {})
        if not isinstance(inner, dict):
            raise ConfigError("The sweep", [f"{name} reaches into {head}, and that is {shown(inner)}."])
        _merge(inner, {rest: value} if rest else value)
