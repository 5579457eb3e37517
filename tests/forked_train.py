"""`train.py` again and again, each in a process of its own, for the price of one import of torch; a program of its own.

It forks, so that a start costs only the imports that read the environment (timm, huggingface_hub, datasets).
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Terminal:
    """Where commands are typed one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def train(self, *args: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """`python train.py …`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([args, str(cwd), env]), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        out, err = (cwd / f"std{name}.txt" for name in ("out", "err"))
        return subprocess.CompletedProcess(args, code, out.read_text("utf-8"), err.read_text("utf-8"))


@contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal that is closed at the end."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Terminal(process)
        assert process.stdin is not None
        process.stdin.close()


def run(args: list[str], cwd: str, env: dict[str, str]) -> None:
    """In the child: what a shell does."""
    os.chdir(cwd)
    os.environ.update(env)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    wait = threading.Event().wait  # a hundredth of the seconds for which the Hub's client waits before it tries again
    time.sleep = lambda seconds, /: wait(float(seconds) / 100) and None
    sys.argv = [str(ROOT / "train.py"), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """A line in, [arguments, folder, environment]; a line out, the exit code."""
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow  # noqa: F401
    import pydantic  # noqa: F401
    import rich  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401
    import tyro  # noqa: F401

    early = {name.split(".")[0] for name in sys.modules} & {"huggingface_hub", "datasets", "timm", "accelerate"}
    assert not early, f"{early} would not see the environment of a run"
    for line in sys.stdin:
        if not (pid := os.fork()):
            run(*json.loads(line))  # leaves by sys.exit
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
