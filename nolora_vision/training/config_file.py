"""A RunConfig from YAML and the command line, and back to YAML."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from nolora_vision.config import AdapterConfig, ConfigError, did_you_mean
from nolora_vision.training.run_config import RunConfig, Short


@dataclass(frozen=True)
class ConfigFile:
    """Where the defaults come from."""

    config: Annotated[Path | None, Short(aliases=["-c"])] = None
    """YAML file with fields of RunConfig; what else is on the command line overrides it."""


def parse_run_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The config that a command line asks for: defaults, then the YAML of `-c`, then the flags.

    Raises:
        ConfigError: if a value is not usable; every problem is listed.
        SystemExit: 0 after --help, 2 for a flag that cannot be read.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    file, rest = tyro.cli(ConfigFile, args=args, return_unknown_args=True, add_help=False)
    path = file.config or _args_of_the_run(rest)
    defaults = RunConfig() if path is None else load_run_config(path)
    epilogue = "Defaults from a YAML file: -c FILE, --config FILE."
    return tyro.cli(
        RunConfig, args=rest, default=defaults, prog="train.py", description=f"{RunConfig.__doc__}\n{epilogue}"
    )


def _args_of_the_run(args: Sequence[str]) -> Path | None:
    """The args.yaml of the run that `--resume DIR` names, so that this need be all that is said."""
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == "--resume":
            path = Path(value or (args[i + 1] if i + 1 < len(args) else "")) / "args.yaml"
            return path if path.is_file() else None
    return None


def load_run_config(path: Path) -> RunConfig:
    """Read a YAML file of RunConfig fields.

    Raises:
        ConfigError: if it is absent, not YAML, or has unknown or unusable values; every problem is listed.
    """
    return make_run_config(read_yaml(path), owner=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        ConfigError: if it is absent, not YAML, or no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}."]) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"is not YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"must hold fields and values, got {type(values).__name__}."])
    return values


def make_run_config(values: Mapping[str, Any], *, owner: str) -> RunConfig:
    """A config from plain values, as YAML has them.

    Args:
        owner: whose values they are, for the message.

    Raises:
        ConfigError: if some are unknown or unusable; every problem is listed.
    """
    problems = [*_unknown(values, RunConfig, ""), *_unknown(values.get("adapter") or {}, AdapterConfig, "adapter.")]
    try:
        config = _validator().validate_python(values)
    except ValidationError as error:
        kinds = {"extra_forbidden", "unexpected_keyword_argument"}
        problems += [_readable(e) for e in error.errors() if e["type"] not in kinds]
        raise ConfigError(owner, problems) from error
    except ConfigError as error:
        raise ConfigError(owner, [*problems, *error.problems]) from error
    if problems:
        raise ConfigError(owner, problems)
    return config


def dump_run_config(config: RunConfig) -> str:
    """The config as YAML that `-c` reads back to an equal one."""
    return yaml.safe_dump(as_plain(asdict(config)), sort_keys=False)


def dump_differences(config: RunConfig, *, also: Sequence[str] = ()) -> str:
    """What differs from the defaults, and the fields in `also`, as YAML that `-c` reads back to an equal config."""
    usual, lines = as_plain(asdict(RunConfig())), []
    for name, value in as_plain(asdict(config)).items():
        if name not in also and value == usual[name]:
            continue
        if name == "adapter":
            value = {key: item for key, item in value.items() if item != usual[name][key]}
        if isinstance(value, (dict, list)):
            lines.append(f"{name}: {yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=math.inf)}")
        else:
            lines.append(yaml.safe_dump({name: value}))
    return "".join(lines)


def as_plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, all the way down."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@cache
def _validator() -> TypeAdapter[RunConfig]:
    """Made once: making it takes as long as a hundred configs, of which a sweep's plan has hundreds."""
    return TypeAdapter(RunConfig)


class _Loader(yaml.SafeLoader):
    """The safe loader, which also takes 1e-3 for a number, as YAML 1.2 does and people expect."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unknown(values: Any, cls: type, prefix: str) -> list[str]:
    known = [f.name for f in fields(cls)]
    unknown = [key for key in values if key not in known] if isinstance(values, dict) else []
    return [f"{prefix}{key} is not a field.{did_you_mean(key, known)}" for key in unknown]


def _readable(error: Any) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return " ".join(cause.problems)
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}."
