"""A split file gives the same rows again, and is refused for other data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nolora_vision.training.data import ImageData, load_data
from nolora_vision.training.errors import RunError
from nolora_vision.training.split_file import rows_from_text, rows_to_text


def write(path: Path, data: ImageData, change: Any = None) -> Path:
    contents = json.loads(json.dumps(data.split_file))
    if change is not None:
        change(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")
    return path


@given(st.sets(st.integers(0, 300)))
def test_rows_as_text_and_back(rows: set[int]) -> None:
    array = np.array(sorted(rows), np.int64)
    assert np.array_equal(rows_from_text(rows_to_text(array)), array)


def test_rows_are_written_as_ranges() -> None:
    assert rows_to_text(np.array([0, 1, 2, 5, 7, 8])) == "0-2 5 7-8"
    assert len(rows_to_text(np.arange(50_000))) < 10


@pytest.mark.parametrize("text", ["1,2", "3-1 2", "5 4", "1 1", "-3", "0x1"])
def test_other_texts_are_no_rows(text: str) -> None:
    with pytest.raises(ValueError, match=r"no row numbers|out of order"):
        rows_from_text(text)


def test_exactly_the_same_rows_again(tmp_path: Path) -> None:
    first = load_data("digits", shots=4, seed=7, val_split=0.3, max_eval_samples=50)
    again = load_data("digits", seed=1, splits=write(tmp_path / "splits.json", first))
    for role in ("train", "val", "test"):
        assert np.array_equal(getattr(first, role).rows, getattr(again, role).rows)
    assert again.split_file == first.split_file and again.about["splits"] == first.about["splits"]
    assert again.about["splits"]["train"].endswith("4 images of each class, seed 7")
    final = load_data("digits", splits=tmp_path / "splits.json", train_on="train_val")
    assert set(final.train.rows) == set(first.train.rows) | set(first.val.rows)


def facts(role: str, **changes: Any) -> Any:
    return lambda contents: contents["splits"][role].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(dataset="cifar10"), "is of the dataset cifar10, not of digits"),
        (facts("train", of_rows=7), "was made of 7 rows of the split 'train', which has 1,442 here"),
        (facts("val", of_fingerprint="0"), "was made of other data: the labels or class names of the split 'train'"),
        (facts("test", of="contrast"), "test split is of the dataset's split 'contrast'; loaded are train, test"),
        (facts("test", rows="0-999"), "its test split names rows beyond the 355 of the data"),
        (facts("val", rows="0-1441"), "its train and val splits share 20 rows"),
        (facts("val", rows=[1, 2]), "is no split file"),
        (facts("val", rows="a"), "is no split file .ValueError: no row numbers: 'a'"),
        (lambda c: c["splits"]["val"].pop("of"), "is no split file .ValueError: no of"),
        (lambda c: c.pop("format_version"), "is no split file .KeyError: 'format_version'"),
        (lambda c: c.update(format_version=2), "has format 2; this version reads format 1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "splits.json", load_data("digits", shots=2), change)
    with pytest.raises(RunError, match=message):
        load_data("digits", splits=path)


def test_what_is_no_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--splits .*splits\.json cannot be read: No such file"):
        load_data("digits", splits=tmp_path / "splits.json")
    (tmp_path / "splits.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match=r"is no split file \(TypeError"):
        load_data("digits", splits=tmp_path / "splits.json")


def test_a_fingerprint_is_of_labels_and_class_names() -> None:
    table = load_data("digits").train.table
    same = replace(table, labels=np.asarray(table.labels), in_memory=False)
    assert same.fingerprint == table.fingerprint
    assert replace(table, labels=[1, *table.labels[1:]]).fingerprint != table.fingerprint
    assert replace(table, class_names=tuple("abcdefghij")).fingerprint != table.fingerprint
