"""`python -m nolora_vision.training.pack`: a dataset as one file, for machines without a network or its library."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL
import tyro

from nolora_vision.training.data import load_data
from nolora_vision.training.errors import RunError
from nolora_vision.training.packed import write_packed
from nolora_vision.training.progress import print_table
from nolora_vision.training.sources import load_tables
from nolora_vision.training.splits import as_table
from nolora_vision.training.table import Table


def pack(
    dataset: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    *,
    size: Literal["original"] | int = "original",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    val_split: float = 0.1,
    seed: int = 0,
    image_key: str | None = None,
    label_key: str | None = None,
    revision: str | None = None,
    test_split: str | None = None,
    vtab_root: Path | None = None,
) -> Path:
    """Write a dataset into one .safetensors file that train.py takes as its --dataset.

    The whole dataset gives the runs that it gives unpacked, image for image. A part of it is split first, as a run with
    these options would, and the file holds the three splits.

    Args:
        dataset: What --dataset of train.py takes.
        output: The file, ending in .safetensors.
        size: Height and width in pixels to bring all images to (the middle square, bicubic); original keeps them.
        max_train_samples: Keep this many training images at most, drawn by the seed.
        max_eval_samples: Keep this many validation and this many test images at most.
        val_split: Share of the training images held out for validation where a part is packed.
        seed: Of the draw of training images.
        image_key: As in train.py, and so the others.

    Raises:
        RunError: if the dataset cannot be loaded, or the file cannot be written.
    """
    if output.suffix != ".safetensors":
        raise RunError(f"{output} must end in .safetensors, the one format of packed datasets.")
    if size != "original" and size < 1:
        raise RunError(f"--size must be original or at least 1 pixel, got {size}.")
    source: dict[str, Any] = {"image_key": image_key, "label_key": label_key, "revision": revision}
    source |= {"test_split": test_split, "vtab_root": vtab_root}
    if max_train_samples is None and max_eval_samples is None:
        tables, about = load_tables(dataset, **source)
    else:
        source |= {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
        tables, about = _part(dataset, seed=seed, val_split=val_split, **source)
    made = {"size": size, "dataset": dataset, "nolora-vision": version("nolora-vision"), "pillow": PIL.__version__}
    write_packed(output, tables, {**about, "packed": made}, size=None if size == "original" else size)
    return output


def _part(dataset: str, **options: Any) -> tuple[dict[str, Table], Mapping[str, Any]]:
    data = load_data(dataset, **options, check_shared="never")
    tables = {role: as_table(getattr(data, role), role) for role in ("train", "val", "test")}
    return tables, {**data.about, "of_rows": data.about["rows"]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after one message about what the user can mend."""
    try:
        output = tyro.cli(pack, args=argv, prog="python -m nolora_vision.training.pack")
    except RunError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    print_table(str(output), [("size", f"{output.stat().st_size / 2**20:.1f} MiB")])
    print(f"Use it: python train.py --dataset {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
