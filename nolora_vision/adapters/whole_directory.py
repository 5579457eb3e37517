"""A directory that is replaced in one step: killed at any moment, the old one or the new one is there whole."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_directory(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a directory, all in one step, replacing those of the same names; whatever else is there stays.

    Where the directory is a symlink, the files go to its target.

    Raises:
        OSError: if it cannot be written; what was there is as before.
    """
    target = Path(os.path.realpath(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(target)
    if not target.exists() and _aside(target).is_dir():
        os.replace(_aside(target), target)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix(target)}{os.getpid()}.", dir=target.parent))
    try:
        for name, content in files.items():
            _write(scratch / name, content)
        if target.is_dir():
            _carry_over(target, scratch, files)
        scratch.chmod(0o777 & ~_umask())
        _swap_in(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Path(directory).absolute()


def whole_directory(directory: str | Path) -> Path:
    """The directory, or the old one that a save killed between its two renames left beside it.

    There is such a moment only where the system cannot exchange two directories in one step.
    """
    target, aside = Path(directory), _aside(Path(os.path.realpath(directory)))
    return target if target.exists() or not aside.is_dir() else aside


def _carry_over(old: Path, new: Path, written: Iterable[str] = ()) -> None:
    """Give the new directory whatever else the old one holds: the same files by hard links, so that both are whole."""
    for source in old.iterdir():
        copy = new / source.name
        if source.is_dir() and not source.is_symlink():
            if source.name in written or source.is_mount():
                raise IsADirectoryError(f"{source} is a directory in the way. Move it, or write to another directory.")
            copy.mkdir()
            _carry_over(source, copy)
            shutil.copystat(source, copy)
        elif source.name not in written:
            _link(source, copy)


def _link(source: Path, copy: Path) -> None:
    """The same file under another name; a copy where the system or the file system has no such links."""
    try:
        if not source.is_symlink():
            return os.link(source, copy)
    except OSError:
        pass
    shutil.copy2(source, copy, follow_symlinks=False)


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
