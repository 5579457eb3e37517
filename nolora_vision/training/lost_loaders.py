"""A process that loads images and dies is noticed where its next batch is awaited, and said to have died."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nolora_vision.training.errors import RunError

LOSSES = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)
"""What the loss of a loading process raises: the loader sees that it is gone, or that nobody hands a batch over."""
LOST_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [^)]*\) [a-z ]*[a-z]")


def awaited(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; if a process of it dies, the error comes where the next one is awaited.

    torch's loaders set a handler of SIGCHLD that raises it wherever the main thread is then: in the middle of a save,
    or while that very error is being reported. It is put aside, for good; without it a loader looks for its processes
    whenever a batch has not come for 5 s.
    """
    for batch in batches:
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling":
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield batch


@contextmanager
def lost_worker_explained() -> Iterator[None]:
    """A process that loads images and is killed is said to have been, as it can say nothing itself.

    Raises:
        RunError: which one, and what to do.
    """
    try:
        yield
    except LOSSES as error:
        if not (how := _loss_of_a_worker(error)):
            raise
        raise RunError(
            f"A process that loads images died ({how}), as where memory runs out. Use fewer: --workers 1, or 0 to "
            f"load in the main process; or a smaller --cache-images."
        ) from error


def _loss_of_a_worker(error: Exception) -> str | None:
    if isinstance(error, RuntimeError):
        found = LOST_WORKER.search(f"{error} {error.__cause__ or ''}")
        return found and found[0]
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return f"{type(error).__name__}: {error}" if "torch.multiprocessing.reductions" in modules else None
