"""Small, untrained members of the timm families that differ in what an adapter must survive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """A timm architecture, made small."""

    name: str
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    bypasses: bool = False
    """Whether its blocks read qkv's weight without calling it, so that the cure is needed."""

    def bare(self) -> nn.Module:
        """The model as timm makes it, on whatever device is the default."""
        return timm.create_model(self.name, num_classes=7, **self.options)

    def build(self) -> nn.Module:
        """The model with 7 classes; zero-initialised norms (Swin V2, LeViT, …) are made to let the blocks through."""
        model = self.bare()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)
        return model

    def images(self, n: int = 1) -> torch.Tensor:
        """(n, 3, size, size)."""
        return torch.randn(n, 3, self.size, self.size)


SMALL = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)}
LEVIT = {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)}
TINY_VIT = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "window_sizes": (4, 4, 4, 2),
}
MAXVIT = {"img_size": 64, "embed_dim": (32, 64, 96, 128), "depths": (1, 1, 1, 1), "stem_width": (16, 32)}
COATNET = {**MAXVIT, "depths": (1, 1, 2, 1)}
EVA = {"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 2}
FAMILIES = {
    "vit": Family("test_vit", 160),
    "swinv2": Family("swinv2_tiny_window8_256", 64, SWIN, bypasses=True),
    "eva02": Family("eva02_tiny_patch14_224", 56, EVA, bypasses=True),
    "eva02_split_qkv": Family("eva02_base_patch14_224", 56, EVA),
    "beit": Family("beit_base_patch16_224", 64, SMALL, bypasses=True),
    "levit": Family("levit_128s", 64, LEVIT),
    "tiny_vit": Family("tiny_vit_5m_224", 64, TINY_VIT),
    "pvt_v2": Family("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "maxvit": Family("maxvit_nano_rw_256", 64, MAXVIT),
}
