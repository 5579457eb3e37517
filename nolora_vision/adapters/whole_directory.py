"""A directory that is replaced in one step: killed at any moment, the old one or the new one is there whole."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_directory(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write files as one directory, replacing what is there.

    Raises:
        OSError: if it cannot be written; what was there is as before.
    """
    target = Path(directory).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(target)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix(target)}{os.getpid()}.", dir=target.parent))
    try:
        for name, content in files.items():
            _write(scratch / name, content)
        scratch.chmod(0o777 & ~_umask())
        _swap_in(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def whole_directory(directory: str | Path) -> Path:
    """The directory, or the old one that a save killed between its two renames left beside it.

    There is such a moment only where the system cannot exchange two directories in one step.
    """
    target = Path(directory)
    return target if target.exists() or not _aside(target).is_dir() else _aside(target)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap_in(scratch: Path, target: Path) -> None:
    """Put the finished directory in the old one's place, in one step where the system can exchange two names."""
    if not target.exists():
        os.replace(scratch, target)
        return
    if not target.is_dir():
        raise NotADirectoryError(f"{target} exists and is not a directory.")
    if _exchange(scratch, target):
        return  # the old one now has the scratch's name, and goes with it
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    try:
        os.replace(scratch, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(2)) == 0  # RENAME_SWAP
        here = ctypes.c_int(-100)  # AT_FDCWD
        return libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(2)) == 0  # RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return False


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _scratch_prefix(target: Path) -> str:
    return f".{target.name}.saving-{platform.node()}-"


def _drop_abandoned(target: Path) -> None:
    """Remove what saves of this machine that were killed left beside the target."""
    if os.name != "posix":  # where signal 0 would end a process instead of asking for it
        return
    prefix = _scratch_prefix(target)
    for path in target.parent.iterdir():  # no glob: Python keeps a compiled pattern of each, and names are many
        pid = path.name.removeprefix(prefix).split(".")[0]
        if path.name.startswith(prefix) and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
