"""The image cache changes no batch, keeps to its bound, and is one for all processes."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from nolora_vision.training import image_cache
from nolora_vision.training.data import ImageData, fixed_and_random, load_data, make_loader
from nolora_vision.training.image_cache import ImageCache, cache_budget
from nolora_vision.training.ingredients import loader as make_train_loader
from nolora_vision.training.ingredients import run_loaders
from nolora_vision.training.order import start_epoch
from nolora_vision.training.run_config import RunConfig

PREPROCESSING = {
    "input_size": (3, 32, 32),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
AUGMENTATION = {"scale": (0.3, 1.0), "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}


def noise(i: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> ImageData:
    """20 JPEG files of different sizes for each of two classes."""
    for i in range(40):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        noise(i, (40 + i, 70 - i)).save(tmp_path / f"class{i % 2}" / f"{i}.jpg")
    return load_data(str(tmp_path), val_split=0.5)


def batches(loader: Any, epochs: int = 3) -> list[torch.Tensor]:
    found = []
    for epoch in range(epochs):
        start_epoch(loader, epoch)
        found += [images for images, _ in loader]
    return found


def loader_of(data: ImageData, *, training: bool, cache_bytes: int, workers: int = 0, no_aug: bool = False) -> Any:
    return make_loader(
        data.train,
        PREPROCESSING,
        batch_size=8,
        training=training,
        no_aug=no_aug,
        workers=workers,
        seed=3,
        augmentation=AUGMENTATION if training and not no_aug else None,
        cache_bytes=cache_bytes,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "kind",
    [{"training": True}, {"training": True, "no_aug": True}, {"training": False}],
    ids=["training", "no_aug", "evaluation"],
)
@pytest.mark.parametrize("cache_bytes", [10**6, 20000], ids=["all", "some"])
def test_batches_are_bit_identical(photos: ImageData, kind: dict, workers: int, cache_bytes: int) -> None:
    plain = batches(loader_of(photos, **kind, cache_bytes=0, workers=workers))
    loader = loader_of(photos, **kind, cache_bytes=cache_bytes, workers=workers)
    cached, cache = batches(loader), loader.dataset.cache
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    assert (cache.kept == len(photos.train)) == (cache_bytes == 10**6) and cache.kept > 0
    assert cache.bytes_used <= cache_bytes


def test_an_image_is_decoded_once_for_all_epochs_and_workers(photos: ImageData) -> None:
    loader = loader_of(photos, training=True, cache_bytes=10**6, workers=2)
    first = batches(loader, 1)
    for file in Path(photos.train.table.image.args[0][0]).parents[1].rglob("*.jpg"):  # type: ignore[attr-defined]
        file.unlink()  # whoever decodes again now fails
    assert len(batches(loader, 2)) == 2 * len(first)


def test_spawned_workers_share_it(photos: ImageData) -> None:
    loader = loader_of(photos, training=False, cache_bytes=10**6, workers=1)
    loader.multiprocessing_context = "spawn"
    images = batches(loader, 1)
    assert loader.dataset.cache.kept == len(photos.train)  # seen from here, put there from there
    plain = batches(loader_of(photos, training=False, cache_bytes=0), 1)
    assert all(torch.equal(a, b) for a, b in zip(images, plain, strict=True))


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_without_augmentation_training_sees_what_evaluation_sees(
    photos: ImageData, crop_mode: str, cache_bytes: int
) -> None:
    """In another order, in every epoch."""
    config = RunConfig(no_aug=True, workers=0, batch_size=4, scale=(0.1, 0.2), hflip=1.0)
    images = {**PREPROCESSING, "crop_mode": crop_mode}
    transform = create_transform(**images, is_training=False)
    wanted = sorted(transform(photos.train.table.image(int(row))).numpy().tobytes() for row in photos.train.rows)
    train = make_train_loader(config, images, photos.train, training=True, cache_bytes=cache_bytes)
    epochs = []
    for epoch in range(2):
        start_epoch(train, epoch)
        epochs.append([image.numpy().tobytes() for batch, _ in train for image in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted and epochs[0] != epochs[1]


def test_training_keeps_whole_images_and_evaluation_small_ones(photos: ImageData) -> None:
    loader = loader_of(photos, training=True, cache_bytes=10**6)
    batches(loader, 1)
    sizes = {photos.train.table.image(int(row)).size for row in photos.train.rows}
    kept = {loader.dataset.cache.image(i, pytest.fail).size for i in range(len(photos.train))}
    assert kept == sizes and len(sizes) > 1
    loader = loader_of(photos, training=False, cache_bytes=10**6)
    batches(loader, 1)
    assert loader.dataset.cache.capacity == loader.dataset.cache.bytes_used == len(photos.train) * 3 * 32 * 32
    loader = loader_of(photos, training=True, no_aug=True, cache_bytes=10**6)
    batches(loader, 1)
    assert loader.dataset.cache.capacity == loader.dataset.cache.bytes_used == len(photos.train) * 3 * 32 * 32


def test_what_has_no_room_is_made_again_and_changes_of_a_kept_image_stay_with_the_caller() -> None:
    cache, made = ImageCache(3, 2 * 3 * 40 * 30), []

    def make(i: int) -> Callable[[], Image.Image]:
        return lambda: made.append(i) or noise(i)

    for _ in range(2):
        for i in range(3):
            image = cache.image(i, make(i))
            assert np.array_equal(np.asarray(image), np.asarray(noise(i)))
            image.paste("white", (0, 0, 9, 9))
    assert made == [0, 1, 2, 2] and cache.kept == 2 and cache.bytes_used == cache.capacity


def test_greys_are_not_kept_as_something_else() -> None:
    cache = ImageCache(1, 10000)
    assert cache.image(0, lambda: Image.new("L", (4, 4))).mode == "L" and cache.kept == 0


def _fill(cache: ImageCache, start: int) -> None:
    for i in [*range(start, 60), *range(start)]:
        image = cache.image(i, lambda i=i: noise(i))
        assert image.tobytes() == noise(i).tobytes()


def test_processes_that_fill_it_at_once_see_whole_images() -> None:
    cache = ImageCache(60, 2 * 60 * 3600)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(cache, start)) for start in (0, 0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and cache.kept == 60
    _fill(cache, 0)


def test_it_is_only_pickled_for_a_worker_and_its_memory_goes_with_it() -> None:
    import pickle

    cache = ImageCache(1, 100)
    with pytest.raises(RuntimeError, match="should only be shared between processes through inheritance"):
        pickle.dumps(cache)
    fd = cache._fd
    del cache
    with pytest.raises(OSError):
        os.fstat(fd)


def test_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_budget("none") == 0 and cache_budget(3) == 3 * 2**20
    monkeypatch.setattr(image_cache, "CGROUP", tmp_path)
    alone = image_cache.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert image_cache.free_memory() > alone / 2
    (tmp_path / "memory.max").write_text("1005\n")
    assert image_cache.free_memory() == 1000 and cache_budget("auto") == 250
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cache_budget("auto") == 125


def test_a_run_keeps_only_what_it_sees_again(photos: ImageData) -> None:
    def capacities(data: ImageData, **options: Any) -> list[int]:
        config = RunConfig(workers=0, **options)
        caches = [loader.dataset.cache for loader in run_loaders(config, PREPROCESSING, data)]
        return [0 if cache is None else cache.capacity for cache in caches]

    val = len(photos.val) * 3 * 32 * 32
    assert capacities(photos, cache_images=1) == [2**20 - val, val, 0]
    assert capacities(photos, cache_images=1, epochs=1) == capacities(photos, cache_images="none") == [0, 0, 0]
    digits = load_data("digits", max_eval_samples=10)
    assert capacities(digits, cache_images=1) == [0, 10 * 3 * 32 * 32, 0]  # digits lie decoded in memory already


def test_both_halves_of_a_transform_are_the_whole() -> None:
    for augmented, first in ((True, 0), (False, 2)):
        transform = create_transform((3, 32, 32), is_training=augmented)
        before, after = fixed_and_random(transform, augmented=augmented)
        assert len(before.transforms) == first
        assert before.transforms + after.transforms == transform.transforms
