"""Where images come from: the Hub, local folders and files, scikit-learn's digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from nolora_vision.config import did_you_mean
from nolora_vision.training.errors import RunError, hub_advice
from nolora_vision.training.images import UnreadableImageError, as_rgb, read_image


@dataclass(frozen=True)
class HubDataset:
    """A dataset whose columns and classes are known."""

    id: str
    image: str
    label: str
    num_classes: int
    crop_pct: float | None = None
    """Share of the image that evaluation looks at, where the model's own (often 0.9 or less) would cut objects off."""


REGISTRY: Mapping[str, HubDataset] = {
    "cifar10": HubDataset("uoft-cs/cifar10", "img", "label", 10, crop_pct=1.0),
    "cifar100": HubDataset("uoft-cs/cifar100", "img", "fine_label", 100, crop_pct=1.0),
}
LABEL_NAMES = ("label", "labels", "fine_label", "variant", "cls", "class", "target")
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Table:
    """Images and labels of one split; an image is decoded when it is asked for. It can be pickled, for workers."""

    image: Callable[[int], Image.Image]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    in_memory: bool = False
    """Whether all images are decoded already."""


def load_tables(
    name: str, *, image_key: str | None = None, label_key: str | None = None, revision: str | None = None
) -> tuple[dict[str, Table], dict[str, Any]]:
    """The splits of a dataset (train, val, test, as far as it has them), and what it is, for the record.

    Raises:
        RunError: if it cannot be found or read, or its columns cannot be told.
    """
    if name == "digits" or re.fullmatch(r"digits:[0-9]-[0-9]", name):
        return digits(name.removeprefix("digits:") if ":" in name else "0-9")
    if Path(name).exists():
        return _local(Path(name), image_key, label_key)
    known = REGISTRY.get(name)
    if known is None and "/" not in name:
        names = ("digits", *REGISTRY)
        raise RunError(
            f"Unknown dataset {name!r}.{did_you_mean(name, names)} Wanted one of {', '.join(names)}, a Hub id such as "
            f"owner/name, or an existing local folder or file."
        )
    hub_id = known.id if known else name
    splits = _load_from_hub(hub_id, revision)
    tables = _tables_of(splits, image_key or (known and known.image), label_key or (known and known.label), hub_id)
    if known is not None and len(tables["train"].class_names) != known.num_classes:
        got = len(tables["train"].class_names)
        raise RunError(f"{hub_id} should have {known.num_classes} classes, this copy has {got}.")
    fingerprint = {split: getattr(rows, "_fingerprint", None) for split, rows in splits.items()}
    about = {"id": hub_id, "revision": revision or "main", "fingerprint": fingerprint}
    return tables, about | ({"crop_pct": known.crop_pct} if known is not None and known.crop_pct else {})


