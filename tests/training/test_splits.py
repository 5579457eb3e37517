"""Rows by the seed: few of each class, shares of each class, two splits as one."""

import pickle

import numpy as np
import pytest
from PIL import Image

from nolora_vision.training.errors import RunError
from nolora_vision.training.split_names import choose_splits
from nolora_vision.training.splits import Split, as_table, both, few_of_each, fraction_of_each, split_tables
from nolora_vision.training.table import Table


def image(i: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (i, 0, 0))


def table(labels: list[int], classes: int = 3) -> Table:
    return Table(image, labels, tuple("abcdefgh"[:classes]), encoded=lambda i: bytes([i]))


def whole(labels: list[int]) -> Split:
    return Split(table(labels), np.arange(len(labels)))


UNEVEN = whole([0] * 50 + [1] * 20 + [2] * 4)


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_few_of_each_class(shots: int) -> None:
    split = few_of_each(UNEVEN, shots, seed=3)
    assert np.bincount(split.labels).tolist() == [shots] * 3
    assert np.array_equal(split.rows, few_of_each(UNEVEN, shots, seed=3).rows)
    assert set(split.rows) <= set(few_of_each(UNEVEN, 4, seed=3).rows)  # fewer shots are among more
    others = [few_of_each(UNEVEN, shots, seed=seed).rows for seed in range(4, 10)]
    assert any(not np.array_equal(split.rows, rows) for rows in others)


def test_a_class_without_enough_images_is_named() -> None:
    with pytest.raises(RunError, match=r"--shots 5 needs 5 training images of each class: 'c' has 4\. Choose fewer"):
        few_of_each(UNEVEN, 5, seed=0)
    with pytest.raises(RunError, match=r"'b' has 1, and 1 other classes have too few"):
        few_of_each(whole([0, 0, 1, 2]), 2, seed=0)


def test_a_number_that_no_image_has_is_no_class_for_shots() -> None:
    """Labels that count from 1 have no 0."""
    assert few_of_each(whole([1, 2, 2, 1]), 1, seed=0).labels.tolist() in ([1, 2], [2, 1])
    held_out = Split(table([0, 1, 1]), np.array([1, 2]))  # 0 is there, in validation
    with pytest.raises(RunError, match="'a' has 0"):
        few_of_each(held_out, 1, seed=0)


def test_shares_are_of_each_class_and_at_least_one() -> None:
    assert np.bincount(fraction_of_each(UNEVEN, 0.1, seed=0).labels).tolist() == [5, 2, 1]
    assert np.bincount(fraction_of_each(UNEVEN, 1.0, seed=0).labels).tolist() == [50, 20, 4]
    assert set(fraction_of_each(UNEVEN, 0.1, seed=0).rows) < set(fraction_of_each(UNEVEN, 0.5, seed=0).rows)
    assert set(fraction_of_each(UNEVEN, 0.1, seed=0).rows) != set(fraction_of_each(UNEVEN, 0.1, seed=1).rows)


def test_two_splits_as_one() -> None:
    first, second = Split(UNEVEN.table, np.array([1, 60])), Split(UNEVEN.table, np.array([0, 73]))
    assert both(first, second).rows.tolist() == [0, 1, 60, 73]
    other = Split(table([2, 1, 0, 2]), np.array([1, 3]))
    joined = both(first, other)
    assert joined.labels.tolist() == [0, 1, 1, 2] and joined.table.class_names == UNEVEN.table.class_names
    assert [joined.table.image(i).getpixel((0, 0))[0] for i in range(4)] == [1, 60, 1, 3]
    assert joined.table.encoded is not None and [joined.table.encoded(i) for i in (1, 2)] == [b"\x3c", b"\x01"]


def test_rows_as_a_table_can_be_pickled() -> None:
    rows = as_table(Split(Table(image, [0, 1, 2], ("a", "b", "c")), np.array([2, 0])), "part")
    for made in (rows, pickle.loads(pickle.dumps(rows))):
        assert made.labels == [2, 0] and made.name == "part" and made.image(0).getpixel((0, 0)) == (2, 0, 0)
        assert made.encoded is None


def test_what_is_lacking_comes_from_the_training_rows() -> None:
    splits, notes = split_tables({"train": table([0, 1] * 50), "val": table([0, 1])}, 0.1)
    assert notes["test"] == "the dataset's validation split" and notes["val"].startswith("10% of the training images")
    assert not set(splits["train"].rows) & set(splits["val"].rows) and len(splits["val"]) == 10
    assert split_tables({"train": table([0, 1] * 50)}, 0.1, {"train": "mine"})[1]["train"] == "mine"


@pytest.mark.parametrize(
    ("names", "test_split", "roles"),
    [
        (("train", "validation", "test"), None, {"train": "train", "val": "validation", "test": "test"}),
        (("test", "trainval", "train", "val"), None, {"train": "train", "val": "val", "test": "test"}),
        (("trainval", "val", "test"), None, {"train": "trainval", "test": "test"}),
        (("train", "test", "contrast"), "contrast", {"train": "train", "test": "contrast"}),
        (("train", "validation"), "val", {"train": "train", "test": "validation"}),
        (("train_val", "train", "val", "test"), None, {"train": "train", "val": "val", "test": "test"}),
        (("train-val", "val", "test"), None, {"train": "train-val", "test": "test"}),
        (("train", "test_small", "test"), None, {"train": "train", "test": "test"}),
    ],
)
def test_splits_by_their_names(names: tuple[str, ...], test_split: str | None, roles: dict[str, str]) -> None:
    assert choose_splits(names, "x", test_split) == roles


def test_a_dataset_without_training_split_is_refused() -> None:
    with pytest.raises(RunError, match="x has no training split; it has test, fog"):
        choose_splits(["test", "fog"], "x")
