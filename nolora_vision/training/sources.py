"""Where images come from: from a dataset's name to its tables, from the Hub, local files or scikit-learn's digits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nolora_vision.config import did_you_mean
from nolora_vision.training.digits import digits
from nolora_vision.training.errors import RunError
from nolora_vision.training.hub_tables import load_from_hub, load_saved, read_files, tables_of
from nolora_vision.training.image_files import image_folder, is_vtab_task, load_vtab, vtab_task
from nolora_vision.training.packed import read_packed
from nolora_vision.training.registry import REGISTRY
from nolora_vision.training.split_names import no_such_split
from nolora_vision.training.table import Table

Loaded = tuple[dict[str, Table], dict[str, Any]]


def load_tables(
    name: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    revision: str | None = None,
    test_split: str | None = None,
    vtab_root: Path | None = None,
) -> Loaded:
    """The splits of a dataset (train, val, test, as far as it has them), and what it is, for the record.

    Args:
        test_split: the dataset's name of the split to test on, instead of its test split.
        vtab_root: folder of the tasks of VTAB-1k, for names such as `vtab:cifar`.

    Raises:
        RunError: if it cannot be found or read, or its columns cannot be told.
    """
    if name == "digits" or re.fullmatch(r"digits:[0-9]-[0-9]", name):
        return _with_test_split(digits(name.removeprefix("digits:") if ":" in name else "0-9"), name, test_split)
    if name.startswith("vtab:"):
        path = vtab_task(name.removeprefix("vtab:"), vtab_root)
        return _with_test_split(load_vtab(path), name, test_split)
    if name in REGISTRY and Path(name).exists():
        raise RunError(
            f"{name} is the short name of {REGISTRY[name].id}, and there is a file or folder of this name here. Say "
            f"--dataset ./{name} for that, or --dataset {REGISTRY[name].id}."
        )
    if Path(name).exists():
        return _local(Path(name), image_key, label_key, test_split)
    if Path(name).suffix == ".safetensors":
        raise RunError(f"{name} does not exist. Make it with python -m nolora_vision.training.pack DATASET {name}.")
    if name not in REGISTRY and "/" not in name:
        names = ("digits", *REGISTRY)
        raise RunError(
            f"Unknown dataset {name!r}.{did_you_mean(name, names)} Wanted one of {', '.join(names)}, vtab:TASK, a Hub "
            f"id such as owner/name, or an existing local folder or file."
        )
    return load_from_hub(name, image_key, label_key, revision, test_split)


def _local(path: Path, image_key: str | None, label_key: str | None, test_split: str | None) -> Loaded:
    about = {"id": path.name, "source": "local"}
    if path.suffix == ".safetensors" and path.is_file():
        return _with_test_split(read_packed(path), str(path), test_split)
    if is_vtab_task(path):
        return _with_test_split(load_vtab(path), str(path), test_split)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in {".parquet", ".arrow"})
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return tables_of(load_saved(path), image_key, label_key, str(path), test_split), about
    if files:
        return tables_of(read_files(files, path), image_key, label_key, str(path), test_split), about
    return image_folder(path, test_split), about


def _with_test_split(loaded: Loaded, where: str, test_split: str | None) -> Loaded:
    """The same with another split to test on, where all there are have been loaded already."""
    tables, about = loaded
    if test_split is None:
        return loaded
    found = next((role for role, table in tables.items() if test_split in (role, table.name)), "train")
    if found == "train":
        raise no_such_split(where, test_split, [table.name for role, table in tables.items() if role != "train"])
    kept = {role: role for role in tables if role not in (found, "test")} | {"test": found}
    notes = about.get("splits", {})
    about = {**about, "splits": {role: notes[old] for role, old in kept.items() if old in notes}}
    return {role: tables[old] for role, old in kept.items()}, about
