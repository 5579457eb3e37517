"""Images that cannot be read and labels that cannot be learned: refused by name, left out by wish, or told of."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from nolora_vision.training.data import load_data, make_loader
from nolora_vision.training.errors import ImageError, RunError
from nolora_vision.training.run import main
from tests.training.preprocessing import preprocessing

PREPROCESSING = preprocessing(16)
FORMS = {"grey": "L", "palette": "P", "transparent": "RGBA", "print": "CMYK", "deep": "I;16", "black or white": "1"}


def picture(i: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train, val and test with 8, 2 and 4 images of each of two classes."""
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        for k, name in enumerate(("ant", "bee")):
            place = tmp_path / "d" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture(hash((split, k, i)) % 2**31).save(place / f"{i}.png")
    return tmp_path / "d"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def bomb(path: Path) -> None:
    """A file of a few kilobytes that says it has 10¹⁰ pixels."""
    from PIL.PngImagePlugin import putchunk

    stream = io.BytesIO(b"")
    stream.write(b"\x89PNG\r\n\x1a\n")
    putchunk(stream, b"IHDR", (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00")
    putchunk(stream, b"IDAT", b"\x78\x9c\x03\x00\x00\x00\x00\x01")
    putchunk(stream, b"IEND", b"")
    path.write_bytes(stream.getvalue())


BAD = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "enormous": bomb,
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_by_its_file_or_left_out_and_listed(folder: Path, kind: str, workers: int) -> None:
    file = folder / "train" / "bee" / "3.png"
    BAD[kind](file)
    loader = make_loader(load_data(str(folder)).train, PREPROCESSING, batch_size=4, training=True, workers=workers)
    with pytest.raises(ImageError) as caught:
        list(loader)
    said = str(caught.value)
    assert said.startswith(f"The image {file} cannot be read: ") and said.endswith("--on-bad-image skip.")
    data = load_data(str(folder), on_bad_image="skip")
    assert (len(data.train), len(data.val), len(data.test)) == (15, 4, 8)
    assert [line.split(" cannot")[0] for line in data.about["skipped_images"]["train"]] == [f"The image {file}"]
    assert set(data.about["skipped_images"]) == {"train"} and data.about["train_images"] == 15
    assert sum(len(labels) for _, labels in make_loader(data.train, PREPROCESSING, batch_size=5, training=True)) == 15


def test_a_bad_row_is_named_by_its_number_or_left_out(tmp_path: Path) -> None:
    def encoded(i: int) -> dict[str, Any]:
        stream = io.BytesIO()
        picture(i).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    images = [encoded(i) for i in range(20)]
    images[7] = {"bytes": images[7]["bytes"][:-40], "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(20)]}, features=features)
    (tmp_path / "d").mkdir()
    rows.to_parquet(str(tmp_path / "d" / "train.parquet"))
    data = load_data(str(tmp_path / "d"), on_bad_image="skip")
    (problems,) = data.about["skipped_images"].values()
    assert len(problems) == 1 and problems[0].startswith(
        f"The image in row 7 of split train of {tmp_path / 'd'} cannot"
    )
    assert len(data.train) + len(data.val) + len(data.test) == 19
    plain = load_data(str(tmp_path / "d"))
    with pytest.raises(ImageError, match="in row 7 of split train"):
        for split in (plain.train, plain.val, plain.test):
            list(make_loader(split, PREPROCESSING, batch_size=4, training=False))


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_kind_are_decoded(folder: Path, form: str) -> None:
    file = folder / "train" / "ant" / "0.png"
    suffix = ".jpg" if form == "print" else ".png"
    file.unlink()
    image = picture(0)
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if form == "deep" else image
    (image if form == "deep" else image.convert(FORMS[form])).save(file.with_suffix(suffix))
    table = load_data(str(folder)).train.table
    decoded = table.image(0)
    assert decoded.mode == "RGB" and decoded.size == (12, 12)
    if form in ("grey", "deep"):
        assert np.array_equal(np.asarray(decoded)[..., 0], np.asarray(picture(0).convert("L")))
    if form == "transparent":
        assert np.array_equal(np.asarray(decoded), np.asarray(picture(0)))


def test_a_turned_photo_an_animation_and_a_wrong_suffix_are_decoded(folder: Path) -> None:
    place = folder / "train" / "ant"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left of upright
    wide = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 8, 0).repeat(8, 1))
    wide.save(place / "0.png", exif=exif)
    picture(1).save(place / "1.gif", save_all=True, append_images=[picture(2)])
    picture(3).save(place / "2.png", "JPEG")
    table = load_data(str(folder)).train.table
    upright = table.image(0)
    assert upright.size == (8, 16) and upright.getpixel((4, 0)) == (255, 0, 0)
    assert all(table.image(i).size == (12, 12) for i in range(1, 4))


def parquet(folder: Path, labels: list[Any], kind: str = "int64", test: list[Any] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    for name, values in (("train", labels), ("test", test)):
        if values is not None:
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
            rows = {"image": [picture(i + (500 if name == "test" else 0)) for i in range(len(values))], "label": values}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1, None, 1] * 5, "int64", r"5 of 20 labels of split train of .* are missing \(rows 2, 6, 10, 14, 18\)"),
        (["a", None] * 6, "string", r"6 of 12 labels .* are missing \(rows 1, 3, 5, 7, 9 and 1 more\)"),
        ([0, 1, -1] * 4, "int64", r"4 of 12 labels .* are negative, such as -1 .*--test-split"),
        ([0.5, 1.5] * 6, "float32", r"are no class, such as 0\.5 .*--label-key"),
        ([0] * 12, "int64", r"has a single class \(0\), so there is nothing to tell apart"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path: Path, labels: list[Any], kind: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_data(parquet(tmp_path / "d", labels, kind))


def test_ids_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"Column 'label' of .* goes to 1000000, with 2 different numbers: wanted classes"
    ):
        load_data(parquet(tmp_path, [3, 1_000_000] * 8))


