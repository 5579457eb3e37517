"""Tables of the datasets library: from the Hub, from parquet and arrow files, from its own folders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from nolora_vision.training.errors import LEAVE_OUT, ImageError, RunError
from nolora_vision.training.hub_dataset import commit_of, datasets_library, fetch_dataset
from nolora_vision.training.images import as_rgb
from nolora_vision.training.label_checks import named, refuse_labels
from nolora_vision.training.registry import REGISTRY
from nolora_vision.training.split_names import choose_splits, role_of
from nolora_vision.training.table import Table

LABEL_NAMES = ("label", "labels", "fine_label", "variant", "cls", "class", "target")
SHARD = re.compile(r"[-_.]\d+([-_.]of[-_.]\d+)?$")


def load_from_hub(
    name: str, image_key: str | None, label_key: str | None, revision: str | None, test_split: str | None
) -> tuple[dict[str, Table], dict[str, Any]]:
    """The tables of a dataset of the Hub, by its id or its short name, and what was loaded.

    Raises:
        RunError: if it cannot be had, its columns cannot be told, or a known one has not its number of classes.
    """
    known = REGISTRY.get(name)
    hub_id, revision = (known.id, revision or known.revision) if known else (name, revision or "main")
    keys = (image_key or (known and known.image), label_key or (known and known.label))
    splits = fetch_dataset(hub_id, revision)
    tables = tables_of(splits, *keys, hub_id, test_split)
    got = len(tables["train"].class_names)
    if known is not None and label_key in (None, known.label) and got != known.num_classes:
        raise RunError(
            f"{hub_id} should have {known.num_classes} classes, this copy has {got} in its column {keys[1]!r}. Choose "
            f"another --revision, or give the id instead of {name!r} to take the copy as it is."
        )
    fingerprint = {split: getattr(rows, "_fingerprint", None) for split, rows in splits.items()}
    about = {"id": hub_id, "revision": revision, "commit": commit_of(splits), "fingerprint": fingerprint}
    return tables, about | ({"crop_pct": known.crop_pct} if known is not None and known.crop_pct else {})


def load_saved(path: Path) -> Mapping[str, Any]:
    """The splits of a folder that `save_to_disk` wrote."""
    loaded = datasets_library().load_from_disk(str(path))
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def read_files(files: Sequence[Path], root: Path) -> Mapping[str, Any]:
    """The splits in parquet or arrow files, by the names of files and their folders; all are training if none says.

    Raises:
        RunError: if they cannot be read.
    """
    datasets = datasets_library()
    kind = files[0].suffix.removeprefix(".")
    if kind not in {"parquet", "arrow"}:
        raise RunError(
            f"{root} is no dataset: wanted a folder of images, a .parquet or .arrow file, or a .safetensors file made "
            f"by python -m nolora_vision.training.pack."
        )
    roles = {file: role_of(file.stem) or _role_of_folder(file, root) for file in files}
    by_split: dict[str, list[str]] = {}
    for file, role in roles.items():
        other = SHARD.sub("", file.stem) if any(roles.values()) else "train"
        by_split.setdefault(role or other, []).append(str(file))
    try:
        return {
            split: datasets.Dataset.from_parquet(paths)
            if kind == "parquet"
            else datasets.concatenate_datasets([datasets.Dataset.from_file(p) for p in paths])
            for split, paths in by_split.items()
        }
    except Exception as error:
        raise RunError(f"{root} could not be read as {kind} ({type(error).__name__}: {error}).") from error


def _role_of_folder(file: Path, root: Path) -> str | None:
    return role_of(file.parent.name) if root in file.parent.parents else None  # the root's own name says nothing


def tables_of(
    splits: Mapping[str, Any], image_key: str | None, label_key: str | None, where: str, test_split: str | None = None
) -> dict[str, Table]:
    """Tables for training, validation and test, as far as there are such splits.

    Raises:
        RunError: if there is no training split, its columns cannot be told or hold something else, or another split has
            classes that it has not.
    """
    names = choose_splits(splits, where, test_split)
    chosen = {role: splits[names[role]] for role in ("train", "val", "test") if role in names}
    features = chosen["train"].features
    image_key = image_key or _image_column(features, where)
    label_key = label_key or _label_column(features, where)
    for key, what in ((image_key, "image"), (label_key, "label")):
        if key not in features:
            columns = ", ".join(features)
            raise RunError(f"{where} has no {what} column {key!r}. Columns: {columns}. Choose with --{what}-key.")
    labels = {role: list(rows[label_key]) for role, rows in chosen.items()}
    for role, values in labels.items():
        refuse_labels(values, names[role], where)
        labels[role] = _as_in_training(values, chosen[role].features[label_key], features[label_key], labels["train"])
    classes = _class_names(features[label_key], labels.values(), label_key, where)
    chosen = {role: _decoded(rows, image_key, where) for role, rows in chosen.items()}
    return {role: _table(rows, image_key, labels[role], classes, names[role], where) for role, rows in chosen.items()}


def _as_in_training(values: list[Any], own: Any, feature: Any, of_training: Sequence[Any]) -> list[Any]:
    """A split's labels, by name where it numbers its classes otherwise than training: `class_encode_column` does so."""
    names, wanted = getattr(own, "names", None), getattr(feature, "names", None)
    if not names or names == wanted or not (wanted or any(isinstance(value, str) for value in of_training)):
        return values
    return [names[value] if isinstance(value, int) else value for value in values]


