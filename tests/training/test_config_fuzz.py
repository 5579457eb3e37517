"""Many configs as mappings, YAML and command lines: each is a run's config or one message, never a crash."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nolora_vision import AdapterConfig, ConfigError
from nolora_vision.training.config_file import (
    as_plain,
    dump_differences,
    dump_run_config,
    load_run_config,
    make_run_config,
    parse_run_config,
)
from nolora_vision.training.kinds import kinds_of
from nolora_vision.training.run_config import RunConfig
from tests.soak import times
from tests.training.config_values import good, junk

pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning", "ignore:Possible set")
"""re's, for regular expressions such as [[a among the targets."""

RUN = {name: kind for name, kind in kinds_of(RunConfig).items() if name != "adapter"}
ADAPTER = {f"adapter.{name}": kind for name, kind in kinds_of(AdapterConfig).items()}
FIELDS = {**RUN, **ADAPTER}
GOOD, ANY = {name: good(name, kind) for name, kind in FIELDS.items()}, junk()
KEYS = st.one_of(st.sampled_from([*FIELDS, "epohcs"]).map(lambda name: mutated(name)), st.integers(), st.none())
WORDS = st.one_of(
    st.sampled_from(["x", "", "-1", "3", "1e3", "None", "--", "-x", "nan", "=", "a\0b"]), st.text(max_size=5)
)
ODD_LINES = (
    "a: &x [*x]", "- 1", "\tepochs: 3", "epochs: 3\nepochs: 4", "{}", "[]", "~: 1", "1: 2", "[a]: 3", "? {a: 1}\n: 2",
    "lr: 1e3", "lr: .nan", "lr: 1e400", "epochs: 010", "epochs: 1:30", "epochs: 1_0", "epochs: " + "9" * 5000,
    "batch-size: 3", "aa: off", "pretrained: no", "model: 2024-01-01", "model: 2024-13-45", "adapter:",
    "adapter: {rank: 2}", "epochs: ", "# c", "adapter: {rank: 2, rank: 3}", "adapter.rank: 3", "<<: {epochs: 3}",
    "a: !!python/object:os.system x", "a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: !!binary x",
    "x: &y {epochs: 3}\n<<: *y", "...\n---\nepochs: 3", "%TAG ! a", "!!map [1]", "epochs: '3'", "Epochs: 3",
    "experiment: '\\ud800'", 'experiment: "\\uD800"', "a: *b", "epochs: 0x10", "seed: 1e1", "a: |\n  b\n c",
    "output: ~", "output: ''", "x: " + "[" * 1500, "no_aug: yes",
)  # fmt: skip
"""Lines that YAML reads as few people expect, or not at all."""


def fuzz(strategy: st.SearchStrategy[Any], outcome: Callable[[Any], str], examples: int, share: int = 10) -> None:
    """Try so many; each outcome must be met by one of `share` of them."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )
    @given(strategy)
    def attempt(example: Any) -> None:
        outcomes[outcome(example)] += 1

    attempt()
    print(f"{sum(outcomes.values())} examples: {dict(outcomes)}")
    assert sum(outcomes.values()) >= examples and min(outcomes["config"], outcomes["error"]) >= examples / share


def outcome_of(make: Callable[[], RunConfig], folder: Path) -> str:
    """What came out; anything but a usable config and a telling message fails the test."""
    try:
        config = make()
    except ConfigError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
        assert error.owner and len(str(error)) < 30_000 and "Traceback" not in str(error)
        return "error"
    rate = config.resolved().lr
    assert rate is not None and rate >= 0
    for text in (dump_run_config(config), dump_differences(config)):
        (folder / "again.yaml").write_text(text, encoding="utf-8")
        assert load_run_config(folder / "again.yaml") == config, text
    record = json.loads(json.dumps(as_plain(asdict(config))))
    assert make_run_config(record, owner="the record") == config
    return "config"


@st.composite
def mappings(draw: st.DrawFn) -> dict[Any, Any]:
    """Fields with good values, among them in half of the cases some with any, and in some a key that is none."""
    names = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=6, unique=True))
    any_value = draw(st.sampled_from([0, 0, 1, 5]))
    values: dict[Any, Any] = {}
    for name in names:
        wild = any_value and draw(st.integers(0, 5)) < any_value
        value = draw(ANY if wild else GOOD[name])
        owner = values.setdefault("adapter", {}) if name.startswith("adapter.") else values
        owner[name.removeprefix("adapter.")] = value
    if draw(st.integers(0, 9)) == 0:
        values[draw(KEYS)] = 1
    if draw(st.integers(0, 19)) == 0:
        values["adapter"] = draw(ANY)
    return values


def mutated(name: str) -> str:
    """A field's name with a slip of the pen, always the same."""
    chance = random.Random(name)
    at = chance.randrange(len(name))
    return chance.choice(
        [name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), name.replace("_", "-")]
    )


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    """Fields as YAML in any style, with odd lines and damaged bytes among them."""
    values, odd = draw(mappings()), draw(st.integers(0, 2)) == 0
    try:
        text = yaml.safe_dump(
            plain(values), allow_unicode=draw(st.booleans()), default_flow_style=not odd and draw(st.booleans())
        )
    except yaml.YAMLError:
        text = ""
    lines = text.splitlines()
    if odd:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(ODD_LINES)))
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1, 3]))):
        if content:
            at = draw(st.integers(0, len(content) - 1))
            content[at : at + 1] = draw(st.binary(max_size=2))
    return bytes(content)


