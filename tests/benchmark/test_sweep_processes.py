"""Several processes of one command: their exit code, a signal to their parent, its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from nolora_vision.benchmark import sweep_processes
from nolora_vision.benchmark.sweep_processes import PARENT, in_processes, is_orphaned

ROOT = Path(__file__).parents[2]
ONE_DIES = "import os, sys, pathlib\ntry: pathlib.Path(sys.argv[1]).mkdir()\nexcept FileExistsError: sys.exit(0)\n"
CHILD = """
import os, sys, time, pathlib
from nolora_vision.benchmark.sweep_processes import end_with_parent, is_orphaned
end_with_parent()
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
while not is_orphaned(): time.sleep(0.1)
"""
PARENT_CODE = "import sys\nfrom nolora_vision.benchmark.sweep_processes import in_processes\n"


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"  # nobody reaps an orphan here


@pytest.fixture
def family(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A parent with two children that work until they are told to stop or are orphans."""
    (tmp_path / "born").mkdir()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "born")]
    code = f"{PARENT_CODE}sys.exit(in_processes({command!r}, 2))"
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background may ignore it
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=listening)
    until(lambda: len(list((tmp_path / "born").iterdir())) == 2)
    return parent, [int(path.name) for path in (tmp_path / "born").iterdir()]


@pytest.mark.parametrize(("end", "code"), [("os.kill(os.getpid(), 9)", 137), ("sys.exit(3)", 3), ("sys.exit(0)", 0)])
def test_one_that_was_killed_is_no_success(tmp_path: Path, end: str, code: int) -> None:
    assert in_processes([sys.executable, "-c", ONE_DIES + end, str(tmp_path / "first")], 2) == code
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_ends_the_children(
    family: tuple[subprocess.Popen[bytes], list[int]], number: signal.Signals
) -> None:
    parent, children = family
    parent.send_signal(number)
    assert parent.wait() == 128 + number
    assert not any(map(is_alive, children))


def test_the_death_of_the_parent_ends_the_children(family: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    parent, children = family
    parent.kill()
    parent.wait()
    until(lambda: not any(map(is_alive, children)))


def test_a_process_that_nobody_started_here_is_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    assert not is_orphaned()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert not is_orphaned()
    monkeypatch.setenv(PARENT, "1" if os.getppid() != 1 else "2")
    assert is_orphaned()


@pytest.mark.parametrize(
    ("given", "count", "each"),
    [
        (None, 2, ["0", "1", "0"]),
        ("", 0, [None, None, None]),
        ("2, 3", 2, ["2", "3", "2"]),
        ("GPU-8932f937,MIG-a1b2", 2, ["GPU-8932f937", "MIG-a1b2", "GPU-8932f937"]),
        ("1,-1,2", 1, ["1", "1", "1"]),
    ],
)
def test_each_process_gets_one_of_the_gpus_that_were_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None, count: int, each: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    started = [sweep_processes._environment(i, 3) for i in range(3)]
    assert [environment.get("CUDA_VISIBLE_DEVICES") or None for environment in started] == each