def test_classes_of_splits_are_matched_by_name_not_by_number(tmp_path: Path) -> None:
    """`class_encode_column` numbers the classes of each split by itself."""
    colours = {"ant": "red", "bee": "green", "cat": "blue"}

    def rows(names: list[str]) -> datasets.Dataset:
        columns = {"image": [Image.new("RGB", (4, 4), colours[name]) for name in names], "label": names}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    parts = {"train": rows(["ant", "bee", "cat"] * 8), "test": rows(["bee", "cat"] * 4)}
    encoded = datasets.DatasetDict(parts).class_encode_column("label")
    assert encoded["test"].features["label"].names == ["bee", "cat"]
    encoded.save_to_disk(tmp_path / "saved")
    data = load_data(str(tmp_path / "saved"))
    assert data.class_names == ("ant", "bee", "cat")
    for table in (data.train.table, data.test.table):
        assert table.image(list(table.labels).index(1)).getpixel((0, 0)) == (0, 128, 0)
    more = {**parts, "test": rows(["bee", "cat"]).map(lambda row: {**row, "label": "dog"})}
    datasets.DatasetDict(more).class_encode_column("label").save_to_disk(tmp_path / "more")
    with pytest.raises(RunError, match=r"has classes that training has not: class dog\. Training has classes ant, bee"):
        load_data(str(tmp_path / "more"))


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_bytes_of_files_in_a_plain_column_are_images(tmp_path: Path, kind: str) -> None:
    """As pandas writes them, without the library's own note on the column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def stored(i: int) -> Any:
        stream = io.BytesIO()
        picture(i).save(stream, "PNG")
        return stream.getvalue() if kind == "bytes" else {"bytes": stream.getvalue(), "path": None}

    table = pa.table({"photo": [stored(i) for i in range(24)], "label": ["ant", "bee"] * 12, "n": list(range(24))})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load_data(str(tmp_path), image_key="photo")
    assert np.array_equal(np.asarray(data.train.table.image(3)), np.asarray(picture(3)))
    with pytest.raises(RunError, match=r"Column 'n' of .* holds .*int64.*, and no images"):
        load_data(str(tmp_path), image_key="n")


def test_every_file_that_pillow_reads_is_in_a_folder(folder: Path) -> None:
    picture(1).save(folder / "train" / "ant" / "a.gif")
    picture(2).save(folder / "train" / "ant" / "b.JFIF", "JPEG")
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    data = load_data(str(folder))
    assert len(data.train) == 18


def test_a_link_to_nothing_is_a_bad_image(folder: Path) -> None:
    (folder / "train" / "ant" / "9.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(ImageError, match=r"The image .*9\.png cannot be read: .*--on-bad-image skip"):
        load_data(str(folder))
    data = load_data(str(folder), on_bad_image="skip")
    assert len(data.train) == 16 and len(data.about["skipped_images"]["train"]) == 1


def test_names_are_classes_in_their_order(tmp_path: Path) -> None:
    data = load_data(parquet(tmp_path / "d", ["cat", "ant", "bee"] * 8, "string"))
    assert data.class_names == ("ant", "bee", "cat") and set(data.train.labels) == {0, 1, 2}


def test_classes_that_nobody_trains_on_and_shared_images_are_told_of(tmp_path: Path) -> None:
    place = parquet(tmp_path / "d", [0, 1] * 10, test=[0, 1, 2, 2])
    data = load_data(place)
    assert data.about["warnings"] == [
        "No training image shows class 2, as 50% of the test split do: these can't be got right."
    ]
    both = tmp_path / "both"
    for split, seeds in (("train", range(8)), ("val", range(8, 12)), ("test", (0, 1, 20, 21))):
        for name in ("ant", "bee"):
            (both / split / name).mkdir(parents=True)
            for i in seeds:
                picture(i + (100 if name == "bee" else 0)).save(both / split / name / f"{i}.png")
    (warning,) = load_data(str(both)).about["warnings"]
    assert warning.startswith(
        "4 images of the test split (50% of it: rows 0, 1, 4, 5) are also in the train split, byte"
    )
    assert load_data(str(both), check_shared="never").about["warnings"] == []


def test_folders_of_splits_are_matched_by_name_not_by_number(folder: Path) -> None:
    for file in (folder / "test" / "ant").iterdir():
        file.unlink()
    (folder / "test" / "ant").rmdir()
    data = load_data(str(folder))
    assert data.class_names == ("ant", "bee") and set(data.test.labels) == {1}
    (folder / "test" / "wasp").mkdir()
    picture(1).save(folder / "test" / "wasp" / "0.png")
    with pytest.raises(RunError, match=r"test has classes that the training folder has not: wasp\. Wanted .*ant, bee"):
        load_data(str(folder))


def test_the_command_names_it_skips_it_and_records_it(folder: Path, tmp_path: Path, capsys) -> None:
    truncated(folder / "train" / "bee" / "3.png")
    args = [
        "--model",
        "test_vit",
        "--no-pretrained",
        "--img-size",
        "16",
        "--model-kwargs",
        "patch_size",
        "4",
        "-b",
        "64",
    ]
    args += ["--dataset", str(folder), "--epochs", "1", "-j", "1", "--output", str(tmp_path), "--experiment"]
    assert main([*args, "raised"]) == 2
    said = capsys.readouterr().err
    assert "bee/3.png cannot be read: " in said and "Traceback" not in said
    assert main([*args, "run", "--on-bad-image", "skip"]) == 0
    assert "1 images of the train split are left out:\n  The image" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert len(record["dataset"]["skipped_images"]["train"]) == 1 and record["dataset"]["train_images"] == 15
