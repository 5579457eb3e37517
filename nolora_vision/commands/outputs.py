"""The files that a command writes: whether they can be, that none is lost by another, errors in one message."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nolora_vision.training.errors import RunError
from nolora_vision.training.record import is_special


def refuse_unwritable(outputs: Mapping[str, str | None], pictures: str) -> None:
    """Check what can be checked before anything is loaded.

    Args:
        outputs: path by flag, None where it was not given; - is stdout, but for pictures.
        pictures: the flag whose file is a PNG.

    Raises:
        RunError: if one cannot be written, or two are one file.
    """
    taken: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        if path != "-" or name == pictures:
            _refuse(name, Path(path), pictures)
        file = path if path == "-" else os.path.realpath(path)
        if file in taken:
            where = "stdout" if path == "-" else path
            raise RunError(f"--{taken[file]} and --{name} both want {where}. Give one of them another file.")
        taken[file] = name
    if outputs[pictures] is not None:
        from nolora_vision.training.figures import pyplot

        if pyplot() is None:
            raise RunError(f"--{pictures} needs matplotlib: pip install 'nolora-vision[plots]'.")


def _refuse(name: str, path: Path, pictures: str) -> None:
    if name == pictures and path.suffix.lower() != ".png":
        raise RunError(f"--{name} writes a PNG file, got {path}. Let its name end in .png.")
    if path.is_dir():
        raise RunError(f"--{name} {path} is a folder. Name a file in it.")
    if is_special(path):
        if name == pictures:
            raise RunError(f"--{name} {path} is a pipe or a device. Name a file.")
        return
    if not path.parent.is_dir():
        raise RunError(f"--{name} {path}: there is no folder {path.parent}. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"--{name} {path}: the folder {path.parent} cannot be written to. Choose another.")


def refuse_inputs(outputs: Mapping[str, str | None], inputs: Iterable[str]) -> None:
    """That no output replaces what is read.

    Raises:
        RunError: if one would.
    """
    files = {os.path.realpath(path): name for name, path in outputs.items() if path not in (None, "-")}
    for path in inputs:
        if name := files.get(os.path.realpath(path)):
            raise RunError(f"--{name} {outputs[name]} would replace an image that is to be read. Choose another file.")


@contextmanager
def writing(name: str, path: str) -> Iterator[None]:
    """Within it a failure to write an output is the user's to mend.

    Raises:
        RunError: instead of the system's error, but for a reader of stdout that has had enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"--{name} {path} could not be written: {error.strerror or error}.") from error


def to_stdout(text: str) -> None:
    """Write what is for programs: UTF-8, whatever a terminal has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(text)
