"""YAML: a file as plain values with the line of each field, and back; what cannot be read is a ConfigError."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nolora_vision.config import ConfigError, Problem, shown

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class YamlFile:
    """The fields of a file."""

    path: Path
    values: Mapping[Any, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    """From 1, by dotted name, also of fields within fields."""
    problems: tuple[Problem, ...] = ()
    """Keys that are given twice."""


def read_yaml_file(path: Path) -> YamlFile:
    """Read a file; an empty one has no fields.

    Raises:
        ConfigError: if it is absent, not YAML, or no mapping.
    """
    try:
        loader = _Loader(path.read_bytes())
        loader.name = str(path)
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}."]) from error
    except (yaml.YAMLError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ConfigError(str(path), [f"is not YAML: {error}"]) from error
    except RecursionError as error:
        raise ConfigError(str(path), ["is not YAML: it is nested too deeply."]) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"must hold fields and values, got {type(values).__name__}."])
    return YamlFile(path, values, dict(_lines(node, "")), tuple(loader.problems))


def to_yaml(values: Any, **style: Any) -> str:
    """Plain values as YAML that reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **style)


class _Numbers(yaml.resolver.Resolver):
    """Numbers as YAML 1.2 has them and people expect: 1e-3 is one; 010 and 1:30, eight and ninety before, are text."""


_Numbers.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}int", f"{_TAG}float")]
    for first, resolvers in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (
    ("int", r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"),
    ("float", r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _Numbers.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), list("-+.0123456789"))


class _Dumper(_Numbers, yaml.SafeDumper):
    """The safe dumper, which puts text in quotes where `_Loader` would read a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice twice."""
        return True


class _Loader(_Numbers, yaml.SafeLoader):
    """The safe loader, which notes keys that are given twice and names the line of a value that cannot be one."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.problems: list[Problem] = []
        self.deep_construct = True  # so that what holds itself is refused

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the safe loader does, but for the errors that Python raises on odd numbers and dates."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            text = f"{shown(node.value)} is no {node.tag.removeprefix(_TAG)}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the safe loader does, with a problem for each key that it has twice."""
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        values = super().construct_mapping(node, deep=deep)
        lines: dict[tuple[str, str], int] = {}
        for key in keys:
            name, line = str(key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and (key.tag, name) in lines:
                self.problems.append(Problem(f"{name} is given twice, in lines {lines[key.tag, name]} and {line}."))
            lines[key.tag, name] = line
        return values


def _lines(node: Any, prefix: str) -> Any:
    """Pairs of dotted name and line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            yield prefix + key.value, key.start_mark.line + 1
            if not prefix:
                yield from _lines(value, f"{key.value}.")
