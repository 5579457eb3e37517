"""Every field of the configs with every odd value: taken or refused as its annotation says, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from nolora_vision import AdapterConfig, ConfigError
from nolora_vision.config import shown
from nolora_vision.training.config_file import make_run_config
from nolora_vision.training.kinds import in_words, kinds_of
from nolora_vision.training.run_config import RunConfig
from tests.training.config_values import ODD, takes

KINDS = {name: kind for name, kind in kinds_of(RunConfig).items() if name != "adapter"}
MOST = 2**31 - 1


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3.4e38


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST


def are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)


def are_rates(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and k and is_number(v) and v > 0 for k, v in value.items()
    )


ADAPTER: dict[str, Callable[[Any], bool]] = {
    "rank": lambda v: is_whole(v) and v >= 1,
    "alpha": lambda v: v is None or (is_number(v) and v > 0),
    "rank_stabilized": lambda v: isinstance(v, bool),
    "nonlinearity": lambda v: False,
    "modulation": lambda v: False,
    "dropout": lambda v: is_number(v) and 0 <= v < 1,
    "modulation_noise": lambda v: is_number(v) and v >= 0,
    "targets": lambda v: (isinstance(v, str) and v != "") or (are_names(v) and len(v) > 0),
    "exclude": lambda v: isinstance(v, str) or are_names(v),
    "layers": lambda v: v is None or (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(is_whole, v))),
    "rank_pattern": lambda v: are_rates(v) and all(map(is_whole, v.values())),
    "alpha_pattern": are_rates,
    "share_down": lambda v: isinstance(v, bool),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_field_takes_what_its_annotation_says_and_names_what_it_refuses(name: str) -> None:
    refused = 0
    for value in ODD:
        try:
            RunConfig(**{name: value})
        except ConfigError as error:
            wrong = f"{name} must be {in_words(KINDS[name])}"
            of_its_kind = [p for p in error.problems if p.startswith(wrong) and f"got {shown(value)}." in p]
            assert len(of_its_kind) == (not takes(KINDS[name], value)), (value, error)
            assert all(name in problem.fields for problem in error.problems), (value, error)
            assert not of_its_kind or len(error.problems) == 1, (value, error)
            refused += 1
        else:
            assert takes(KINDS[name], value), value
    assert refused > len(ODD) / 2


def test_each_field_of_the_adapter_too() -> None:
    assert list(ADAPTER) == [field.name for field in fields(AdapterConfig)]
    for name, taken in ADAPTER.items():
        for value in ODD:
            assert _is_taken(name, value, AdapterConfig) == taken(value), (name, value)
            assert _is_taken(name, value, lambda **own: RunConfig(adapter=own)) == taken(value), (name, value)  # type: ignore[arg-type]


def _is_taken(name: str, value: Any, make: Callable[..., Any]) -> bool:
    """Whether it is; what is refused is named with the value."""
    try:
        make(**{name: value})
    except ConfigError as error:
        field = name if make is AdapterConfig else f"adapter.{name}"
        assert all(problem.startswith(field) and problem.fields == (field,) for problem in error.problems), error
        items = [*value, *value.values()] if isinstance(value, dict) else []
        items += [tuple(value)] if isinstance(value, list) else []
        assert any(shown(part) in str(error) for part in (value, *items)) or "is empty" in str(error), error
        return False
    return True


def test_the_adapter_is_a_mapping_or_a_config() -> None:
    for value in ODD:
        if not isinstance(value, dict):
            with pytest.raises(ConfigError, match=r"adapter must be fields and their values, got "):
                RunConfig(adapter=value)


def test_all_wrong_fields_are_named_at_once() -> None:
    values = {name: object() for name in KINDS} | {"adapter": {name: object() for name in ADAPTER}}
    with pytest.raises(ConfigError) as caught:
        make_run_config({**values, "epohcs": 3}, owner="these")
    names = [name for problem in caught.value.problems for name in problem.fields]
    assert sorted(names) == sorted([*KINDS, *(f"adapter.{name}" for name in ADAPTER), "epohcs"])


def test_a_value_of_any_size_is_shown_in_a_line() -> None:
    value: Any = "ha" * 99
    for _ in range(5):
        value = [value] * 9
    with pytest.raises(ConfigError) as caught:
        RunConfig(epochs=value, model_kwargs={"x": value})
    assert len(str(caught.value)) < 9000
