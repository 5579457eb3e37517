"""Over many cycles and epochs nothing grows: objects, tensors, memory, files, threads, processes.

`test_endurance.py` runs these in a process of their own: what other tests leave, such as FakeTensors, would be counted.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.multiprocessing.reductions import shared_cache

import nolora_vision
from nolora_vision import AdapterConfig
from nolora_vision.surgery import inject as inject_module
from nolora_vision.surgery.adapter import AdaptedLayer
from nolora_vision.training.progress import Silence
from nolora_vision.training.run import run
from nolora_vision.training.run_config import RunConfig
from tests.soak import times

PYTHON = {*sys.stdlib_module_names, "builtins"}
CACHED = {"matplotlib.font_manager.FontProperties"}  # what its 1,024 last searches for a font were for
CYCLES, WARM_UP = times(1000, 100), 20
EPOCHS, WARM_EPOCHS = times(200, 30), times(20, 10)
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "mlp_ratio": 4.0}


@dataclass(frozen=True)
class Census:
    """What a process has now."""

    objects: Counter[str]
    """Live Python objects that the garbage collector knows, by type."""
    tensors: tuple[int, int]
    """How many, and the bytes of their storages, each counted once."""
    open_files: int
    threads: int
    children: int
    temporary_files: int
    resident_bytes: int

    @staticmethod
    def take() -> Census:
        """After a full collection, so that only what something still refers to is counted."""
        shared_cache.free_dead_references()  # of tensors that came from workers; torch does it at each 128
        for _ in range(3):
            gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        live = gc.get_objects()  # only now: a storage that was looked at is an object from then on
        objects = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in live)
        with suppress(AttributeError):  # else what leaks next would take freed memory, and not show; glibc only
            ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        return Census(
            objects=objects,
            tensors=(len(tensors), sum(storages.values())),
            open_files=process.num_fds(),
            threads=process.num_threads(),
            children=len(process.children(recursive=True)),
            temporary_files=sum(len(files) for _, _, files in os.walk(tempfile.gettempdir())),
            resident_bytes=process.memory_info().rss,
        )

    def without_caches(self) -> Census:
        """Without what is kept in bounded caches, of no run's: much of Python's own, and a kind of matplotlib's."""
        own = {
            kind: n for kind, n in self.objects.items() if kind.partition(".")[0] not in PYTHON and kind not in CACHED
        }
        return replace(self, objects=Counter(own))

    def growth(self, before: Census, allowed: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What there is more of than before, memory apart; objects of some types may have grown by exactly so many."""
        more = {kind: n - before.objects[kind] for kind, n in self.objects.items() if n > before.objects[kind]}
        found: dict[str, Any] = {kind: n for kind, n in more.items() if n != (allowed or {}).get(kind, 0)}
        for name in ("tensors", "open_files", "threads", "children", "temporary_files"):
            if getattr(self, name) > getattr(before, name):
                found[name] = (getattr(before, name), getattr(self, name))
        return found


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_new() -> Iterator[None]:
    """What the imports made is set aside: nothing counts it or goes through it, which took most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what other processes leave is not counted."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def tiny() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=3, **TINY).eval()


def adapter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in nolora_vision.adapter_parameters(model))


def skeleton(model: nn.Module) -> list[Any]:
    """Modules, their attributes and hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return [
        (path, id(m), type(m), sorted(vars(m)), [len(getattr(m, name)) for name in hooks])
        for path, m in model.named_modules()
    ]


def growth_over(cycle: Callable[[int], None], cycles: int, warm_up: int = WARM_UP) -> tuple[dict[str, Any], int]:
    """What grew over so many cycles, and by how many bytes the process did."""
    for i in range(warm_up):
        cycle(i)
    before = Census.take()
    before = Census.take()  # with one to count, as there will be at the end
    for i in range(cycles):
        cycle(i)
    after = Census.take()
    return after.growth(before), after.resident_bytes - before.resident_bytes


# ------------------------------------------------------------------------------------------------- inject and eject


def injected_and_ejected(model: nn.Module, x: Tensor) -> Callable[[int], None]:
    """One life: inject, train a step, hold, disable, fold, eject."""

    def cycle(i: int) -> None:
        noise = 0.5 if i % 2 else 0.0
        nolora_vision.inject(model, rank=8, modulation_noise=noise)
        model(x).square().mean().backward()
        model.zero_grad()
        if i % 4 == 0:
            nolora_vision.hold_frozen(model, torch.bfloat16)
        with torch.no_grad(), nolora_vision.disabled(model):
            model(x)
        nolora_vision.fold(model)
        nolora_vision.eject(model)

    return cycle


def test_injections_leave_nothing() -> None:
    model, x = tiny(), torch.randn(2, 3, 16, 16)
    before = skeleton(model)
    cost = adapter_bytes(nolora_vision.inject(copy.deepcopy(model), rank=8))
    found, grown = growth_over(injected_and_ejected(model, x), CYCLES)
    print(f"resident memory grew by {grown / 2**20:.2f} MiB; adapters that stayed would be {cost * CYCLES / 2**20:.1f}")
    assert not found and skeleton(model) == before
    assert grown < cost * CYCLES / 4


@contextmanager
def kept_adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept: list[Any] = []
    release = AdaptedLayer.release
    monkeypatch.setattr(AdaptedLayer, "release", lambda layer: (kept.append(layer.adapter), release(layer))[1])
    yield


@contextmanager
def kept_hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inject_module, "tell_images", lambda model: model.register_forward_pre_hook(lambda *_: None))
    yield


@contextmanager
def kept_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ExitStack() as files:
        opened = lambda model: files.enter_context(tempfile.TemporaryFile())  # noqa: E731
        monkeypatch.setattr(inject_module, "tell_images", opened)
        yield


@contextmanager
def kept_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stop = threading.Event()
    monkeypatch.setattr(inject_module, "tell_images", lambda model: threading.Thread(target=stop.wait).start())
    yield
    stop.set()


LEAKS = ((kept_adapters, "tensors"), (kept_hooks, "builtins.function"), (kept_files, "open_files"))


@pytest.mark.parametrize(("leak", "kind"), (*LEAKS, (kept_threads, "threads")))
def test_a_leak_is_seen(leak: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few cycles already."""
    model, x = tiny(), torch.randn(2, 3, 16, 16)
    with leak(monkeypatch):
        found, _ = growth_over(injected_and_ejected(model, x), 12, warm_up=4)
    assert kind in found, found


