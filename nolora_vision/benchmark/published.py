"""Published results that the tables show beside ours, each row with its source; they enter no claim and no average.

The numbers were collected by hand and not compared with the papers again: look there before you cite one. The source of
a row of the suite is the paper that reports it; that of a row of VTAB-1k names the method, which may be another paper's
run. Recipes differ between papers: the same LoRA stands here at 45 and at 78 % on Stanford Cars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nolora_vision.training.vtab import VTAB_TASKS

EIGHT_SETS: Mapping[str, str] = {
    "Pets": "timm/oxford-iiit-pet",
    "Cars": "tanganke/stanford_cars",
    "CIFAR-10": "uoft-cs/cifar10",
    "DTD": "tanganke/dtd",
    "EuroSAT": "timm/eurosat-rgb",
    "FGVC": "mteb/FGVCAircraft",
    "RESISC45": "timm/resisc45",
    "CIFAR-100": "uoft-cs/cifar100",
}
"""The suite's sets in the order of its tables, with their ids on the Hub."""
OTHER_TITLES: Mapping[str, str] = {
    "ethz/food101": "Food-101",
    "dpdl-benchmark/oxford_flowers102": "Flowers-102",
    "AI-Lab-Makerere/beans": "beans",
}


@dataclass(frozen=True)
class SuiteRow:
    """A published row over the eight sets: ViT-B/16 of ImageNet-21k, adapters on q and v, 10 epochs."""

    method: str
    parameters: float | None
    """Without the head; None: not stated, or none."""
    top1_percent: tuple[float | None, ...]
    """In the order of EIGHT_SETS."""
    source: str


@dataclass(frozen=True)
class VtabRow:
    """A published row over VTAB-1k: ViT-B/16 of ImageNet-21k."""

    method: str
    mean_of_groups: float
    mean_of_sets: float
    source: str


FOURIERFT, AURORA, C3A = "FourierFT, arXiv:2405.03003", "AuroRA, arXiv:2505.18738", "C3A, arXiv:2407.19342"
SUITE: tuple[SuiteRow, ...] = (
    SuiteRow("linear probe", None, (90.28, 25.76, 96.41, 69.77, 88.72, 17.44, 74.22, 84.28), FOURIERFT),
    SuiteRow("full", 85.8e6, (93.14, 79.78, 98.92, 77.68, 99.05, 54.84, 96.13, 92.38), FOURIERFT),
    SuiteRow("LoRA r16", 0.58e6, (93.19, 45.38, 98.78, 74.95, 98.44, 25.16, 92.70, 92.02), FOURIERFT),
    SuiteRow("FourierFT", 0.24e6, (93.05, 56.36, 98.69, 77.30, 98.78, 32.44, 94.26, 91.45), FOURIERFT),
    SuiteRow("AuroRA r2", 0.07e6, (93.9, 75.7, 98.8, 79.6, 98.8, 48.2, 93.6, 92.0), AURORA),
    SuiteRow("LoRA r16, re-tuned", 0.59e6, (93.76, 78.04, None, 78.56, 98.84, 56.64, 94.66, None), C3A),
    SuiteRow("full, re-tuned", 85.8e6, (92.82, 85.10, None, 80.11, 99.11, 61.60, 96.00, None), C3A),
)
VTAB: tuple[VtabRow, ...] = (
    VtabRow("full", 69.0, 65.6, "VPT, arXiv:2203.12119"),
    VtabRow("linear probe", 57.6, 52.9, "VPT, arXiv:2203.12119"),
    VtabRow("LoRA-8", 74.6, 72.3, "LoRA, arXiv:2106.09685"),
    VtabRow("AdaptFormer-8", 74.8, 72.3, "AdaptFormer, arXiv:2205.13535"),
    VtabRow("NOAH", 75.5, 73.2, "NOAH, arXiv:2206.04673"),
    VtabRow("SSF", 75.7, 73.1, "SSF, arXiv:2210.08823"),
    VtabRow("RepAdapter", 76.1, 73.8, "RepAdapter, arXiv:2302.08106"),
    VtabRow("Convpass", 76.6, 74.4, "Convpass, arXiv:2207.07039"),
    VtabRow("GLoRA", 78.0, 75.8, "GLoRA, arXiv:2306.07967"),
    VtabRow("PACE", 79.0, 76.9, "PACE, arXiv:2409.17137"),
)


def dataset_title(dataset: str) -> str:
    """A dataset as papers call it; its id where they don't know it."""
    titles = {identifier: title for title, identifier in EIGHT_SETS.items()} | dict(OTHER_TITLES)
    if task := vtab_task(dataset):
        return f"VTAB {task}"
    return titles.get(dataset, dataset)


def vtab_task(dataset: str) -> str | None:
    """The VTAB-1k task of a dataset such as vtab:dtd or …/vtab-1k/dtd; None if it is none."""
    place, _, task = dataset.replace("\\", "/").replace(":", "/").rstrip("/").rpartition("/")
    return task if task in VTAB_TASKS and "vtab" in place.lower() else None
