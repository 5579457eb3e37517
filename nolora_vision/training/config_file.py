"""A RunConfig from YAML and the command line, and back to YAML."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from nolora_vision.config import ConfigError, Problem
from nolora_vision.training.flags import Flags, read_flags
from nolora_vision.training.kinds import File, from_mapping
from nolora_vision.training.run_config import RunConfig, Short
from nolora_vision.training.yaml_file import YamlFile, read_yaml_file, to_yaml


@dataclass(frozen=True)
class ConfigFile:
    """Where the defaults come from."""

    config: Annotated[File | None, Short(aliases=["-c"])] = None
    """YAML file with fields of RunConfig; what else is on the command line overrides it."""


def parse_run_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The config that a command line asks for: defaults, then the YAML of `-c`, then the flags.

    Raises:
        ConfigError: if flags are unknown or values not usable; every problem of file and flags is listed.
        SystemExit: 0 after --help.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    flags = read_flags(args, ConfigFile, RunConfig)
    path = flags.values.get("config") or _args_of_the_run(flags.values.get("resume"))
    if {"-h", "--help"} & set(args):
        _help(RunConfig() if path is None else load_run_config(path))
    file, unread = None, ()
    if path is not None:
        try:
            file = read_yaml_file(path)
        except ConfigError as error:
            file, unread = YamlFile(path), error.problems
    return _config_of(file, flags, unread)


def load_run_config(path: Path) -> RunConfig:
    """Read a YAML file of RunConfig fields.

    Raises:
        ConfigError: if it is absent, not YAML, or has unknown or unusable values; every problem is listed.
    """
    return _config_of(read_yaml_file(path), None)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The fields of a YAML file.

    Raises:
        ConfigError: if it is absent, not YAML, no mapping, or has a key twice.
    """
    file = read_yaml_file(path)
    if file.problems:
        raise ConfigError(str(path), file.problems)
    return dict(file.values)


def make_run_config(values: Mapping[str, Any], *, owner: str) -> RunConfig:
    """A config from plain values, as YAML has them.

    Args:
        owner: whose values they are, for the message.

    Raises:
        ConfigError: if some are unknown or unusable; every problem is listed.
    """
    return from_mapping(RunConfig, values, owner)


def dump_run_config(config: RunConfig) -> str:
    """The config as YAML that `-c` reads back to an equal one."""
    return to_yaml(as_plain(asdict(config)))


def dump_differences(config: RunConfig, *, also: Sequence[str] = ()) -> str:
    """What differs from the defaults, and the fields in `also`, as YAML that `-c` reads back to an equal config."""
    usual, lines = as_plain(asdict(RunConfig())), []
    for name, value in as_plain(asdict(config)).items():
        if name not in also and value == usual[name]:
            continue
        if name == "adapter":
            value = {key: _short(item) for key, item in value.items() if item != usual[name][key]}
        if isinstance(value, (dict, list)):
            lines.append(f"{name}: {to_yaml(value, default_flow_style=True, width=math.inf)}")
        else:
            lines.append(to_yaml({name: _short(value)}))
    return "".join(lines)


def _short(value: Any) -> Any:
    """10 for 10.0, which a field that takes numbers makes of it again."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, all the way down."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _args_of_the_run(resume: str | None) -> Path | None:
    """The args.yaml of the run that `--resume DIR` names, so that this need be all that is said."""
    path = Path(resume or "") / "args.yaml"
    return path if resume and path.is_file() else None


def _config_of(file: YamlFile | None, flags: Flags | None, unread: Sequence[Problem] = ()) -> RunConfig:
    """The config of a file and of flags over it.

    Args:
        unread: why the file could not be read; what is wrong between fields is not known then.
    """
    said = [*unread, *(file.problems if file else ()), *(flags.problems if flags else ())]
    try:
        config = make_run_config(_values(file, flags), owner="RunConfig")
    except ConfigError as error:
        wrong = {name for problem in said for name in problem.fields}
        found = [problem for problem in error.problems if not wrong & set(problem.fields)]
        said += [problem for problem in found if not unread or len(problem.fields) == 1]
    else:
        if not said:
            return config
    own = "the command line" if file else "The command line"
    sources = [*([str(file.path)] if file else []), *([own] if flags and flags.any else [])]
    placed = [Problem(problem + _place(problem, file, flags), *problem.fields) for problem in said]
    raise ConfigError(" with ".join(sources), placed)


def _values(file: YamlFile | None, flags: Flags | None) -> dict[Any, Any]:
    """Those of the file, and over them those of the flags, each within its own mapping."""
    values: dict[Any, Any] = dict(file.values) if file else {}
    for name, value in (flags.values if flags else {}).items():
        head, _, rest = name.partition(".")
        if rest and isinstance(inner := values.get(head, {}), Mapping):
            values[head] = {**inner, rest: value}
        elif not rest and name != "config":
            values[name] = value
    return values


def _place(problem: Problem, file: YamlFile | None, flags: Flags | None) -> str:
    """Where the fields that a problem is about were said: flags, or else lines."""
    spelled, lines = flags.spelled if flags else {}, file.lines if file else {}
    places = [spelled.get(name) or (f"line {lines[name]}" if name in lines else "") for name in problem.fields]
    places = list(dict.fromkeys(filter(None, places)))
    return f" ({', '.join(places)})" if places else ""


def _help(defaults: RunConfig) -> NoReturn:
    epilogue = "Defaults from a YAML file: -c FILE, --config FILE."
    text = f"{RunConfig.__doc__}\n{epilogue}"
    tyro.cli(RunConfig, args=["--help"], default=defaults, prog="train.py", description=text)
    raise AssertionError("--help ends the program")
