"""RunError: what a user can mend, said in one message without a traceback."""

from __future__ import annotations

from pathlib import Path


class RunError(Exception):
    """A run that cannot start or go on, with what was wrong, what was got, and what to do."""


LEAVE_OUT = "Mend it, or leave all such images out: --on-bad-image skip."


class ImageError(RunError):
    """An image that cannot be read, and which it is."""

    def __init__(self, message: str) -> None:
        message = message.rpartition("ImageError: ")[2].strip()  # a loader's process hands its traceback over with it
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop and can go on."""

    def __init__(self, number: int, folder: Path, *, saved: bool = True) -> None:
        super().__init__()
        self.number, self.folder, self.saved = number, folder, saved
