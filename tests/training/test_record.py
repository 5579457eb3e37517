"""What a run says of itself."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from nolora_vision.training import record


def test_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = record.git_state()
    top = Path(record.__file__).parents[2]
    if not (top / ".git").exists():
        assert state is None
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=top, capture_output=True, text=True).stdout.strip()
        assert state is not None and state["commit"] == head and isinstance(state["dirty"], bool)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.git_state() is None


def test_the_commit_is_that_of_the_code_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that goes on while a sweep runs does not change what ran."""
    record.code_state.cache_clear()
    states = iter([{"commit": "first", "dirty": False}, {"commit": "second", "dirty": True}])
    monkeypatch.setattr(record, "git_state", lambda: next(states))
    try:
        assert [record.environment()["git"]["commit"] for _ in range(2)] == ["first", "first"]
    finally:
        record.code_state.cache_clear()


def test_a_processor_has_a_name_and_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    name, _, instructions = record.device_name().rpartition(", ")
    assert name and instructions == record.torch.backends.cpu.get_cpu_capability()
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert name in Path("/proc/cpuinfo").read_text()


def test_files_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    record.write_record(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and path.stat().st_mode & 0o044 == 0o044 & ~_umask()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(record.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write_record(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