def plain(value: Any) -> Any:
    """As YAML can write it: lists for tuples, and integers of any length."""
    if isinstance(value, dict):
        return {key if key is None or isinstance(key, (int, bool)) else str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str, bytes)) else str(value)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Flags in any spelling with good values, and in half of the cases any words among them."""
    args: list[str] = []
    wild = draw(st.booleans())
    for name in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=5)):
        head, dot, last = name.rpartition(".")
        slip = wild and draw(st.integers(0, 9)) == 0
        option = mutated(name) if slip else name if draw(st.booleans()) else name.replace("_", "-")
        if FIELDS[name] is bool:
            args.append(f"--{option}" if draw(st.booleans()) else f"--{head}{dot}no-{last}")
            continue
        value = words_of(draw(GOOD[name]))
        if wild and draw(st.integers(0, 4)) == 0:
            value = draw(st.lists(WORDS, max_size=3))
        args += [f"--{option}={value[0]}", *value[1:]] if value and draw(st.booleans()) else [f"--{option}", *value]
    args += draw(st.sampled_from([[], [], [], ["-b", "8"], ["-b8"], ["-j=0"], ["--no-aug", "-j", "0"]]))
    if wild and draw(st.integers(0, 3)) == 0:
        args.insert(draw(st.integers(0, len(args))), draw(WORDS))
    return [arg for arg in args if arg not in ("-h", "--help")]


def words_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(word) for item in value.items() for word in item]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def test_mappings(tmp_path: Path) -> None:
    fuzz(
        mappings(), lambda values: outcome_of(lambda: make_run_config(values, owner="fuzz"), tmp_path), times(2600, 400)
    )


def test_yaml_files(tmp_path: Path) -> None:
    def outcome(content: bytes) -> str:
        (tmp_path / "c.yaml").write_bytes(content)
        return outcome_of(lambda: load_run_config(tmp_path / "c.yaml"), tmp_path)

    fuzz(yaml_files(), outcome, times(1500, 240))


def by_tyro(args: list[str]) -> RunConfig | None:
    """What tyro makes of a whole command line; None if it refuses it."""
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            return tyro.cli(RunConfig, args=args, default=RunConfig())
    except (SystemExit, ConfigError):  # tyro makes the one of the other from some version on
        return None


def test_command_lines_are_read_as_tyro_reads_them(tmp_path: Path) -> None:
    turns = itertools.count()  # as tyro takes its time, it reads every fourth

    def outcome(args: list[str]) -> str:
        result = outcome_of(lambda: parse_run_config(args), tmp_path)
        if next(turns) % 4 == 0:
            assert (parse_run_config(args) if result == "config" else None) == by_tyro(args), args
        return result

    fuzz(command_lines(), outcome, times(700, 120))


def test_command_lines_over_yaml(tmp_path: Path) -> None:
    def outcome(parts: tuple[bytes, list[str]]) -> str:
        (tmp_path / "c.yaml").write_bytes(parts[0])
        return outcome_of(lambda: parse_run_config([*parts[1], "-c", str(tmp_path / "c.yaml")]), tmp_path)

    # Both have to be good: 45 of 400 were, 42 on Python 3.10, where Hypothesis makes other examples.
    fuzz(st.tuples(yaml_files(), command_lines()), outcome, 400, share=20)
