"""A packed dataset is the dataset: the same images, labels, splits and runs, without the datasets library."""

import json
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from nolora_vision.training import packed
from nolora_vision.training.data import ImageData, load_data
from nolora_vision.training.errors import RunError
from nolora_vision.training.pack import main, pack
from nolora_vision.training.sources import load_tables
from nolora_vision.training.splits import Split


def noise(i: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> dict[str, Any]:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


def parquet(folder: Path, images: list[dict[str, Any]]) -> Path:
    """Half of the images for training and half for the test."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    half = len(images) // 2
    folder.mkdir(exist_ok=True)
    for split, part in (("train", images[:half]), ("test", images[half:])):
        columns = {"img": part, "label": [i % 2 for i in range(half)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def photos(folder: Path) -> Path:
    """JPEGs of different sizes, one to be turned, PNGs in grey, with a palette and with transparency."""
    images = [encoded(noise(i, (30 + i, 20)), "JPEG", quality=80) for i in range(36)]
    images[3] = encoded(noise(3, (50, 20)), "JPEG", exif=turned())
    images[4] = encoded(noise(4, (20, 20)).convert("L"), "PNG")
    images[5] = encoded(noise(5, (20, 20)).convert("P"), "PNG")
    images[6] = encoded(noise(6, (20, 20)).convert("RGBA"), "PNG")
    return parquet(folder, images)


def small(folder: Path) -> Path:
    return parquet(folder, [encoded(noise(i, (8, 8)), "PNG") for i in range(40)])


def large(folder: Path) -> Path:
    return parquet(folder, [encoded(noise(i, (70, 70)), "JPEG") for i in range(20)])


def folders(folder: Path) -> Path:
    for i in range(40):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        noise(i, (9 + i, 7)).save(place / f"{i:02d}.jpg")
    return folder


def pixels(split: Split) -> list[bytes]:
    images = [split.table.image(int(row)) for row in split.rows]
    return [image.mode.encode() + str(image.size).encode() + image.tobytes() for image in images]


def assert_equal(a: ImageData, b: ImageData) -> None:
    for role in ("train", "val", "test"):
        one, other = getattr(a, role), getattr(b, role)
        assert one.labels.tolist() == other.labels.tolist() and pixels(one) == pixels(other)
    assert a.class_names == b.class_names


@pytest.mark.parametrize("make", [photos, small, large, folders])
def test_every_image_is_the_same_bit_for_bit(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path / "d")
    file = pack(str(folder), tmp_path / "d.safetensors")
    plain, again = (load_data(name, seed=3, val_split=0.2, train_fraction=0.5) for name in (str(folder), str(file)))
    assert_equal(plain, again)
    assert (
        again.split_file == plain.split_file
        and again.about["id"] == "d"
        and again.about["packed"]["size"] == "original"
    )
    assert [t.fingerprint for t in load_tables(str(file))[0].values()] == [
        t.fingerprint for t in load_tables(str(folder))[0].values()
    ]
    rows = np.array([2, 0])
    table = pickle.loads(pickle.dumps(again.train.table))  # as workers get it
    assert pixels(Split(table, rows)) == pixels(Split(plain.train.table, rows))


def test_small_images_of_one_size_are_pixels_and_others_are_files(tmp_path: Path) -> None:
    for make, key, in_memory in ((small, "pixels", True), (large, "files", False), (photos, "files", False)):
        file = pack(str(make(tmp_path / make.__name__)), tmp_path / f"{make.__name__}.safetensors")
        with safe_open(file, framework="numpy") as tensors:
            assert {name.split(".")[1] for name in tensors.keys()} >= {key, "labels"}  # noqa: SIM118
        assert load_tables(str(file))[0]["train"].in_memory is in_memory
    stored = load_tables(str(tmp_path / "large"))[0]["train"].encoded
    kept = load_tables(str(tmp_path / "large.safetensors"))[0]["train"].encoded
    assert stored is not None and kept is not None and stored(3) == kept(3)  # JPEG stays JPEG


def test_a_file_that_decodes_otherwise_is_stored_without_loss(tmp_path: Path) -> None:
    tables, about = load_tables(str(large(tmp_path / "d")))
    other = {
        role: packed.Table(t.image, t.labels, t.class_names, encoded=lambda i: b"no") for role, t in tables.items()
    }
    packed.write_packed(tmp_path / "d.safetensors", other, about)
    again, _ = load_tables(str(tmp_path / "d.safetensors"))
    assert again["train"].image(1).tobytes() == tables["train"].image(1).tobytes()


def test_images_brought_to_one_size(tmp_path: Path) -> None:
    file = pack(str(photos(tmp_path / "d")), tmp_path / "d.safetensors", size=12)
    tables, about = load_tables(str(file))
    image = load_tables(str(tmp_path / "d"))[0]["train"].image(7)  # 37 × 20
    square = image.resize((12, 12), Image.Resampling.BICUBIC, box=(8.5, 0, 28.5, 20))
    assert tables["train"].image(7).tobytes() == square.tobytes() and tables["train"].in_memory
    assert about["packed"]["size"] == 12
    file = pack(str(tmp_path / "d"), tmp_path / "big.safetensors", size=65)
    assert load_tables(str(file))[0]["train"].image(7).size == (65, 65)


def test_a_part_is_what_a_run_with_these_options_takes(tmp_path: Path) -> None:
    folder = str(small(tmp_path / "d"))
    part = {"max_train_samples": 7, "max_eval_samples": 3, "seed": 2, "val_split": 0.3}
    file = pack(folder, tmp_path / "d.safetensors", **part)
    again, plain = load_data(str(file), seed=5), load_data(folder, **part)
    assert_equal(plain, again)
    assert again.about["splits"] == plain.about["splits"] and again.about["of_rows"] == {"train": 20, "test": 20}
    saved = tmp_path / "splits.json"
    saved.write_text(json.dumps(plain.split_file), encoding="utf-8")
    with pytest.raises(RunError, match="was made of 20 rows of the split 'train', which has 7 here"):
        load_data(str(file), splits=saved)


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    folder = str(photos(tmp_path / "d"))
    a, b = (pack(folder, tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert a.read_bytes() == b.read_bytes() and a.stat().st_mode & 0o777 == (folder_mode(tmp_path) & 0o666)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "d"]


def folder_mode(path: Path) -> int:
    (path / "d" / "probe").touch()
    return (path / "d" / "probe").stat().st_mode


WITHOUT = """
import sys
sys.modules["datasets"] = None  # an import of it fails
from nolora_vision.training.data import load_data
data = load_data(sys.argv[1])
print(len(data.train), sum(data.test.table.image(0).tobytes()))
"""


def test_reading_needs_no_datasets_library(tmp_path: Path) -> None:
    file = pack(str(photos(tmp_path / "d")), tmp_path / "d.safetensors")
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(file)], capture_output=True, text=True)
    data = load_data(str(file))
    assert done.stdout.split() == [str(len(data.train)), str(sum(data.test.table.image(0).tobytes()))], done.stderr


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.safetensors"
    assert main(["digits:0-4", str(file), "--max-train-samples", "50"]) == 0
    assert f"python train.py --dataset {file}" in capsys.readouterr().out
    data = load_data(str(file))
    assert (
        len(data.train) == 50 and data.about["id"] == "digits:0-4" and data.about["packed"]["dataset"] == "digits:0-4"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits", "{tmp}/d.npz"], "d.npz must end in .safetensors, the one format of packed datasets"),
        (["digits", "{tmp}/d.safetensors", "--size", "0"], "--size must be original or at least 1 pixel, got 0"),
        (["digitz", "{tmp}/d.safetensors"], "Unknown dataset 'digitz'. Did you mean 'digits'?"),
        (["digits", "{tmp}/no/d.safetensors"], "d.safetensors cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_packed_is_said(tmp_path: Path, capsys: Any, args: list[str], message: str) -> None:
    assert main([arg.format(tmp=tmp_path) for arg in args]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def metadata(**changes: Any) -> dict[str, str]:
    facts = {"format_version": 1, "about": {}, "class_names": ["a", "b"], "names": {"train": "train"}}
    return {packed.KIND: json.dumps({**facts, **changes})}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"kind": "other"}, "is a safetensors file, but holds no packed dataset. Make one with python -m"),
        (metadata(format_version=2), "has format 2; this version reads 1"),
        ({packed.KIND: "[]"}, "is no packed dataset, or damaged .TypeError"),
        ({packed.KIND: "{"}, "is no packed dataset, or damaged .JSONDecodeError"),
        (metadata(), "is no packed dataset, or damaged .ValueError: 3 labels of 2 images"),
        (metadata(names={"test": "x"}), "is no packed dataset, or damaged .SafetensorError"),
    ],
)
def test_other_safetensors_files_are_refused(tmp_path: Path, contents: dict[str, str], message: str) -> None:
    tensors = {"train.labels": np.array([0, 1, 1]), "train.pixels": np.zeros((2, 4, 4, 3), np.uint8)}
    save_file(tensors, tmp_path / "d.safetensors", contents)
    with pytest.raises(RunError, match=message):
        load_tables(str(tmp_path / "d.safetensors"))


def test_labels_without_a_class_are_refused(tmp_path: Path) -> None:
    tensors = {"train.labels": np.array([0, 2]), "train.pixels": np.zeros((2, 4, 4, 3), np.uint8)}
    save_file(tensors, tmp_path / "d.safetensors", metadata())
    with pytest.raises(RunError, match="labels without a class name"):
        load_tables(str(tmp_path / "d.safetensors"))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = pack("digits", tmp_path / "d.safetensors")
    content = file.read_bytes()
    for part in (b"", content[:100], content[:-1]):
        file.write_bytes(part)
        with pytest.raises(RunError, match="is no packed dataset, or damaged"):
            load_tables(str(file))
