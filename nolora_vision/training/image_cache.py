"""Decoded images kept in memory: each is decoded once for all epochs and worker processes, within a bound."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from multiprocessing.context import assert_spawning
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from PIL import Image

if sys.platform != "win32":
    import fcntl

AUTO_SHARE = 0.25
"""Of the free memory, which `auto` lets the caches of all processes of this machine take together."""
CGROUP = Path("/sys/fs/cgroup")
FIELDS = 3
"""Of an image in the index: offset, width (0: not there), height."""


def cache_budget(setting: Literal["auto", "none"] | int) -> int:
    """Bytes that this process may keep of decoded images.

    Args:
        setting: `auto`, `none`, or MiB for each process. Windows has no such locks on files: there it is none.
    """
    if setting == "none" or sys.platform == "win32":
        return 0
    if setting == "auto":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and `accelerate launch`
        return int(AUTO_SHARE * free_memory() / max(1, processes))
    return setting * 2**20


def free_memory() -> int:
    """Bytes that may still be taken: of the machine's memory, or of the container's where that is less."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
        except (OSError, ValueError):  # another version of control groups, or no limit
            continue
    return max(0, free)


class ImageCache:
    """RGB images by number, in one block of memory that all worker processes share, however they were started.

    The first process that needs an image makes it and keeps it, as long as there is room; what has none is made anew
    each time. Nothing is thrown out: an epoch asks for every image once, so the last one used is the last one needed.
    The block is a file in memory of no size until it is written to, and not of /dev/shm, which containers keep small.

    Args:
        images: how many there are.
        capacity: bytes of pixels to keep at most, 3 for a pixel.
    """

    def __init__(self, images: int, capacity: int) -> None:
        size = 8 * (1 + FIELDS * images) + capacity
        fd = os.memfd_create("images") if hasattr(os, "memfd_create") else _unnamed_file()
        os.ftruncate(fd, size)
        self._open(images, capacity, fd)

    def _open(self, images: int, capacity: int, fd: int) -> None:
        self.images, self.capacity, self._fd = images, capacity, fd
        self._memory = mmap.mmap(fd, 0)
        numbers = np.frombuffer(self._memory, np.int64, 1 + FIELDS * images)
        self._used, self._index = numbers[:1], numbers[1:].reshape(images, FIELDS)
        self._pixels = memoryview(self._memory)[numbers.nbytes :]
        weakref.finalize(self, os.close, fd)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is started, not forked: the same memory."""
        assert_spawning(self)
        return {"images": self.images, "capacity": self.capacity, "fd": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["images"], state["capacity"], state["fd"].detach())

    def image(self, number: int, make: Callable[[], Image.Image]) -> Image.Image:
        """The image of this number; the caller owns it. `make` is called if it isn't kept; one thread for a process."""
        with self._locked():
            offset, width, height = (int(value) for value in self._index[number])
        if width:
            return Image.frombytes("RGB", (width, height), self._pixels[offset : offset + 3 * width * height])
        made = make()
        if made.mode == "RGB":
            self._keep(number, made)
        return made

    def _keep(self, number: int, image: Image.Image) -> None:
        """Reserve, write, and only then say that it is there: another process may look at any moment."""
        size = 3 * image.width * image.height
        with self._locked():
            offset = int(self._used[0])
            if offset + size > self.capacity:
                return
            self._used[0] = offset + size
        self._pixels[offset : offset + size] = image.tobytes()
        with self._locked():
            self._index[number] = offset, image.width, image.height

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time. The lock is the file's, so that it dies with a process that is killed."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    @property
    def kept(self) -> int:
        """How many images are there."""
        return int((self._index[:, 1] > 0).sum())

    @property
    def bytes_used(self) -> int:
        """Bytes of their pixels."""
        return int(self._used[0])


def _unnamed_file() -> int:
    """Where the system has no files in memory: a file without a name, which it keeps in memory as it sees fit."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
