"""Checkpoints of a run as directories: written whole or not at all, with checksums, the last few kept; no pickle.

accelerate's `save_state` is not used: it pickles the optimizer and the random numbers, saves the frozen backbone with
each checkpoint, and a kill in the middle of it leaves a part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from nolora_vision.adapters.whole_directory import write_directory
from nolora_vision.training.errors import RunError

TENSORS, FACTS, CHECKSUMS = "state.safetensors", "state.json", "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """What one holds."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_checkpoint(
    run_folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, keep: int
) -> Path:
    """Write the state after so many optimizer steps, then remove all but the last few.

    Raises:
        RunError: if it cannot be written, as on a full disk; the ones before are untouched.
    """
    files = {TENSORS: save(dict(tensors)), FACTS: json.dumps(facts, allow_nan=True).encode()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    folder = _home(run_folder) / f"step-{step:08d}"
    try:
        write_directory(folder, {**files, CHECKSUMS: json.dumps(sums).encode()})
    except OSError as error:
        last = next(iter(_newest_first(run_folder)), None)
        so_far = "There is none before it." if last is None else f"The last good one is {last}; make room and go on: "
        so_far += "" if last is None else f"--resume {run_folder}."
        raise RunError(f"The checkpoint {folder} cannot be written ({error.strerror or error}). {so_far}") from error
    for old in list(_newest_first(run_folder))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def read_newest(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest one that is whole, and a sentence on each newer one that is not."""
    complaints = []
    for folder in _newest_first(run_folder):
        try:
            return _read(folder), complaints
        except (OSError, ValueError, KeyError) as error:
            complaints.append(f"{folder} is damaged ({error}) and is not used.")
    return None, complaints


def has_checkpoint(run_folder: Path) -> bool:
    """Whether there is any, damaged or not."""
    return any(_newest_first(run_folder))


def remove_checkpoints(run_folder: Path) -> None:
    """Those of a run that is done."""
    shutil.rmtree(_home(run_folder), ignore_errors=True)


def _read(folder: Path) -> Checkpoint:
    sums = json.loads((folder / CHECKSUMS).read_bytes())
    contents = {}
    for name in (TENSORS, FACTS):
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != sums[name]:
            raise ValueError(f"{name} does not have its checksum")
    return Checkpoint(folder, load(contents[TENSORS]), json.loads(contents[FACTS]))


def _home(run_folder: Path) -> Path:
    return run_folder / "checkpoints"


def _newest_first(run_folder: Path) -> Iterator[Path]:
    yield from sorted((p for p in _home(run_folder).glob("step-*") if p.is_dir()), reverse=True)
