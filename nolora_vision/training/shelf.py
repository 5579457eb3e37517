"""What several runs of one process share: datasets, pretrained weights, decoded images; the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.training.data import ImageData, Split
from nolora_vision.training.image_cache import ImageCache
from nolora_vision.training.ingredients import DATA_FIELDS, MODEL_FIELDS, build_config_model, load_config_data
from nolora_vision.training.run_config import RunConfig

MOST_DATASETS = 4
"""Kept at a time, with their decoded images; the one that was used longest ago goes first."""


class Shelf:
    """Keeps what runs would load again. A run with it gives bit for bit what it gives without."""

    def __init__(self) -> None:
        self._data: dict[Hashable, ImageData] = {}
        self._caches: dict[Hashable, dict[Hashable, ImageCache]] = {}
        self._weights: dict[Hashable, dict[str, Tensor]] = {}

    def data(self, config: RunConfig) -> ImageData:
        """As `load_config_data`."""
        key = _key(config, DATA_FIELDS)
        found = self._data.pop(key, None) or load_config_data(config)
        self._data[key] = found  # the last one again
        while len(self._data) > MOST_DATASETS:
            oldest = next(iter(self._data))
            del self._data[oldest]
            self._caches.pop(oldest, None)
        return found

    def cache_for(self, config: RunConfig, split: Split, images: Mapping[str, Any]) -> Callable[[int, int], ImageCache]:
        """What makes, or finds again, the cache of a split's images under a preprocessing."""
        caches = self._caches.setdefault(_key(config, DATA_FIELDS), {})
        rest = tuple(sorted((name, str(value)) for name, value in images.items()))

        def make(count: int, capacity: int) -> ImageCache:
            # Two splits of one size have the same rows; their tables stay alive as long as the caches, with the data.
            key = (id(split.table), split.rows.tobytes(), count, rest)
            if key not in caches:
                caches[key] = ImageCache(count, capacity)
            return caches[key]

        return make

    def model(self, config: RunConfig, num_classes: int) -> nn.Module:
        """As `build_config_model`, with the pretrained weights of the last time; what is random is random again."""
        if not config.pretrained:
            return build_config_model(config, num_classes)
        key = (*_key(config, MODEL_FIELDS), num_classes)
        if key not in self._weights:
            self._weights[key] = _from_the_file(config, num_classes)
        model = build_config_model(config, num_classes, pretrained=False)
        model.load_state_dict(self._weights[key], strict=False)
        return model


def _from_the_file(config: RunConfig, num_classes: int) -> dict[str, Tensor]:
    """What the pretrained weights change in a model: all that differs from the same random model without them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loaded = build_config_model(config, num_classes).state_dict()
        torch.manual_seed(0)
        fresh = build_config_model(config, num_classes, pretrained=False).state_dict()
    return {name: value for name, value in loaded.items() if not torch.equal(value, fresh[name])}


def _key(config: RunConfig, names: tuple[str, ...]) -> tuple[Hashable, ...]:
    return tuple(str(getattr(config, name)) for name in names)