def _decoded(rows: Any, image_key: str, where: str) -> Any:
    """The rows with a column of images, if they have one of files' bytes or paths."""
    feature = rows.features[image_key]
    if type(feature).__name__ == "Image":
        return rows
    try:
        return rows.cast_column(image_key, datasets_library().Image())
    except Exception as error:  # the library raises many kinds for a column of another type
        raise RunError(
            f"Column {image_key!r} of {where} holds {feature}, and no images. Choose another with --image-key."
        ) from error


def _table(
    rows: Any, image_key: str, values: Sequence[Any], class_names: tuple[str, ...], name: str, where: str
) -> Table:
    ids = {name: i for i, name in enumerate(class_names)}
    if unknown := sorted({value for value in values if isinstance(value, str) and value not in ids}):
        raise RunError(
            f"Split {name} of {where} has classes that training has not: {named(unknown, 'class', 'classes')}. "
            f"Training has {named(class_names, 'class', 'classes')}."
        )
    labels = [ids[str(value)] if not isinstance(value, int) else value for value in values]
    encoded = partial(_bytes_of_row, rows, image_key)
    return Table(partial(_read_row, rows, image_key, name, where), labels, class_names, name=name, encoded=encoded)


def _read_row(rows: Any, image_key: str, split: str, where: str, i: int) -> Image.Image:
    try:
        return as_rgb(rows[i][image_key])
    except Exception as error:  # the library's decoders raise many kinds for damaged images; None is an absent one
        reason = "there is none" if isinstance(error, AttributeError) else f"{type(error).__name__}: {error}"
        raise ImageError(
            f"The image in row {i} of split {split} of {where} cannot be read: {reason}. {LEAVE_OUT}"
        ) from error


def _bytes_of_row(rows: Any, image_key: str, i: int) -> bytes | None:
    stored = rows.with_format("arrow")[i][image_key][0].as_py()
    if not isinstance(stored, Mapping):
        return None
    path = stored.get("path")
    return stored.get("bytes") or (Path(path).read_bytes() if path and Path(path).is_file() else None)


def _class_names(feature: Any, labels: Collection[Sequence[Any]], label_key: str, where: str) -> tuple[str, ...]:
    if getattr(feature, "names", None):
        return tuple(feature.names)
    values = {value for split in labels for value in split}
    if all(isinstance(value, int) for value in values):
        if (highest := max(values)) > sum(map(len, labels)):
            raise RunError(
                f"Column {label_key!r} of {where} goes to {highest}, with {len(values)} different numbers: wanted "
                f"classes counted from 0, not ids. Choose another with --label-key, or number them anew."
            )
        return tuple(str(i) for i in range(highest + 1))
    return tuple(sorted(str(value) for value in values))


def _image_column(features: Mapping[str, Any], where: str) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(found) == 1:
        return found[0]
    raise RunError(_ask("image", found or list(features), where))


def _label_column(features: Mapping[str, Any], where: str) -> str:
    found = [name for name in LABEL_NAMES if name in features]
    found = found or [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if len(found) == 1 or (found and found[0] == "label"):
        return found[0]
    raise RunError(_ask("label", found or list(features), where))


def _ask(what: str, candidates: Iterable[str], where: str) -> str:
    return f"Which column of {where} is the {what} cannot be told. Choose with --{what}-key: {', '.join(candidates)}."
