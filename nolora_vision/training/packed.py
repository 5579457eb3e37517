"""A whole dataset in one safetensors file, pixels or encoded images: read without the datasets library or a network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nolora_vision.training.errors import RunError
from nolora_vision.training.images import UnreadableImageError, decode_image
from nolora_vision.training.table import Table

KIND = "nolora-vision images"
FORMAT_VERSION = 1
RAW_SIDE = 64
"""Images of one size up to this many pixels wide and high are stored as pixels, which is about as small as their files
and needs no decoding; larger ones as they were encoded."""


def write_packed(path: Path, tables: Mapping[str, Table], about: Mapping[str, Any], *, size: int | None = None) -> None:
    """Write tables into one file, whole or not at all; equal tables give equal files.

    Args:
        size: height and width in pixels to bring all images to: the middle square, resampled; None keeps them.
    """
    tensors: dict[str, np.ndarray] = {}
    for role, table in tables.items():
        tensors[f"{role}.labels"] = np.asarray(table.labels, np.int64)
        tensors |= {f"{role}.{key}": value for key, value in _pack_images(table, size).items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "about": dict(about),
        "class_names": tables["train"].class_names,
        "names": {role: table.name for role, table in tables.items()},
    }
    metadata = {KIND: json.dumps(facts, ensure_ascii=False)}  # one entry: safetensors writes several in any order
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        save_file(tensors, scratch, metadata)
        scratch.chmod(mode)  # safetensors makes files for their owner alone
        os.replace(scratch, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_packed(path: Path) -> tuple[dict[str, Table], dict[str, Any]]:
    """The tables of a packed file, whose images are read when asked for, and what the dataset is.

    Raises:
        RunError: if it is no packed file, damaged, or of a newer format.
    """
    remedy = "Make one with python -m nolora_vision.training.pack DATASET FILE.safetensors."
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if KIND not in metadata:
                raise RunError(f"{path} is a safetensors file, but holds no packed dataset. {remedy}")
            facts = json.loads(metadata[KIND])
            if (version := facts["format_version"]) != FORMAT_VERSION:
                raise RunError(f"{path} has format {version}; this version reads {FORMAT_VERSION}. {remedy}")
            classes = tuple(facts["class_names"])
            tables = {role: _table(path, file, role, name, classes) for role, name in facts["names"].items()}
            return tables, facts["about"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} is no packed dataset, or damaged ({reason}). {remedy}") from error


class StoredTensor:
    """A tensor of a safetensors file, of which parts are read; each process opens the file for itself."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._open()

    def _open(self) -> None:
        self._slices = safe_open(self.path, framework="numpy").get_slice(self.name)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self._slices[index]

    def __getstate__(self) -> tuple[Path, str]:
        return self.path, self.name

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self.path, self.name = state
        self._open()


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, of this many pixels wide and high, by bicubic resampling."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _pack_images(table: Table, size: int | None) -> dict[str, np.ndarray]:
    """Pixels (N, H, W, 3) where all images are of one small size, or else files one after the other, and their ends."""
    shapes = {_image(table, i, size).size for i in range(len(table.labels))} if size is None else {(size, size)}
    if len(shapes) == 1 and max(next(iter(shapes))) <= RAW_SIDE:
        return {"pixels": np.stack([np.asarray(_image(table, i, size)) for i in range(len(table.labels))])}
    files = [_file_of(table, i, size) for i in range(len(table.labels))]
    return {
        "files": np.frombuffer(b"".join(files), np.uint8),
        "ends": np.cumsum([len(file) for file in files], dtype=np.int64),
    }


def _image(table: Table, i: int, size: int | None) -> Image.Image:
    image = table.image(i)
    return image if size is None else middle_square(image, size)


def _file_of(table: Table, i: int, size: int | None) -> bytes:
    """The file as the dataset stores it, if it gives the same pixels here; otherwise a PNG, which loses nothing."""
    image = _image(table, i, size)
    stored = table.encoded(i) if table.encoded is not None and size is None else None
    if stored is not None and _same_pixels(stored, image):
        return stored
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _same_pixels(file: bytes, image: Image.Image) -> bool:
    try:
        decoded = decode_image(file)
    except UnreadableImageError:
        return False
    return decoded.size == image.size and decoded.tobytes() == image.tobytes()


def _table(path: Path, file: Any, role: str, name: str, class_names: tuple[str, ...]) -> Table:
    labels = file.get_tensor(f"{role}.labels").tolist()
    keys = file.keys()
    raw = f"{role}.pixels" in keys
    if raw:
        count = file.get_slice(f"{role}.pixels").get_shape()[0]
        image = partial(_from_pixels, StoredTensor(path, f"{role}.pixels"))
        table = Table(image, labels, class_names, in_memory=True, name=name)
    else:
        ends = file.get_tensor(f"{role}.ends")
        count = len(ends)
        files = StoredTensor(path, f"{role}.files")
        bytes_of = partial(_from_files, files, ends)
        table = Table(partial(_decoded, bytes_of), labels, class_names, name=name, encoded=bytes_of)
    _refuse_unequal(len(labels), count, labels, class_names)
    return table


def _refuse_unequal(labels: int, images: int, values: Iterable[int], class_names: tuple[str, ...]) -> None:
    if labels != images:
        raise ValueError(f"{labels} labels of {images} images")
    if not all(0 <= value < len(class_names) for value in values):
        raise ValueError("labels without a class name")


def _from_pixels(pixels: StoredTensor, i: int) -> Image.Image:
    return Image.fromarray(pixels[i])


def _from_files(files: StoredTensor, ends: np.ndarray, i: int) -> bytes:
    start = int(ends[i - 1]) if i else 0
    return files[start : int(ends[i])].tobytes()


def _decoded(bytes_of: Any, i: int) -> Image.Image:
    return decode_image(bytes_of(i))
