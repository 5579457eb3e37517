"""Programs in processes of their own, one or several together, for the price of one import; a program of its own.

It forks, and what it forks has imported torch, timm and this library: where a program must read the environment as it
imports, see `tests/forked_train.py`. Several together are started by torch's own launcher; only that it, too, forks.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")


@dataclass
class Started:
    """A program that runs, or the launcher of several; the first of a session and a group of its own."""

    pid: int
    log: Path
    code: int | None = None

    def until(self, text: str) -> None:
        """Wait until it has written that, or has ended."""
        with suppress(ProcessLookupError):
            while text not in self.log.read_text("utf-8"):
                os.kill(self.pid, 0)
                time.sleep(0.02)

    def wait(self) -> int:
        """Its exit code."""
        if self.code is None:
            self.code = int(_line())
        return self.code


@contextmanager
def started(*args: str, log: Path, processes: int = 0) -> Iterator[Started]:
    """`python …` whose output goes to a file; with processes, so many of it under `torchrun`, on processors.

    It is told to end if it still runs.
    """
    with _started(args, processes, log.parent, log, log) as program:
        yield program


def finished(*args: str, processes: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same, at its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        with _started(args, processes, cwd, out, err) as program:
            code = program.wait()
        return subprocess.CompletedProcess(args, code, out.read_text("utf-8"), err.read_text("utf-8"))


@contextmanager
def _started(args: tuple[str, ...], processes: int, cwd: Path, out: Path, err: Path) -> Iterator[Started]:
    for path in (out, err):
        path.touch()
    print(json.dumps([args, processes, str(cwd), str(out), str(err)]), file=_parent().stdin, flush=True)
    program = Started(int(_line()), out)
    try:
        yield program
    finally:
        if program.code is None:
            with suppress(ProcessLookupError):
                os.kill(program.pid, signal.SIGTERM)  # a launcher then ends its programs
            program.wait()


@cache
def _parent() -> subprocess.Popen[str]:
    """What forks; it ends with the tests."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    atexit.register(lambda: (process.stdin.close(), process.wait()))
    return process


def _line() -> str:
    stdout = _parent().stdout
    assert stdout is not None
    return stdout.readline()


# ------------------------------------------------------------------------------------------------------ what is forked


def python(args: list[str]) -> None:
    """`python …`, as far as it is needed: a script, or -m and a module."""
    while args[0] == "-u":
        args = args[1:]
        sys.stdout.reconfigure(line_buffering=True)
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


class Rank:
    """A process that waits until the launcher would start it: a stand-in for `Popen`."""

    def __init__(self, pid: int, orders: int) -> None:
        self.pid, self.orders, self.returncode = pid, orders, None

    def begin(self, args: tuple[str, ...], env: dict[str, str]) -> Rank:
        """What `Popen` does."""
        os.write(self.orders, json.dumps([args[1:], env]).encode() + b"\n")
        os.close(self.orders)
        while os.getsid(self.pid) != self.pid:  # `Popen` returns when there is something to send signals to
            time.sleep(1e-3)
        return self

    def poll(self) -> int | None:
        """As of `Popen`."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """As of `Popen`."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)
        return self.returncode


def launch(args: list[str], processes: int) -> None:
    """`torchrun …`: it must not fork later, when it has threads; so its programs are forked now, and wait."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    os.environ["ACCELERATE_USE_CPU"] = "true"
    ranks = []
    for _ in range(processes):
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.close(write)
            with os.fdopen(read) as orders:
                own, env = json.loads(orders.readline())
            os.setsid()
            os.environ.update(env)
            return python(own)
        os.close(read)
        ranks.append(Rank(pid, write))
    SubprocessHandler._popen = lambda handler, args, env: ranks.pop(0).begin(args, env)
    run.main(["--nproc-per-node", str(processes), "--master-port", "0", "--standalone", *args])


def main() -> None:
    """A line in, what to run; two lines out, its process id and its exit code."""
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.run  # noqa: F401

    import nolora_vision.benchmark.sweep
    import nolora_vision.training.run  # noqa: F401

    gc.freeze()  # else each child goes through all of that once more as it ends, for seconds
    for line in sys.stdin:
        args, processes, cwd, *output = json.loads(line)
        if not (pid := os.fork()):
            os.setsid()
            os.chdir(cwd)
            for number, path in enumerate((os.devnull, *output)):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
            return launch(args, processes) if processes else python(args)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
