"""A command line as plain values, flag by flag: tyro reads each, and whatever is wrong is said at once."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, is_dataclass, make_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

import tyro

from nolora_vision.config import Problem, did_you_mean, shown
from nolora_vision.training.kinds import in_words, kinds_of, must_be

ELSEWHERE = {
    "learning-rate": "lr",
    "amp": "amp-dtype",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "grad-accum-steps",
    "label-smoothing": "smoothing",
    "r": "rank",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "target-modules": "targets",
}
"""What Transformers, PEFT, timm and torchvision call a flag of the same meaning → the last part of ours."""


@dataclass(frozen=True)
class Flags:
    """What a command line says."""

    values: Mapping[str, Any]
    """By dotted name; of a flag that is given twice, the last."""
    spelled: Mapping[str, str]
    """How they were written: dotted name → flag."""
    problems: tuple[Problem, ...]

    @property
    def any(self) -> bool:
        """Whether the command line says anything, apart from naming a file."""
        return bool(self.problems or set(self.values) - {"config"})


@dataclass(frozen=True)
class _Flag:
    name: str
    """Of its field, dotted."""
    kind: Any
    form: type
    """A dataclass of this one field, which tyro reads."""


def read_flags(args: Sequence[str], *owners: type) -> Flags:
    """Read the flags of dataclasses' fields, `--adapter.rank 4` for those of a dataclass within one.

    What tyro would refuse is refused; whether a value is in its range is for others to say.
    """
    known = _known(owners)
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    problems: list[Problem] = []
    for group in _groups(args[:-1] if args and args[-1] == "--" else args):  # which says that no flags follow
        spelling = group[0].partition("=")[0]
        flag = known.get(_normal(spelling))
        if flag is None:
            hint = _hint(_normal(spelling), known)
            problems.append(Problem(f"{shown(group[0])} is no flag.{hint}" if _is_flag(group[0]) else _stray(group)))
            continue
        spelled[flag.name] = spelling
        if glued := re.fullmatch(r"-[^\W\d_]([^=].*)", group[0], re.DOTALL):  # -b64, no flag to tyro 1.0 on Python 3.10
            group[0] = f"--{_option(flag.name)}={glued[1]}"
        if (pairs := _pairs(flag, group)) is not None:
            values[flag.name] = pairs
            continue
        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                values[flag.name] = tyro.cli(flag.form, args=group).value
        except SystemExit:
            problems.append(_unreadable(flag, group))
    return Flags(values, spelled, tuple(problems))


@cache
def _known(owners: tuple[type, ...]) -> Mapping[str, _Flag]:
    """Every way to write a flag → what it is."""
    found = {}
    for owner in owners:
        for name, kind in _fields(owner, ""):
            settings = [part for part in get_args(kind) if hasattr(part, "aliases")]
            bare = Annotated[kind, tyro.conf.arg(name=(option := _option(name)), aliases=_aliases(settings))]
            is_switch = kind is bool
            form = make_dataclass("Flag", [("value", bare, field(default=False))] if is_switch else [("value", bare)])
            flag = _Flag(name, kind, form)
            head, dot, last = option.rpartition(".")
            found |= dict.fromkeys([f"--{option}", *_aliases(settings)], flag)
            found |= {f"--{head}{dot}no-{last}": flag} if is_switch else {}
    return found


def _fields(owner: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of each field."""
    for name, kind in kinds_of(owner).items():
        if is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, kind


def _pairs(flag: _Flag, group: Sequence[str]) -> dict[str, Any] | None:
    """`name=value` after name=value, as timm's own train.py takes model options; None if it is not written so.

    A value is Python's if it can be read as that, `depths=[2,2]`, else a word.
    """
    _, attached, first = group[0].partition("=")
    words = [*([first] if attached else []), *group[1:]]
    written = [re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.DOTALL) for word in words]
    if get_origin(flag.kind) is not dict or not written or None in written:
        return None
    return {match[1]: _literal(match[2]) for match in written if match}


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _option(name: str) -> str:
    return name.replace("_", "-")


def _aliases(settings: Sequence[Any]) -> list[str]:
    return [alias for setting in settings for alias in setting.aliases or ()]


def _groups(args: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with what stands behind it; words before the first flag come together."""
    group: list[str] = []
    for arg in args:
        if group and _is_flag(arg):
            yield group
            group = []
        group.append(arg)
    if group:
        yield group


def _is_flag(arg: str) -> bool:
    """As tyro has it: -1, -.5 and -inf are values."""
    if re.fullmatch(r"-(inf|infinity|nan)", arg, re.IGNORECASE):
        return False
    return arg == "--" or (arg.startswith("-") and arg.lstrip("-")[:1].isalpha())


def _normal(spelling: str) -> str:
    """With dashes instead of underscores, as tyro takes both; of a short flag with its value, -b64, the flag."""
    if re.match(r"-[^\W\d_]", spelling):
        return spelling[:2]
    return "--" + spelling[2:].replace("_", "-") if spelling.startswith("--") else spelling


def _hint(spelling: str, known: Iterable[str]) -> str:
    """' Did you mean …?': by another library's name, by the last part of a dotted name, or by the letters."""
    meant = ELSEWHERE.get(spelling.removeprefix("--"), "")
    ends = (f".{spelling.removeprefix('--')}", f".{meant}")
    same = [name for name in known if name == f"--{meant}" or name.endswith(ends)]
    return did_you_mean(same[0], same) if same else did_you_mean(spelling, known)


def _stray(words: Sequence[str]) -> str:
    return f"{shown(' '.join(words))} stands behind no flag."


def _unreadable(flag: _Flag, group: Sequence[str]) -> Problem:
    """That what stands behind a flag is no value for it."""
    _, attached, first = group[0].partition("=")
    given = [*([first] if attached else []), *group[1:]]
    if flag.kind is bool:
        text = f"{flag.name} takes no value, {group[0]} alone says it, got {shown(' '.join(given))}."
        return Problem(text, flag.name)
    if not given:
        return Problem(f"{flag.name} must be {in_words(flag.kind)}, got nothing.", flag.name)
    return must_be(flag.name, given[0] if len(given) == 1 else given, flag.kind)
