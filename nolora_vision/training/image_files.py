"""Datasets of loose image files: a folder for each class, or VTAB's lists of paths and labels."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from nolora_vision.config import did_you_mean
from nolora_vision.training.errors import LEAVE_OUT, ImageError, RunError
from nolora_vision.training.images import UnreadableImageError, image_suffixes, read_image
from nolora_vision.training.split_names import choose_splits, no_such_split, role_of
from nolora_vision.training.table import Table
from nolora_vision.training.vtab import VTAB_TASKS

VTAB_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
VTAB_BOTH = "train800val200.txt"
"""Training and validation images together; what `--train-on train_val` trains on must be these."""


def image_folder(path: Path, test_split: str | None = None) -> dict[str, Table]:
    """A sub-folder for each class, below the folder or below its folders train, val and test.

    Raises:
        RunError: if there are no such folders.
    """
    from torchvision.datasets import ImageFolder

    children = {child.name: child for child in sorted(path.iterdir()) if child.is_dir()}
    folders = {"train": path}
    named = {name for name in children if role_of(name)}
    if named and (named == set(children) or any(_has_folders(children[name]) for name in named)):
        roles = choose_splits(children, str(path), test_split)
        folders = {role: children[name] for role, name in roles.items()}
    elif test_split is not None:
        raise no_such_split(str(path), test_split, [])
    tables: dict[str, Table] = {}
    for role, folder in sorted(folders.items(), key=lambda item: item[0] != "train"):
        try:
            found = ImageFolder(str(folder), is_valid_file=partial(_is_image, image_suffixes()))
        except FileNotFoundError as error:
            raise RunError(
                f"{folder} is no image folder: wanted one sub-folder with images for each class, below {path} or below "
                f"its folders train, val and test ({error})."
            ) from error
        name = "train" if folder == path else folder.name
        samples, classes = found.samples, tuple(found.classes)
        if "train" in tables:  # the same class may be another number in each of torchvision's folders
            names = tables["train"].class_names
            samples, classes = _renumbered(samples, classes, names, folder), names
        tables[role] = files_table(samples, classes, name)
    return tables


def _is_image(suffixes: Container[str], file: str) -> bool:
    return Path(file).suffix.lower() in suffixes


def _has_folders(path: Path) -> bool:
    """Whether it may be a split: a class, such as train beside bus and car, has files alone."""
    return any(child.is_dir() for child in path.iterdir())


def _renumbered(
    samples: Sequence[tuple[str, int]], own: Sequence[str], names: Sequence[str], folder: Path
) -> list[tuple[str, int]]:
    """Samples with the training split's numbers of their classes."""
    if unknown := [name for name in own if name not in names]:
        raise RunError(
            f"{folder} has classes that the training folder has not: {', '.join(unknown)}. Wanted folders named as "
            f"there: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
        )
    return [(file, names.index(own[label])) for file, label in samples]


def files_table(samples: Sequence[tuple[str, int]], class_names: tuple[str, ...], name: str) -> Table:
    """A table of image files and their labels."""
    files = [file for file, _ in samples]
    labels = [label for _, label in samples]
    return Table(partial(_read_file, files), labels, class_names, name=name, encoded=partial(_bytes_of_file, files))


def is_vtab_task(path: Path) -> bool:
    """Whether a folder is a task of VTAB-1k in the community's layout."""
    return all((path / name).is_file() for name in VTAB_LISTS.values())


def vtab_task(task: str, root: Path | None) -> Path:
    """The folder of a task that is asked for as `vtab:task`.

    Raises:
        RunError: if there is no such task, no root, or not its files.
    """
    if task not in VTAB_TASKS:
        wanted = ", ".join(VTAB_TASKS)
        raise RunError(f"VTAB-1k has no task {task!r}.{did_you_mean(task, tuple(VTAB_TASKS))} Wanted one of {wanted}.")
    if root is None:
        raise RunError(
            f"vtab:{task} needs the folder that holds VTAB-1k's tasks, which is not on the Hub: --vtab-root DIR with "
            f"DIR/{task}/test.txt and the images that it lists."
        )
    if not is_vtab_task(root / task):
        raise RunError(
            f"{root / task} is no task of VTAB-1k: wanted {', '.join(VTAB_LISTS.values())} and images there."
        )
    return root / task


def load_vtab(path: Path) -> tuple[dict[str, Table], dict[str, Any]]:
    """A task of VTAB-1k: 800 training, 200 validation and all test images, by lists of lines `path label`.

    Raises:
        RunError: if a list cannot be read, has other classes than the task, or names images that are not there.
    """
    lists = {role: _read_list(path, file) for role, file in VTAB_LISTS.items()}
    if (path / VTAB_BOTH).is_file() and sorted(_read_list(path, VTAB_BOTH)) != sorted(lists["train"] + lists["val"]):
        raise RunError(f"{path / VTAB_BOTH} does not list the images of train800.txt and val200.txt. Get them anew.")
    classes = 1 + max(label for rows in lists.values() for _, label in rows)
    known = VTAB_TASKS.get(path.name)
    if known is not None and classes != known:
        raise RunError(f"{path} should have {known} classes, 0 to {known - 1}; its labels go to {classes - 1}.")
    names = tuple(map(str, range(classes)))
    tables = {role: files_table(rows, names, VTAB_LISTS[role].removesuffix(".txt")) for role, rows in lists.items()}
    notes = {role: VTAB_LISTS[role] for role in lists}
    # the whole image is squashed to a square, as in the published results
    looked_at = {"crop_pct": 1.0, "crop_mode": "squash"}
    return tables, {"id": f"vtab:{path.name}", "source": "local", **looked_at, "splits": notes}


def _read_list(path: Path, name: str) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate((path / name).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)
        if len(words) < 2 or not words[1].isdecimal():
            raise RunError(f"{path / name}, line {number}: wanted a path and a label, got {line!r}.")
        rows.append((str(path / words[0].strip()), int(words[1])))
    if not rows:
        raise RunError(f"{path / name} lists no images.")
    if not Path(rows[0][0]).is_file():
        raise RunError(f"{path / name} lists {rows[0][0]}, which is not there. Paths are relative to {path}.")
    return rows


def _read_file(files: Sequence[str], i: int) -> Image.Image:
    try:
        return read_image(files[i])
    except UnreadableImageError as error:
        raise _unreadable(files[i], error) from error


def _bytes_of_file(files: Sequence[str], i: int) -> bytes:
    try:
        return Path(files[i]).read_bytes()
    except OSError as error:
        raise _unreadable(files[i], error.strerror) from error


def _unreadable(file: str, reason: object) -> ImageError:
    return ImageError(f"The image {file} cannot be read: {reason}. {LEAVE_OUT}")
