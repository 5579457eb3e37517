"""`train.py` again and again, each in a process of its own, for the price of one start; a program of its own.

It forks after all imports. Those of the Hub's clients read the environment, so a terminal has one for all its commands.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Terminal:
    """Where commands are typed one after the other, in one environment; it opens at the first of them."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.process: subprocess.Popen[str] | None = None

    def train(self, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`python train.py …`."""
        return self.python(ROOT / "train.py", *args, cwd=cwd)

    def python(self, script: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`python script …`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.env},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(cwd), self.env, str(script), *args]), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        out, err = (cwd / f"std{name}.txt" for name in ("out", "err"))
        return subprocess.CompletedProcess(args, code, out.read_text("utf-8"), err.read_text("utf-8"))

    def close(self) -> None:
        """End it, if it was opened."""
        if self.process is not None:
            self.process.communicate()


@contextmanager
def terminal(**env: str) -> Iterator[Terminal]:
    """A terminal that is closed at the end."""
    opened = Terminal(env)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """A folder, such as a terminal's cache, is absent within this, and afterwards what it was before."""
    aside = folder.with_name(f"{folder.name} aside")
    folder.mkdir(exist_ok=True)
    folder.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def run(cwd: str, env: dict[str, str], *argv: str) -> None:
    """In the child: what a shell does."""
    os.chdir(cwd)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    refuse_other_environment(env)
    wait = threading.Event().wait  # a hundredth of the seconds for which the Hub's client waits before it tries again
    time.sleep = lambda seconds, /: wait(float(seconds) / 100) and None
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures would take as long as all the rest
    sys.argv = list(argv)
    code: int | str | None = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    leave(code)


def leave(code: int | str | None) -> None:
    """What Python does at its end, but for taking everything apart, which a child would first have to copy."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def refuse_other_environment(env: dict[str, str]) -> None:
    """Check that this process, and the libraries that read it when they were imported, have this environment."""
    import datasets
    from huggingface_hub import constants

    assert all(os.environ[name] == value for name, value in env.items())
    home, endpoint, offline = (os.environ[f"HF_{name}"] for name in ("HOME", "ENDPOINT", "HUB_OFFLINE"))
    found = (constants.HF_HOME, constants.ENDPOINT, constants.HF_HUB_OFFLINE)
    assert found == (home, endpoint, offline == "1"), found
    found = (str(datasets.config.HF_CACHE_HOME), datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE)
    assert found == (home, endpoint, offline == "1"), found
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        assert name not in env or getattr(constants, name) == int(env[name])


def main() -> None:
    """A line in, [folder, environment, script, arguments …]; a line out, the exit code."""
    import datasets  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    import nolora_vision.training.run  # noqa: F401

    assert threading.active_count() == 1, "a fork has no other threads"
    gc.freeze()  # else each child copies what it looks through
    for line in sys.stdin:
        if not (pid := os.fork()):
            run(*json.loads(line))  # does not return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
