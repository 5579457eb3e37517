"""Damaged adapter directories, by the hundred: a typed error and an untouched model, or an exact load."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nolora_vision
from nolora_vision import CheckpointError, load_adapter, save_adapter
from nolora_vision.surgery.adapter import adapted_layers
from tests.soak import times

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, bytes]
WRONG_VALUES = (None, True, -1, 0, 7, 10**30, 1.5, 1e308, "", "x", "7", [], [None], ["x"], [[[]]], {}, {"x": None})

JUNK = (b"", b"\0", b"{}", b"[]", b"null", b'"x"', b"\x80\x04.", b"PK\x03\x04", b"[" * 100_000, b"\xff" * 99)


class Case:
    """A bare model, a saved adapter of it, and what loading it gives."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(5)
        self.bare = timm.create_model("test_vit", num_classes=3).eval()
        model = nolora_vision.inject(copy.deepcopy(self.bare), rank=2, targets=("q", "fc1"), layers=[-1])
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.1)
        self.folder = save_adapter(model, folder / "a", class_names=list("abc"), metrics={"top1": 50.0})
        self.files = {name: (self.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        self.expected = {name: value.clone() for name, value in model.state_dict().items()}
        self.before = {name: value.clone() for name, value in self.bare.state_dict().items()}
        self.flags = self.flags_of(self.bare)

    def flags_of(self, model: nn.Module) -> list[Any]:
        modules = [(path, id(module), type(module)) for path, module in model.named_modules()]
        return [modules, [p.requires_grad for p in model.parameters()], sorted(vars(model))]

    def outcome(self, files: Files) -> str:
        """Load these files: the error's type, or `exact`; anything else fails the test."""
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        try:
            load_adapter(self.bare, self.folder)
        except CheckpointError as error:
            assert str(error), "an error must say what is wrong"
            assert self.flags_of(self.bare) == self.flags and not adapted_layers(self.bare)
            assert self.equal(self.bare.state_dict(), self.before), "a refused load changed the model"
            return type(error).__name__
        loaded = {name: value.clone() for name, value in self.bare.state_dict().items()}
        assert self.equal(loaded, self.expected), "a load that was not refused is not exact"
        nolora_vision.eject(self.bare)
        del self.bare._nolora_info
        self.bare.load_state_dict(self.before)
        return "exact"

    @staticmethod
    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One for all: a refused load leaves it as it was, and that is checked."""
    return Case(tmp_path_factory.mktemp("fuzz"))


def flipped(content: bytes, random: random.Random, first: int = 0, last: int | None = None) -> bytes:
    damaged = bytearray(content)
    damaged[random.randrange(first, last or len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def signed(files: Files) -> Files:
    """With checksums that fit, as somebody makes them who means harm."""
    config = json.loads(files[CONFIG])
    config["weights_sha256"] = sha256(files[WEIGHTS]).hexdigest()
    config.pop("sha256", None)
    return {**files, CONFIG: json.dumps(config).encode()}


def bit_flips(case: Case, random: random.Random) -> Iterator[Files]:
    for name in (WEIGHTS, CONFIG):
        for _ in range(times(700, 150)):
            yield {**case.files, name: flipped(case.files[name], random)}


def cuts_and_insertions(case: Case, random: random.Random) -> Iterator[Files]:
    for name in (WEIGHTS, CONFIG):
        content = case.files[name]
        for _ in range(times(100, 40)):
            at = random.randrange(len(content))
            yield {**case.files, name: content[:at]}
            yield {**case.files, name: content[:at] + random.randbytes(random.randrange(1, 9)) + content[at:]}
        for junk in JUNK:
            yield {**case.files, name: junk}


def wrong_values(case: Case, random: random.Random) -> Iterator[Files]:
    """Every field of the config, the adapter's own too, with every wrong value; and without it."""
    config = json.loads(case.files[CONFIG])
    config.pop("sha256")
    places = [(key,) for key in config] + [("adapter", key) for key in config["adapter"]]
    places += [("preprocessing", "mean"), ("backbone", next(iter(config["backbone"]))), ("versions", "torch")]
    for place in places:
        for value in (*WRONG_VALUES, ...):
            changed = copy.deepcopy(config)
            owner = changed if len(place) == 1 else changed[place[0]]
            if value is ...:
                del owner[place[-1]]
            else:
                owner[place[-1]] = value
            yield {**case.files, CONFIG: json.dumps(changed).encode()}


def signed_headers(case: Case, random: random.Random) -> Iterator[Files]:
    """Damage in the header of the weights, which checksums made to fit do not reveal."""
    content = case.files[WEIGHTS]
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(times(400, 100)):
        yield signed({**case.files, WEIGHTS: flipped(content, random, 0, 8 + length)})


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (bit_flips, times(1400, 300)),
        (cuts_and_insertions, times(400, 160)),
        (wrong_values, 500),
        (signed_headers, times(400, 100)),
    ],
)
def test_damage_is_refused_or_harmless(
    case: Case, damage: Callable[[Case, random.Random], Iterator[Files]], least: int
) -> None:
    outcomes = Counter(case.outcome(files) for files in damage(case, random.Random(0)))
    print(f"{damage.__name__}: {sum(outcomes.values())} cases, {dict(outcomes)}")
    assert sum(outcomes.values()) >= least and sum(outcomes.values()) > outcomes["exact"]
    assert case.outcome(case.files) == "exact"
