"""Order and augmentation depend on seed, epoch and image alone."""

import random
from typing import Any

import numpy as np
import torch

from nolora_vision.training.data import ImageData, load_data, make_loader
from nolora_vision.training.engine import make_accelerator
from nolora_vision.training.order import SeededOrder, drawing_from, number_of, start_epoch
from tests.training.preprocessing import preprocessing

PREPROCESSING = preprocessing(16)
AUGMENTATION = {"scale": (0.3, 1.0), "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}


def loader_of(data: ImageData, *, seed: int = 0, workers: int = 0) -> Any:
    options = {"training": True, "workers": workers, "seed": seed, "augmentation": AUGMENTATION}
    return make_loader(data.train, PREPROCESSING, batch_size=10, **options)


def epochs_of(loader: Any, *epochs: int) -> list[torch.Tensor]:
    found = []
    for epoch in epochs:
        start_epoch(loader, epoch)
        found.append(torch.cat([images for images, _ in loader]))
    return found


def test_the_same_batches_whoever_loads_them_and_whatever_was_drawn_before() -> None:
    data = load_data("digits", max_train_samples=40)
    first, second = epochs_of(loader_of(data), 0, 1)
    torch.randn(7), np.random.rand(3), random.random()
    assert torch.equal(torch.stack(epochs_of(loader_of(data, workers=2), 0, 1)), torch.stack([first, second]))
    assert torch.equal(epochs_of(loader_of(data), 1)[0], second)  # as after a stop
    prepared = make_accelerator("none").prepare(loader_of(data))
    assert torch.equal(torch.stack(epochs_of(prepared, 0, 1)), torch.stack([first, second]))
    assert not torch.equal(epochs_of(loader_of(data, seed=1), 0)[0], first)


def test_each_epoch_has_its_own_order_and_augmentation() -> None:
    data = load_data("digits", max_train_samples=40)
    order = SeededOrder(40, seed=3)
    keys = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        keys.append([*order])
    assert [sorted(k) for k in keys] == [[*range(40)], [*range(40, 80)]] and [k - 40 for k in keys[1]] != keys[0]
    images = loader_of(data).dataset
    assert not torch.equal(images[5][0], images[45][0]) and images[5][1] == images[45][1]


def test_loading_leaves_the_random_numbers_of_the_run_alone() -> None:
    data = load_data("digits", max_train_samples=40)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = torch.rand(3), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    epochs_of(loader_of(data), 0)
    assert torch.equal(torch.rand(3), wanted[0]) and (np.random.rand(3).tolist(), random.random()) == wanted[1:]


def test_neighbouring_seeds_draw_unrelated_numbers() -> None:
    drawn = []
    for facts in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)):
        with drawing_from(number_of(*facts)):
            drawn += [torch.rand(1).item(), np.random.rand(), random.random()]
    assert len(set(drawn)) == 12