def digits(classes: str = "0-9") -> tuple[dict[str, Table], dict[str, Any]]:
    """1,797 real handwritten digits of 8×8 pixels that ship with scikit-learn; every fifth of a class is for the test.

    Args:
        classes: first and last digit, to take only some of them: `5-9`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    first, last = int(classes[0]), int(classes[-1])
    if first >= last:
        raise RunError(f"digits:{classes} has fewer than two classes. Wanted first-last, such as digits:5-9.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError("--dataset digits needs scikit-learn: pip install 'nolora-vision[demo]'.") from error
    bunch: Any = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype("uint8")
    seen: dict[int, int] = {}
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for i, label in enumerate(bunch.target.tolist()):
        if first <= label <= last:
            seen[label] = seen.get(label, 0) + 1
            rows["test" if seen[label] % 5 == 0 else "train"].append(i)
    names = tuple(str(digit) for digit in range(first, last + 1))

    def table(indices: list[int]) -> Table:
        images = [Image.fromarray(pixels[i]).convert("RGB") for i in indices]
        return Table(images.__getitem__, [int(bunch.target[i]) - first for i in indices], names, in_memory=True)

    name = "digits" if classes == "0-9" else f"digits:{classes}"
    return {split: table(indices) for split, indices in rows.items()}, {"id": name, "source": "scikit-learn"}


def _load_from_hub(hub_id: str, revision: str | None) -> Mapping[str, Any]:
    datasets = _datasets()
    instead = "Or use --dataset digits (needs no network) or a local folder of images."
    try:
        return datasets.load_dataset(hub_id, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        if isinstance(error.__cause__, (ConnectionError, OSError)):
            raise hub_advice(f"Dataset {hub_id}", "dataset", error, instead=instead) from error
        raise RunError(
            f"Dataset {hub_id!r} does not exist on the Hub, or is private. Check its name, log in with `hf auth "
            f"login`, or use one of {', '.join(('digits', *REGISTRY))}."
        ) from error
    except Exception as error:  # clients raise many kinds for a failed download
        raise hub_advice(f"Dataset {hub_id}", "dataset", error, instead=instead) from error


def _local(path: Path, image_key: str | None, label_key: str | None) -> tuple[dict[str, Table], dict[str, Any]]:
    about = {"id": path.name, "source": "local"}
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in {".parquet", ".arrow"})
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = _datasets().load_from_disk(str(path))
        splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        return _tables_of(splits, image_key, label_key, str(path)), about
    if files:
        return _tables_of(_read_files(files, path), image_key, label_key, str(path)), about
    return _image_folder(path), about


def _read_files(files: Sequence[Path], root: Path) -> Mapping[str, Any]:
    datasets = _datasets()
    kind = files[0].suffix.removeprefix(".")
    if kind not in {"parquet", "arrow"}:
        raise RunError(f"{root} is no dataset: wanted a folder of images, or a .parquet or .arrow file.")
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.stem) or _split_of(file.parent.name) or "train", []).append(str(file))
    try:
        return {
            split: datasets.Dataset.from_parquet(paths)
            if kind == "parquet"
            else datasets.concatenate_datasets([datasets.Dataset.from_file(p) for p in paths])
            for split, paths in by_split.items()
        }
    except Exception as error:
        raise RunError(f"{root} could not be read as {kind} ({type(error).__name__}: {error}).") from error


def _split_of(name: str) -> str | None:
    for split, names in SPLIT_NAMES.items():
        if any(name.lower() == n or name.lower().startswith((f"{n}-", f"{n}_")) for n in names):
            return split
    return None


def _image_folder(path: Path) -> dict[str, Table]:
    from torchvision.datasets import ImageFolder

    folders = {split: child for child in sorted(path.iterdir()) if child.is_dir() and (split := _split_of(child.name))}
    tables = {}
    for split, folder in (folders or {"train": path}).items():
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise RunError(
                f"{folder} is no image folder: wanted one sub-folder with images for each class, below {path} or below "
                f"its folders train, val and test ({error})."
            ) from error
        files = [file for file, _ in found.samples]
        tables[split] = Table(partial(_read_file, files), [label for _, label in found.samples], tuple(found.classes))
    return tables


def _read_file(files: Sequence[str], i: int) -> Image.Image:
    try:
        return read_image(files[i])
    except UnreadableImageError as error:
        raise RunError(f"The image {files[i]} cannot be read: {error}. Mend it or take it out.") from error


def _read_row(rows: Any, image_key: str, i: int) -> Image.Image:
    return as_rgb(rows[i][image_key])


def _tables_of(splits: Mapping[str, Any], image_key: str | None, label_key: str | None, where: str) -> dict[str, Table]:
    named = {_split_of(split): rows for split, rows in splits.items()}
    chosen = {split: named[split] for split in ("train", "val", "test") if split in named}
    if "train" not in chosen:
        raise RunError(f"{where} has no training split; it has {', '.join(map(str, splits)) or 'none'}.")
    features = chosen["train"].features
    image_key = image_key or _image_column(features, where)
    label_key = label_key or _label_column(features, where)
    for key, what in ((image_key, "image"), (label_key, "label")):
        if key not in features:
            columns = ", ".join(features)
            raise RunError(f"{where} has no {what} column {key!r}. Columns: {columns}. Choose with --{what}-key.")
    names = _class_names(chosen, label_key)
    return {split: _table(rows, image_key, label_key, names) for split, rows in chosen.items()}


def _table(rows: Any, image_key: str, label_key: str, names: tuple[str, ...]) -> Table:
    values = rows[label_key]
    values = list(values)
    ids = {name: i for i, name in enumerate(names)}
    labels = [ids[str(value)] if not isinstance(value, int) else value for value in values]
    return Table(partial(_read_row, rows, image_key), labels, names)


def _class_names(splits: Mapping[str, Any], label_key: str) -> tuple[str, ...]:
    feature = splits["train"].features[label_key]
    if getattr(feature, "names", None):
        return tuple(feature.names)
    values = {value for rows in splits.values() for value in rows[label_key]}
    if all(isinstance(value, int) for value in values):
        return tuple(str(i) for i in range(max(values) + 1))
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


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RunError("This dataset needs the datasets library: pip install 'datasets>=4'.") from error
    datasets.disable_progress_bars()
    return datasets
