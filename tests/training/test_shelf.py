"""What runs share changes no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from nolora_vision.training import shelf as shelves
from nolora_vision.training.ingredients import run_loaders
from nolora_vision.training.progress import RunsProgress
from nolora_vision.training.run import run
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.shelf import Shelf
from tests.training.preprocessing import preprocessing

SMALL = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1}
PREPROCESSING = preprocessing(8)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    torch.manual_seed(7)
    weights = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3, **SMALL).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    return RunConfig(
        model="vit_tiny_patch16_224", model_kwargs=SMALL, dataset="digits:0-4", img_size=16, epochs=2, batch_size=32,
        pretrained_path=tmp_path / "weights.safetensors", max_train_samples=64, max_eval_samples=20, workers=0,
        output=tmp_path,
    )  # fmt: skip


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Three classes of images that lie on a disk, so that training keeps them decoded, too."""
    for i in range(48):
        (tmp_path / "jpegs" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20 + i % 5, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "jpegs" / f"class{i % 3}" / f"{i}.jpg")
    return tmp_path / "jpegs"


def numbers(config: RunConfig, shelf: Shelf | None) -> list[dict[str, float]]:
    record = run(config, progress=RunsProgress(1), shelf=shelf, keep=False)
    timing = ("train_seconds", "images_per_s")
    rows = [{k: v for k, v in row.items() if k not in timing} for row in record["history"]]
    return [*rows, {k: v for k, v in record["metrics"].items() if k in ("test_loss", "test_top1_percent")}]


def test_runs_from_a_shelf_are_bit_for_bit_those_without(config: RunConfig) -> None:
    shelf = Shelf()
    for seed in (0, 1, 0):
        for method in ("nolora", "linear"):
            one = replace(config, seed=seed, method=method)
            assert numbers(one, shelf) == numbers(one, None)


def test_with_and_without_augmentation_share_no_images(config: RunConfig, jpegs: Path) -> None:
    shelf, own = Shelf(), replace(config, dataset=str(jpegs), batch_size=8, val_split=0.3, max_train_samples=None)
    wanted = {no_aug: numbers(replace(own, no_aug=no_aug), None) for no_aug in (False, True)}
    assert wanted[False] != wanted[True]
    for no_aug in (False, True, False, True):
        assert numbers(replace(own, no_aug=no_aug), shelf) == wanted[no_aug]


def test_datasets_and_weights_are_loaded_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    for name in ("load_config_data", "_from_the_file"):
        real = getattr(shelves, name)
        monkeypatch.setattr(shelves, name, lambda *args, real=real, name=name: (loads.append(name), real(*args))[1])
    shelf = Shelf()
    for method in ("nolora", "lora", "full"):
        numbers(replace(config, method=method), shelf)
    assert loads == ["load_config_data", "_from_the_file"]
    numbers(replace(config, seed=1), shelf)  # another draw of the training images
    assert loads == ["load_config_data", "_from_the_file", "load_config_data"]


def test_no_more_datasets_are_kept_than_so_many(config: RunConfig) -> None:
    shelf = Shelf()
    for seed in range(shelves.MOST_DATASETS + 2):
        shelf.data(replace(config, seed=seed))
    assert len(shelf._data) == shelves.MOST_DATASETS
    first = shelf.data(replace(config, seed=5))
    assert shelf.data(replace(config, seed=5)) is first


def test_decoded_images_are_kept_for_the_next_run(config: RunConfig) -> None:
    shelf = Shelf()
    numbers(config, shelf)
    (caches,) = shelf._caches.values()
    assert sorted(cache.kept for cache in caches.values()) == [20, 20]  # digits are decoded already: only evaluation's
    numbers(config, shelf)
    assert len(caches) == 2


def test_splits_of_as_many_images_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Where validation and test are splits of their own and of one size, as those of EuroSAT, their rows are equal."""
    for part, count in (("train", 6), ("val", 4), ("test", 4)):
        for i in range(count):
            (tmp_path / part / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            colour = {"train": "red", "val": "green", "test": "blue"}[part]
            Image.new("RGB", (9, 9), colour).save(tmp_path / part / f"class{i % 2}" / f"{i}.png")
    config, shelf = RunConfig(dataset=str(tmp_path), batch_size=4, workers=0, cache_images=1), Shelf()
    data = shelf.data(config)
    assert data.val.rows.tobytes() == data.test.rows.tobytes()
    _, *plain = run_loaders(config, PREPROCESSING, data)
    _, *shared = run_loaders(config, PREPROCESSING, data, shelf.cache_for)
    assert len(list(shared[0])) == 1  # validation first, as in a run
    for a, b in zip(plain, shared, strict=True):
        assert torch.equal(next(iter(a))[0], next(iter(b))[0])


def test_a_run_that_chooses_does_not_look_at_the_test(config: RunConfig) -> None:
    record = run(config, progress=RunsProgress(1), score_test=False)
    assert not any(name.startswith("test") for name in record["metrics"]) and record["folder"] is None
    assert [path.name for path in config.output.iterdir()] == ["weights.safetensors"]
