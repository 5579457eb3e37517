"""What a run says of itself: config, metrics with units, versions, commit."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("nolora-vision", "torch", "torchvision", "timm", "datasets", "accelerate", "safetensors", "peft")


def environment() -> dict[str, Any]:
    """Versions, device, commit and time, for the record."""
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "git": code_state(),
    }


def device_name() -> str:
    """The accelerator's name, or the processor's, with the widest instructions that PyTorch uses there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = _model_of_processor() or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def code_state() -> dict[str, Any] | None:
    """`git_state` when this was first called: the code is in memory by then, and the checkout may change under it."""
    return git_state()


def git_state() -> dict[str, Any] | None:
    """Commit of this package's checkout and whether files differ from it; None where it is installed without one."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> dict[str, Any]:
    """Peak memory so far, and of what: allocated on the GPU, or resident in this process (loader workers apart)."""
    if torch.cuda.is_available():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_memory_of": "CUDA, allocated"}
    return {"peak_memory_bytes": _most_resident(), "peak_memory_of": "process, resident"}


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all; a link stays one, a pipe or a device is written to."""
    if is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    scratch = path.with_name(f".{path.name}.{os.getpid()}")  # not tempfile's: others may read the result
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, which no file may take the place of."""
    return path.exists() and not path.is_file()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically."""
    write_atomic(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _most_resident() -> int:
    """Bytes that this process has held at most."""
    try:
        import resource
    except ImportError:  # Windows has none
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _model_of_processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # Linux alone has it
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*args: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