def test_leaked_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory alone shows a kept adapter for each cycle, whoever keeps it."""
    model = tiny()
    cost = adapter_bytes(nolora_vision.inject(copy.deepcopy(model), rank=8))
    kept: list[Any] = []
    _, grown = growth_over(lambda i: kept.append(torch.randn(cost // 4)), CYCLES)
    assert grown > cost * CYCLES / 4


# ------------------------------------------------------------------------------------------------------------- swaps


def test_swaps_leave_nothing(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    for seed, targets in enumerate((("qkv", "mlp"), ("q", "v"), "mlp")):
        torch.manual_seed(seed)
        one = nolora_vision.inject(tiny(), rank=8, targets=targets)
        nolora_vision.save_adapter(one, tmp_path / f"{seed}")
    cost = adapter_bytes(one)
    model = tiny()
    before = skeleton(model)
    for name in ("0", "1"):
        nolora_vision.add_adapter(model, name, tmp_path / name)

    @torch.no_grad()
    def cycle(i: int) -> None:
        for name in ("0", "1", None):
            nolora_vision.set_adapter(model, name)
            model(x)
        model(x, adapter_names=["0", "1"])
        if i % 10 == 0:
            nolora_vision.add_adapter(model, "2", tmp_path / "2")
            nolora_vision.save_adapter(nolora_vision.set_adapter(model, "2"), tmp_path / "again")
            nolora_vision.remove_adapter(model, "2")

    found, grown = growth_over(cycle, CYCLES)
    print(f"resident memory grew by {grown / 2**20:.2f} MiB; adapters that stayed would be {cost * CYCLES / 2**20:.1f}")
    assert not found and grown < cost * CYCLES / 4
    for name in ("0", "1"):
        nolora_vision.remove_adapter(model, name)
    assert skeleton(model) == before


# ------------------------------------------------------------------------------------------------------------ epochs


class Counting(Silence):
    """A run's progress that counts what there is at the ends of two epochs."""

    def __init__(self) -> None:
        self.found = {epoch: Census.take() for epoch in (WARM_EPOCHS, EPOCHS)}  # as many as there will be

    def end_epoch(self, row: Mapping[str, float]) -> None:
        if int(row["epoch"]) in (WARM_EPOCHS, EPOCHS):
            self.found[int(row["epoch"])] = Census.take()


@pytest.mark.parametrize("with_checkpoints", [False, True], ids=["workers", "checkpoints"])
def test_epochs_leave_nothing(with_checkpoints: bool, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = RunConfig(
        model="test_vit",
        dataset="digits:5-9",
        pretrained=False,
        img_size=16,
        model_kwargs={"patch_size": 8, "depth": 1},
        adapter=AdapterConfig(rank=64),
        max_train_samples=16,
        max_eval_samples=16,
        batch_size=8,
        workers=0 if with_checkpoints else 1,
        checkpoint_steps=20 if with_checkpoints else None,
        keep_epoch="last",
        output=tmp_path / "out",
    )

    def trained(epochs: int, counting: Counting) -> dict[str, Any]:
        return run(replace(config, epochs=epochs), progress=counting, checkpoints=with_checkpoints)

    trained(2, Counting())  # what Python and torch load once
    before, counting = Census.take(), Counting()
    before = Census.take()
    record = trained(EPOCHS, counting)
    assert len(record["history"]) == EPOCHS
    cost = 4 * record["parameters"]["adapter"]
    del record
    first, last = counting.found[WARM_EPOCHS], counting.found[EPOCHS]
    after = Census.take()
    grown = last.resident_bytes - first.resident_bytes
    print(f"between epochs {last.growth(first)}, {grown / 2**20:.2f} MiB; after the run {after.growth(before)}")
    assert grown < cost * (EPOCHS - WARM_EPOCHS) / 4  # of what a copy of the adapters for each epoch would be
    assert not last.growth(first, {"builtins.dict": EPOCHS - WARM_EPOCHS})  # the history has a row for each epoch
    assert not after.without_caches().growth(before)
