"""The datasets that have a short name: where they lie on the Hub, their columns, splits and classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub whose columns and classes are known."""

    id: str
    image: str
    label: str
    num_classes: int
    splits: tuple[str, ...] = ("train", "test")
    """Its splits' names, as its card or paper has them; what a copy really has is what is used and recorded."""
    crop_pct: float | None = None
    """Share of the image that evaluation looks at, where the model's own (often 0.9 or less) would cut objects off."""
    revision: str = "main"
    """Branch, tag or commit that is loaded where none is asked for; the commit found there goes into the record."""


CORRUPTIONS = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter")
"""Altered copies of the test images of Stanford Cars, to be asked for by `--test-split`; downloaded with the others."""
THREE = ("train", "validation", "test")

REGISTRY: Mapping[str, HubDataset] = {
    "cifar10": HubDataset("uoft-cs/cifar10", "img", "label", 10, crop_pct=1.0),
    "cifar100": HubDataset("uoft-cs/cifar100", "img", "fine_label", 100, crop_pct=1.0),
    "pets": HubDataset("timm/oxford-iiit-pet", "image", "label", 37),
    "cars": HubDataset("tanganke/stanford_cars", "image", "label", 196, ("train", "test", *CORRUPTIONS)),
    "dtd": HubDataset("tanganke/dtd", "image", "label", 47),
    "eurosat": HubDataset("timm/eurosat-rgb", "image", "label", 10, THREE),
    "aircraft": HubDataset("mteb/FGVCAircraft", "image", "variant", 100, THREE),  # splits of this mirror not verified
    "resisc45": HubDataset("timm/resisc45", "image", "label", 45, THREE),
    "food101": HubDataset("ethz/food101", "image", "label", 101, ("train", "validation")),
    "flowers102": HubDataset("dpdl-benchmark/oxford_flowers102", "image", "label", 102, THREE),
    "beans": HubDataset("AI-Lab-Makerere/beans", "image", "labels", 3, THREE),
}
"""By the short name that `--dataset` takes; no id loads a script."""
