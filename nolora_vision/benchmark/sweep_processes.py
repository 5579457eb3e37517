"""Several processes of one command: all are told to stop when this one is, and end when it dies"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

PARENT = "NOLORA_SWEEP_PARENT"
"""Environment variable with the id of the process that started this one."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal to get when the parent dies."""


def in_processes(command: Sequence[str], count: int) -> int:
    """The same command several times at once, each on its GPU or its share of the processor's cores.

    SIGTERM and SIGINT go on to all of them. Returns 0 if all did, or else the exit code of one that did not, for one
    that a signal ended 128 and its number.
    """
    children: list[subprocess.Popen[bytes]] = []
    told: list[int] = []

    def forward(number: int, _: Any = None) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        for i in range(count):
            if not told:
                children.append(subprocess.Popen(command, env=_environment(i, count)))
        codes = _waited(children)
    except KeyboardInterrupt:
        forward(signal.SIGINT)
        codes = _waited(children)
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:
        return 128 + told[0]
    return max((128 - code if code < 0 else code for code in codes), default=0)


def _waited(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [child.wait() for child in children]


def _environment(i: int, count: int) -> dict[str, str]:
    gpus = _gpus()
    own = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return {"OMP_NUM_THREADS": threads, **os.environ, **own, PARENT: str(os.getpid())}


def _gpus() -> list[str]:
    """The GPUs as this process was given them, by number, UUID or MIG id; all by number if it was given none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()  # no more are seen than are named, and none after one that is not there
    return [name.strip() for name in named][:count] if any(named) else [str(i) for i in range(count)]


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it dies; elsewhere `is_orphaned` has to be asked."""
    if PARENT in os.environ and sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        except (OSError, AttributeError):
            return


def is_orphaned() -> bool:
    """Whether another process started this one and is gone."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.name == "posix" and str(os.getppid()) != parent
