"""Datasets of every kind, their splits, and what is said when they cannot be read."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from nolora_vision.training import hub_tables, sources
from nolora_vision.training.data import ImageData, load_data, make_loader
from nolora_vision.training.errors import RunError
from tests.training.preprocessing import preprocessing

PREPROCESSING = preprocessing(16)


def picture(i: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), 10 * (i % 25), dtype=np.uint8)).convert(mode)


def dataset_of(n: int, *, image: str = "image", label: str = "label", names: list[str] | None = None, **more):
    labels = [i % 2 for i in range(n)]
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=names or ["cat", "dog"])}
    features |= {key: datasets.Value("int64") for key in more}
    columns = {image: [picture(i, "L") for i in range(n)], label: labels, **more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def rows(data: ImageData) -> dict[str, set[int]]:
    return {name: set(getattr(data, name).rows.tolist()) for name in ("train", "val", "test")}


def test_digits_splits_are_disjoint_fixed_and_stratified() -> None:
    data, again = load_data("digits", seed=0, max_train_samples=100), load_data("digits", seed=1, max_train_samples=100)
    assert rows(data)["val"] == rows(again)["val"] and rows(data)["train"] != rows(again)["train"]
    assert not rows(data)["train"] & rows(data)["val"]
    counts = np.bincount(load_data("digits").val.labels)
    assert len(counts) == 10 and counts.max() - counts.min() <= 1
    full = load_data("digits")
    assert len(full.train) + len(full.val) + len(full.test) == 1797
    assert full.about["train_images"] == len(full.train)


def test_digits_by_class_range() -> None:
    data = load_data("digits:5-9")
    assert data.class_names == ("5", "6", "7", "8", "9") and set(data.train.labels) == set(range(5))
    with pytest.raises(RunError, match="fewer than two classes"):
        load_data("digits:7-7")


def test_evaluation_subsets_do_not_depend_on_the_seed() -> None:
    a, b = (load_data("digits", seed=seed, max_eval_samples=20) for seed in (0, 1))
    assert np.array_equal(a.test.rows, b.test.rows) and len(a.test) == len(a.val) == 20


@pytest.mark.parametrize("kind", ["parquet", "arrow", "save_to_disk", "one_file"])
def test_local_tables(tmp_path: Path, kind: str) -> None:
    rows = dataset_of(40)
    path = tmp_path / "d"
    path.mkdir()
    if kind == "parquet":
        rows.to_parquet(path / "train-0.parquet")
        dataset_of(10).to_parquet(path / "test-0.parquet")
    elif kind == "one_file":
        path = path / "all.parquet"
        rows.to_parquet(path)
    elif kind == "save_to_disk":
        datasets.DatasetDict(train=rows, test=dataset_of(10)).save_to_disk(str(path))
    else:
        rows.save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path / "train.arrow")
        dataset_of(10).save_to_disk(str(tmp_path / "saved2"))
        (tmp_path / "saved2" / "data-00000-of-00001.arrow").rename(path / "test.arrow")
    data = load_data(str(path))
    assert data.class_names == ("cat", "dog")
    assert len(data.test) == (8 if kind == "one_file" else 10)
    assert data.train.table.image(3).mode == "RGB" and data.train.table.image(3).getpixel((0, 0)) == (30, 30, 30)


@pytest.mark.parametrize("split", [True, False])
def test_image_folder(tmp_path: Path, split: bool) -> None:
    for part in ("train", "val", "test") if split else ("",):
        for name in ("ant", "bee"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(20):
                picture(i).save(folder / f"{i}.png")
    data = load_data(str(tmp_path))
    assert data.class_names == ("ant", "bee")
    assert (len(data.train), len(data.val), len(data.test)) == ((40, 40, 40) if split else (28, 4, 8))


@pytest.mark.parametrize("names", [("bus", "car", "train"), ("beaker", "test_tube")])
def test_a_class_may_be_called_as_a_split_is(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(20):
            picture(i).save(tmp_path / name / f"{i}.png")
    data = load_data(str(tmp_path))
    assert data.class_names == names and len(data.train) + len(data.val) + len(data.test) == 20 * len(names)


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    with pytest.raises(RunError, match="train is no image folder: wanted one sub-folder with images for each class"):
        load_data(str(tmp_path))


def test_string_labels_become_classes(tmp_path: Path) -> None:
    columns = {"image": [picture(i) for i in range(12)], "label": ["b", "a", "c"] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    tables, _ = sources.load_tables(str(tmp_path))
    assert tables["train"].class_names == ("a", "b", "c") and list(tables["train"].labels[:3]) == [1, 0, 2]


def test_columns_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    dataset_of(8, label="fine_label", coarse=[0] * 8, labels=[0] * 8).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RunError, match=r"is the label cannot be told\. Choose with --label-key: labels, fine_label"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), label_key="fine_label", val_split=0.5).class_names == ("cat", "dog")
    with pytest.raises(RunError, match=r"no label column 'x'\. Columns: image, fine_label, coarse, labels"):
        load_data(str(tmp_path), label_key="x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", r"Unknown dataset 'cifar11'\. Did you mean 'cifar10'\? Wanted one of digits, cifar10, cifar100"),
        ("{tmp}/empty", "is no image folder: wanted one sub-folder with images for each class"),
        (
            "{tmp}/file.txt",
            r"is no dataset: wanted a folder of images, a \.parquet or \.arrow file, or a",
        ),
        ("{tmp}/no.safetensors", r"does not exist\. Make it with python -m nolora_vision\.training\.pack DATASET"),
        ("{tmp}/bad.parquet", "could not be read as parquet"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(RunError, match=message):
        load_data(name.format(tmp=tmp_path))


def test_empty_split_is_refused() -> None:
    with pytest.raises(RunError, match="The validation split of digits is empty"):
        load_data("digits", val_split=0.0)


def test_wrong_class_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = {"train": dataset_of(10, image="img"), "test": dataset_of(10, image="img")}
    monkeypatch.setattr(hub_tables, "fetch_dataset", lambda *_: copy)
    with pytest.raises(RunError, match="should have 10 classes, this copy has 2 in its column 'label'"):
        load_data("cifar10")
    assert load_data("uoft-cs/cifar10", val_split=0.5).class_names == ("cat", "dog")
    assert (
        load_data("cifar100", image_key="img", label_key="label", val_split=0.5).about["id"] == "uoft-cs/cifar100"
    )  # asked for, so not refused


def test_a_folder_with_a_known_name_is_not_guessed_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "beans" / name).mkdir(parents=True)
        for i in range(10):
            picture(i).save(tmp_path / "beans" / name / f"{i}.png")
    with pytest.raises(RunError, match=r"Say --dataset \./beans for that, or --dataset AI-Lab-Makerere/beans"):
        load_data("beans")
    assert load_data("./beans").class_names == ("ant", "bee")


def test_files_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("test", 10), ("contrast", 12)):
        dataset_of(count).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    data = load_data(str(tmp_path))
    assert (len(data.train) + len(data.val), len(data.test)) == (40, 10)
    data = load_data(str(tmp_path), test_split="contrast")
    assert (len(data.train) + len(data.val), len(data.test)) == (40, 12) and data.about["rows"]["contrast"] == 12
    with pytest.raises(RunError, match=r"no split 'fog' to test on\. Choose --test-split from: contrast, test"):
        load_data(str(tmp_path), test_split="fog")
    with pytest.raises(RunError, match="no split 'train' to test on"):
        load_data(str(tmp_path), test_split="train")
    with pytest.raises(RunError, match=r"digits has no split 'fog' to test on\. Choose --test-split from: test"):
        load_data("digits", test_split="fog")


def test_a_folder_of_images_is_tested_on_the_split_that_is_asked_for(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("val", 3), ("test", 4), ("fog", 5)):
        for name in ("ant", "bee"):
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / "d" / part / name / f"{i}.png")
    for split, sizes in ((None, (20, 6, 8)), ("fog", (20, 6, 10)), ("val", (18, 2, 6))):
        data = load_data(str(tmp_path / "d"), test_split=split)
        assert (len(data.train), len(data.val), len(data.test)) == sizes
    with pytest.raises(RunError, match=r"has no split 'fog' to test on\. It has none but the training split"):
        load_data(str(tmp_path / "d" / "val"), test_split="fog")


def test_parts_of_each_class_and_the_final_run() -> None:
    with pytest.raises(RunError, match="shots and train_fraction each choose the training images"):
        load_data("digits", shots=1, train_fraction=0.5)
    data = load_data("digits", shots=3, seed=1)
    assert np.bincount(data.train.labels).tolist() == [3] * 10
    assert data.about["splits"]["train"] == "the dataset's own: 3 images of each class, seed 1"
    final = load_data("digits", shots=3, seed=1, train_on="train_val")
    assert set(final.train.rows) == set(data.train.rows) | set(data.val.rows)
    assert not final.val_held_out and final.about["val_held_out"] is False and data.about["val_held_out"] is True
    said = f"the dataset's own: 3 images of each class, seed 1, and all {len(data.val)} validation images"
    assert final.about["splits"]["train"] == said
    assert final.split_file == data.split_file and final.about["train_images"] == 30 + len(data.val)


def test_loaders_repeat_by_seed_and_see_each_image_once() -> None:
    data = load_data("digits", max_train_samples=64)

    def labels(seed: int, training: bool = True) -> list[int]:
        loader = make_loader(data.train, PREPROCESSING, batch_size=16, training=training, seed=seed)
        return [int(label) for _, batch in loader for label in batch]

    assert labels(0) == labels(0) and labels(0) != labels(1)
    assert sorted(labels(0)) == sorted(labels(0, training=False)) == sorted(data.train.labels.tolist())
    images, _ = next(iter(make_loader(data.test, PREPROCESSING, batch_size=5, training=False)))
    assert images.shape == (5, 3, 16, 16)
