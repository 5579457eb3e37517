"""A directory that is replaced in one step: whole after every failure, and after every kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nolora_vision.adapters import whole_directory as room
from nolora_vision.adapters.whole_directory import whole_directory, write_directory

OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new", "c": b"new"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=["exchange", "two renames"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An old directory, on a system that can exchange two names and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(room, "_exchange", lambda a, b: False)
    return write_directory(tmp_path / "x[1]", OLD)


def test_old_becomes_new_and_nothing_lies_about(target: Path) -> None:
    assert contents(target) == OLD
    assert write_directory(target, NEW) == target and contents(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["x[1]"]
    if os.name == "posix":
        assert target.stat().st_mode & 0o777 == 0o777 & ~room._umask()


@pytest.mark.skipif(sys.platform != "linux", reason="whether the system exchanges names is known for Linux only")
def test_this_system_exchanges(tmp_path: Path) -> None:
    a, b = write_directory(tmp_path / "a", OLD), write_directory(tmp_path / "b", NEW)
    assert room._exchange(a, b) and contents(a) == NEW and contents(b) == OLD
    assert not room._exchange(a, tmp_path / "absent") and contents(a) == NEW


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_leaves_the_old_one(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rename brings the new directory in, when the old one is already out of the way."""
    target = write_directory(tmp_path / "a", OLD)
    replace, calls = os.replace, []

    def fail_once(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == call:
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(room, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="disk full"):
        write_directory(target, NEW)
    assert contents(target) == OLD and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_one(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(room, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_directory(target, NEW)
    assert contents(target) == OLD and [p.name for p in target.parent.iterdir()] == ["x[1]"]


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError, match="exists and is not a directory"):
        write_directory(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_save_killed_between_two_renames_is_found_and_mended(tmp_path: Path) -> None:
    target = write_directory(tmp_path / "a", OLD)
    target.rename(room._aside(target))
    assert contents(whole_directory(target)) == OLD
    write_directory(target, NEW)
    assert whole_directory(target) == target and contents(target) == NEW
    write_directory(target, OLD)
    assert contents(target) == NEW | OLD


def with_foreign_entries(target: Path) -> None:
    (target / "log.txt").write_text("mine")
    (target / "sub" / "deep").mkdir(parents=True)
    (target / "sub" / "deep" / "ckpt.pt").write_bytes(b"mine")
    (target / "link").symlink_to("log.txt")
    (target / "lost").symlink_to("nowhere")


@pytest.mark.parametrize("links", [True, False])
def test_what_else_is_there_stays(target: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    with_foreign_entries(target)
    with (target / "log.txt").open("a") as log:
        write_directory(target, NEW)
        log.write(", and more")
    assert {name: (target / name).read_bytes() for name in NEW} == NEW
    assert (target / "log.txt").read_text() == ("mine, and more" if links else "mine")
    assert (target / "sub" / "deep" / "ckpt.pt").read_bytes() == b"mine"
    assert (target / "link").readlink() == Path("log.txt") and (target / "lost").readlink() == Path("nowhere")
    assert [path.name for path in target.parent.iterdir()] == ["x[1]"]


def test_what_cannot_be_carried_over_leaves_all_as_it_was(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with_foreign_entries(target)
    monkeypatch.setattr(room, "_link", fail)
    with pytest.raises(OSError, match="disk full"):
        write_directory(target, NEW)
    assert (target / "a").read_bytes() == b"old" and (target / "sub" / "deep" / "ckpt.pt").exists()
    assert [path.name for path in target.parent.iterdir()] == ["x[1]"]


def test_a_directory_by_a_files_name_stays(target: Path) -> None:
    (target / "c").mkdir()
    with pytest.raises(IsADirectoryError, match=r"c is a directory in the way\. Move it, or write to another"):
        write_directory(target, NEW)
    assert (target / "a").read_bytes() == b"old" and (target / "c").is_dir()


def test_what_else_was_in_a_save_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    target = write_directory(tmp_path / "a", OLD)
    with_foreign_entries(target)
    target.rename(room._aside(target))
    write_directory(target, NEW)
    assert (target / "log.txt").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_one_and_its_target_gets_the_files(target: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    latest = tmp_path / "elsewhere" / "latest"
    latest.symlink_to(Path("..") / target.name)
    assert write_directory(latest, NEW) == latest and contents(target) == NEW
    assert latest.is_symlink() and [path.name for path in latest.parent.iterdir()] == ["latest"]
    target.rename(room._aside(target))
    assert contents(whole_directory(latest)) == NEW


WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("room", sys.argv[3])  # the file alone: no wait for torch
room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(room)
if sys.argv[2] == "renames":
    room._exchange = lambda a, b: False
print("ready", flush=True)
for i in range(10**9):
    room.write_directory(sys.argv[1], {name: str(i).encode() * 20000 for name in "abc"})
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_any_moment_one_version_is_whole(tmp_path: Path, way: str) -> None:
    target = tmp_path / "a"
    write_directory(target, {name: b"0" for name in "abc"})
    moments = []
    for k in range(12):
        command = [sys.executable, "-c", WRITER, str(target), way, room.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.002 * k + 0.001)
            process.send_signal(signal.SIGKILL)
        found = contents(whole_directory(target))
        moments.append(len(list(tmp_path.iterdir())))
        assert set(found) == set("abc") and len(set(found.values())) == 1
    assert max(moments) > 1, "no kill fell into a save, so nothing was tested"
    room._drop_abandoned(target)
    assert not [p for p in tmp_path.iterdir() if ".saving-" in p.name]
