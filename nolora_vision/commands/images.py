"""Finding the images that a person named: files, folders, globs, lists."""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nolora_vision.training.images import image_suffixes

UNREAD = "could not be read:"


@dataclass
class Found:
    """Paths of images in the order in which they were named, each once."""

    paths: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """What was named but is not there, and why."""
    repeated: int = 0


def find_images(names: Iterable[str]) -> Found:
    """The files that names stand for: files as they are, folders with all below them, globs as a shell expands them.

    Below a folder are all files with a suffix that Pillow reads, but for hidden ones, in natural order (2 before 10);
    links to folders are not followed. A file that is named itself is taken whatever its suffix.
    """
    found, seen = Found(), set()
    for name in names:
        matches, problem = _expand(name)
        if problem:
            found.missing.append((name, problem))
        for path in matches:
            key = os.path.abspath(path)
            found.repeated += key in seen
            if key not in seen:
                seen.add(key)
                found.paths.append(path)
    return found


def read_names(lines: Iterable[bytes]) -> list[str]:
    """Paths from a list, one a line; empty lines are none."""
    stripped = (line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8) for line in lines)
    return [os.fsdecode(line) for line in stripped if line]


def natural_key(path: str) -> list[tuple[int, int | str]]:
    """Sorts runs of digits by their value: img2 before img10; upper and lower case together."""
    parts = re.split(r"(\d+)", path.casefold())
    return [(0, int(part)) if part.isdecimal() and part.isascii() else (1, part) for part in parts]


def _expand(name: str) -> tuple[Sequence[str], str | None]:
    """Files behind a name, and what is wrong with it."""
    path = os.path.expanduser(name)
    if not os.path.lexists(path) and glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True), key=natural_key)
        expanded = [_expand(match) for match in matches]
        files = [file for found, _ in expanded for file in found]
        problems = [problem for _, problem in expanded if problem and problem.startswith(UNREAD)]
        return files, "; ".join(problems) or (None if files else "nothing matches")
    if os.path.isdir(path):
        files, unread = _below(path)
        return files, unread or (None if files else "a folder without images")
    return ([path], None) if os.path.lexists(path) else ([], "does not exist")


def _below(folder: str) -> tuple[list[str], str]:
    """The images, and which folders could not be looked into."""
    suffixes, files = image_suffixes(), []
    unread: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unread.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        files += [os.path.join(parent, name) for name in shown if os.path.splitext(name)[1].lower() in suffixes]
    told = ", ".join(f"{error.filename} ({error.strerror})" for error in unread)
    return sorted(files, key=natural_key), told and f"{UNREAD} {told}"
