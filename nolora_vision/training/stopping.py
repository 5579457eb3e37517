"""When a run saves itself: every so many steps or minutes, and when it is told to stop by SIGTERM or SIGINT."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nolora_vision.training.checkpoints import read_newest, write_checkpoint
from nolora_vision.training.errors import Interrupted
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.lost_loaders import LOSSES
from nolora_vision.training.processes import from_main_process, on_main_process
from nolora_vision.training.snapshot import Snapshot
from nolora_vision.training.tally import Tally

ASK_EVERY = 20
"""Several processes agree on what to do once in so many steps, as asking costs them a wait for each other."""


class StopRequest:
    """Within it the first SIGTERM or SIGINT is only noted; the second one does what it does without us."""

    def __init__(self, *, listen: bool = True) -> None:
        self.number, self.listen = 0, listen
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self.listen and threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nStopping after this step; once more to stop at once, without saving.\n")


class Checkpointer:
    """What `fit` tells how far it is.

    Args:
        steps, minutes: between two checkpoints; None: no matter.
        keep: how many are kept.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Snapshot,
        stop: StopRequest,
        *,
        steps: int | None,
        minutes: float | None,
        keep: int,
    ) -> None:
        self.folder, self.snapshot, self.stop = folder, snapshot, stop
        self.steps, self.minutes, self.keep = steps, minutes, keep
        self.fit, self.asked = Fit(), 0
        self.begun: tuple[Fit, dict[str, float]] | None = None
        self.tally: Tally | None = None
        self.saved_at, self.saved_when = 0, time.monotonic()

    def begin(self) -> tuple[Fit, dict[str, float]]:
        """How far the run is, with the sums of its epoch so far: from the newest checkpoint, if there is one.

        Asked again, it says the same and changes nothing.
        """
        if self.begun is not None:
            return self.begun
        found, complaints = read_newest(self.folder)
        for complaint in complaints:
            say(complaint)
        sums: dict[str, float] = {}
        if found is not None:
            self.fit, sums = self.snapshot.put(found.tensors, found.facts)
            self.fit.resumed_at.append(self.fit.updates)
            self.saved_at = self.fit.updates
            say(f"Going on at step {self.fit.updates}, epoch {self.fit.epochs + 1}, from {found.path}.")
        self.begun = self.fit, sums
        return self.begun

    def after_step(self, tally: Tally | None) -> None:
        """An optimizer step, or a whole epoch (None), is done: save if it is time.

        Raises:
            Interrupted: after saving, if the run was told to stop.
            RunError: if it cannot be saved.
        """
        self.tally = tally
        due = self.steps is not None and self.fit.updates - self.saved_at >= self.steps
        late = self.minutes is not None and time.monotonic() - self.saved_when > 60 * self.minutes
        self._act(late=late, due=due)

    def poll(self) -> None:
        """Nothing has changed since the last call of `after_step`, as in validation: stop if told so."""
        self._act(late=False, due=False)

    def _act(self, *, late: int, due: bool) -> None:
        number = self.stop.number
        if self.snapshot.processes > 1:
            self.asked += 1
            if self.asked % ASK_EVERY and not due:
                return
            number, late = self.snapshot.largest([number, late])
        if number or late or due:
            self._save()
        if number:
            raise Interrupted(number, self.folder)

    def _save(self) -> None:
        sums = {} if self.tally is None else self.tally.sums()
        tensors, facts = self.snapshot.take(self.fit, sums)
        from_main_process(lambda: write_checkpoint(self.folder, self.fit.updates, tensors, facts, keep=self.keep))
        self.saved_at, self.saved_when = self.fit.updates, time.monotonic()


@contextmanager
def saved_if_stopped(checkpointer: Any) -> Iterator[None]:
    """Where a run that is told to stop loses its loaders before it has heard of it, as by a signal to a whole group."""
    try:
        yield
    except LOSSES as error:
        if not isinstance(checkpointer, Checkpointer) or not checkpointer.stop.number:
            raise
        whole = checkpointer.snapshot.accelerator.sync_gradients  # else gradients of some batches are on their way
        if whole and checkpointer.snapshot.processes == 1:  # else the others may be a step behind
            checkpointer.poll()
        raise Interrupted(checkpointer.stop.number, checkpointer.folder, saved=False) from error


def say(text: str) -> None:
    """To the person at the terminal, once however many processes there are."""
    if on_main_process():
        print(text)
