"""What each field of a config takes, by its annotation: checked by pydantic, said in words, all problems at once."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from nolora_vision.config import LARGEST_FLOAT, LARGEST_INT, ConfigError, Problem, did_you_mean, shown

Config = TypeVar("Config")


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("no name and no path has a NUL")
    return text


def _as_path(value: object) -> object:
    return Path(_without_nul(value)) if isinstance(value, str) and value.strip() else value


Text = Annotated[str, StringConstraints(pattern=r"\S"), AfterValidator(_without_nul)]
"""Some characters, not only blanks."""
File = Annotated[Path, BeforeValidator(_as_path)]
Whole = Annotated[int, Ge(0), Le(LARGEST_INT)]
Count = Annotated[int, Ge(1), Le(LARGEST_INT)]
Amount = Annotated[float, Ge(0), Le(LARGEST_FLOAT)]
Positive = Annotated[float, Gt(0), Le(LARGEST_FLOAT)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
ShareAboveZero = Annotated[float, Gt(0), Le(1)]
_Integer = Annotated[int, Ge(-LARGEST_INT), Le(LARGEST_INT)]
_Number = Annotated[float, Ge(-LARGEST_FLOAT), Le(LARGEST_FLOAT)]
_Plain = _Integer | _Number | bool | Text
Options = dict[Text, _Plain]
ModelOptions = dict[Text, _Plain | list[_Plain] | None]
"""Also lists, which a saved adapter may have."""


def from_mapping(cls: type[Config], values: Mapping[Any, Any], owner: str) -> Config:
    """A config from a mapping, as YAML has it.

    Args:
        owner: whose values they are, for the message.

    Raises:
        ConfigError: if some are unknown, missing or unusable; every problem is listed.
    """
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    problems = [_unknown(key, list(known)) for key in values if key not in known]
    absent = {f.name for f in known.values() if f.default is f.default_factory is MISSING and f.name not in values}
    problems += [Problem(f"{name} must be given.", name) for name in absent]
    try:
        given = {name: values[name] for name in known if name in values}
        config = cls(**given, **dict.fromkeys(absent))
    except ConfigError as error:
        raise ConfigError(owner, [*problems, *unaffected(error.problems, absent)]) from None
    if problems:
        raise ConfigError(owner, problems)
    return config


def settle(config: Any) -> tuple[list[Problem], set[str]]:
    """Make each field of a frozen config what its annotation says: text a path, a list a tuple, a mapping a config.

    Returns:
        What is wrong with the other fields, and their names. They hold their defaults then, for what is checked next.
    """
    problems: list[Problem] = []
    bad: set[str] = set()
    for field, kind, take in _takers(type(config)):
        value = getattr(config, field.name)
        try:
            value = take(value)
        except ValidationError:
            problems.append(must_be(field.name, value, kind))
            bad.add(field.name)
            value = field.default if field.default_factory is MISSING else field.default_factory()
        except ConfigError as error:
            problems += [problem.within(field.name) for problem in error.problems]
            bad.add(field.name)
            value = field.default if field.default_factory is MISSING else field.default_factory()
        object.__setattr__(config, field.name, value)
    return problems, bad


def unaffected(problems: Sequence[Problem], bad: set[str]) -> list[Problem]:
    """Those that are about none of the fields that are wrong anyway."""
    return [problem for problem in problems if not {name.partition(".")[0] for name in problem.fields} & bad]


@cache
def kinds_of(cls: type) -> Mapping[str, Any]:
    """The annotations of a config's fields."""
    return get_type_hints(cls, include_extras=True)


def must_be(name: str, value: object, kind: Any) -> Problem:
    """That a field's value is none for it."""
    hint = did_you_mean(value, _choices(kind)) if isinstance(value, str) else ""
    words, most = in_words(kind), LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
    too_large = "number" in words and isinstance(value, (int, float)) and abs(value) > most
    return Problem(f"{name} must be {words}{f', {most:,} at most' * too_large}, got {shown(value)}.{hint}", name)


def in_words(kind: Any) -> str:
    """What a field of this kind takes, such as `a whole number of at least 1, or None`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return in_words(args[0]) + (_bounds(args[1:]) or (" that is not blank" if args[0] in (str, Path) else ""))
    if origin in (Union, types.UnionType):
        return ", or ".join(map(in_words, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple and args[-1] is ...:
        return f"a list with each item {in_words(args[0])}"
    if origin is tuple:
        return f"{len(args)} values, each {in_words(args[0])}"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list with each item {in_words(args[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return "names and their values" if args[1] is Any else f"names with values, each {in_words(args[1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return {**words, types.NoneType: "None"}.get(kind, "fields and their values")


# ------------------------------------------------------------------------------------------------------- of one field


@cache
def _takers(cls: type) -> Sequence[tuple[Field[Any], Any, Callable[[Any], Any]]]:
    """Each field with its annotation and with what makes a value one of it, or raises.

    Made once: making pydantic's validators takes as long as hundreds of configs, of which a sweep has as many.
    """
    kinds = kinds_of(cls)
    return [(field, kinds[field.name], _taker(kinds[field.name])) for field in fields(cls)]


def _taker(kind: Any) -> Callable[[Any], Any]:
    parts = (kind, *get_args(kind))
    nested = next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
    if nested is not None:
        whole = TypeAdapter(InstanceOf[nested] | None if types.NoneType in parts else InstanceOf[nested])  # type: ignore[valid-type]

        def made(value: Any) -> Any:
            return from_mapping(nested, value, "") if isinstance(value, Mapping) else whole.validate_python(value)

        return made
    strict = TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))  # true is no number, "3" neither
    if get_origin(kind) is tuple:
        return lambda value: strict.validate_python(tuple(value) if isinstance(value, list) else value)
    return strict.validate_python


def _choices(kind: Any) -> list[str]:
    """The names that it knows."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [name for part in get_args(kind) if get_origin(part) is Literal for name in get_args(part)]


def _bounds(constraints: Sequence[Any]) -> str:
    kinds = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
    said = [
        f" {words} {getattr(constraint, name)}"
        for constraint in constraints
        for kind, name, words in kinds
        if isinstance(constraint, kind) and getattr(constraint, name) not in (LARGEST_INT, LARGEST_FLOAT)
    ]
    return " and".join(said)


def _unknown(key: object, known: Sequence[str]) -> Problem:
    head, _, rest = str(key).partition(".")
    hint = f" Write {head}: {{{rest}: …}}." if rest and head in known else did_you_mean(str(key), known)
    name = key if isinstance(key, str) else shown(key)
    return Problem(f"{name} is not a field.{hint}", str(key))
