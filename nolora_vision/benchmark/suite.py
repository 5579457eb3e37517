"""`python -m nolora_vision.benchmark.suite`: writes configs/suite and configs/vtab, recipes for the papers' tables.

What a header expects comes from `published`, so that no number is copied by hand. The backbones are those of the
published rows: google's original ImageNet-21k weights. The code of VPT, NOAH and Convpass, whose protocol VTAB-1k's
recipes follow, links to imagenet21k/ViT-B_16.npz, which timm has as orig_in21k and not as augreg_in21k. Their code
trains in fp32 without clipping, and FacT's normalises images by ImageNet's colours; here it is bfloat16, gradients are
clipped as everywhere in this project, and images are normalised as timm says for the weights.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from nolora_vision.benchmark.published import EIGHT_SETS, SUITE, VTAB
from nolora_vision.config import AdapterConfig
from nolora_vision.training.config_file import dump_differences
from nolora_vision.training.registry import REGISTRY
from nolora_vision.training.run_config import RunConfig

MODELS: Mapping[str, str] = {
    "vit_base": "vit_base_patch16_224.orig_in21k",
    "vit_large": "vit_large_patch16_224.orig_in21k",
}
"""The suite's backbones, by their folder in configs/suite."""
TITLES: Mapping[str, str] = {"vit_base": "ViT-B/16", "vit_large": "ViT-L/16"}
PUBLISHED_MODEL = "vit_base"
"""The backbone of the published rows."""
SHORT_NAMES: Mapping[str, str] = {known.id: name for name, known in REGISTRY.items()}
SETS: Mapping[str, str] = {SHORT_NAMES[identifier]: title for title, identifier in EIGHT_SETS.items()}
"""Titles of the eight sets by their short names."""
WIDTH = 118


@dataclass(frozen=True)
class Recipe:
    """How a method is run."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What the header says of the adapters."""
    published: tuple[str, ...] = ()
    """Names of the published rows of this method."""


Q_AND_V = AdapterConfig(rank=16, targets=("q", "v"))
WHOLE_QKV = replace(Q_AND_V, targets=("qkv",))
NOT_A_PART = "PEFT's layers cannot run on q and v alone of a fused qkv."
SUITE_RECIPES: Mapping[str, Recipe] = {
    "linear": Recipe(published=("linear probe",)),
    "full": Recipe(published=("full", "full, re-tuned")),
    "lora": Recipe(Q_AND_V, note="Rank 16 on q and v.", published=("LoRA r16", "LoRA r16, re-tuned")),
    "dora": Recipe(WHOLE_QKV, note=f"Rank 16 on the whole qkv: {NOT_A_PART}"),
    "pissa": Recipe(WHOLE_QKV, note=f"Rank 16 on the whole qkv: {NOT_A_PART}"),
    "peanut": Recipe(WHOLE_QKV, note=f"Rank 16 on the whole qkv: {NOT_A_PART}"),
    "fourierft": Recipe(
        AdapterConfig(targets=("qkv",)),
        {"n_frequency": 20_000},
        f"20,000 frequencies on the whole qkv: {NOT_A_PART} In ViT-B these are the published row's 0.24 million.",
        ("FourierFT",),
    ),
    "aurora": Recipe(
        replace(Q_AND_V, rank=2, alpha=4),
        note="Rank 2 and alpha 4 on q and v, as in its paper.",
        published=("AuroRA r2",),
    ),
    "nolora": Recipe(Q_AND_V, note="Rank 16 on q and v."),
}
"""By method: rank 16 on q and v, as in the published row of LoRA, where the method can."""
VTAB_Q_AND_V = replace(Q_AND_V, rank=8)
VTAB_RECIPES: Mapping[str, Recipe] = {
    "linear": Recipe(published=("linear probe",)),
    "full": Recipe(published=("full",)),
    "lora": Recipe(VTAB_Q_AND_V, note="Rank 8 on q and v.", published=("LoRA-8",)),
    "adaptformer": Recipe(note="A bottleneck of 8 beside each MLP.", published=("AdaptFormer-8",)),
    "nolora": Recipe(VTAB_Q_AND_V, note="Rank 8 on q and v."),
}
VTAB_PROTOCOL: Mapping[str, Any] = {
    "model": MODELS[PUBLISHED_MODEL],
    "dataset": "vtab:cifar",
    "epochs": 100,
    "lr": 1e-3,
    "head_lr": 1e-3,
    "warmup_epochs": 10,
    "keep_epoch": "last",
    "validate_every": 0,  # its score would be of images that are trained on
    "no_aug": True,
    "train_on": "train_val",
    "amp_dtype": "bfloat16",
}
"""A final run: 1,000 images without augmentation, the last epoch is tested."""
OWN_RATE = ("linear", "full")
"""Methods that do not take the protocol's rate of adapters: one has no use for it, the other starts from its own."""
NOT_TIMED = "Time and device: not measured; a GPU is needed in practice."
NONE_COLLECTED = (
    "not measured by this project; no published number was collected (nolora_vision/benchmark/published.py)."
)


def main(folder: Annotated[Path, tyro.conf.Positional] = Path("configs"), /) -> int:
    """Write the recipes of the papers' suite and of VTAB-1k.

    Args:
        folder: Where suite/ and vtab/ go; what else lies there is left alone.
    """
    written = recipes()
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}: {len(written)} recipes in suite/ and vtab/")
    return 0


def recipes() -> dict[str, str]:
    """The text of every recipe by its path in configs/."""
    found = {}
    for (folder, dataset, method), config in suite_configs().items():
        path = f"suite/{folder}/{dataset}_{method}.yaml"
        found[path] = _suite_header(path, folder, config) + _fields(config)
    for method, config in vtab_configs().items():
        path = f"vtab/{method}.yaml"
        found[path] = _vtab_header(path, config) + _fields(config)
    return found


def suite_configs() -> dict[tuple[str, str, str], RunConfig]:
    """Every run of the suite by the folder of its model, its dataset and its method."""
    return {
        (folder, dataset, method): RunConfig(
            model=model,
            dataset=dataset,
            method=method,
            method_options=dict(recipe.options),
            adapter=recipe.adapter,
            amp_dtype="bfloat16",
        )
        for folder, model in MODELS.items()
        for dataset in SETS
        for method, recipe in SUITE_RECIPES.items()
    }


def vtab_configs() -> dict[str, RunConfig]:
    """The run of each method on one of VTAB-1k's tasks; the command line names another one."""
    configs = {m: RunConfig(method=m, adapter=recipe.adapter, **VTAB_PROTOCOL) for m, recipe in VTAB_RECIPES.items()}
    return {m: replace(config, lr=None) if m in OWN_RATE else config for m, config in configs.items()}


def _fields(config: RunConfig) -> str:
    return dump_differences(config, also=("model", "dataset", "method"))


def _suite_header(path: str, folder: str, config: RunConfig) -> str:
    recipe, title = SUITE_RECIPES[config.method], SETS[config.dataset]
    return _comment(
        f"{title}, one of the papers' eight sets, by {config.method}: {TITLES[folder]} of ImageNet-21k. {recipe.note}",
        f"  python train.py -c configs/{path}",
        f"Recipe: {_recipe(config)} The rates are places to start from, not tuned: "
        f"configs/sweeps/suite_{folder}.yaml chooses them by validation.",
        f"Expected: {_suite_scores(recipe, title) if folder == PUBLISHED_MODEL else NONE_COLLECTED} {NOT_TIMED}",
    )


def _suite_scores(recipe: Recipe, title: str) -> str:
    column, scores = list(EIGHT_SETS).index(title), []
    for row in SUITE:
        value = row.top1_percent[column]
        if row.method in recipe.published and value is not None:
            scores.append(f"{value:g} % ({row.method}; {row.source})")
    if not scores:
        return NONE_COLLECTED
    return f"published, by another recipe, and not measured by this project: {', '.join(scores)}."


def _vtab_header(path: str, config: RunConfig) -> str:
    recipe = VTAB_RECIPES[config.method]
    return _comment(
        f"VTAB-1k by {config.method}: ViT-B/16 of ImageNet-21k, google's original weights, as in the published rows. "
        f"{recipe.note}",
        f"  python train.py -c configs/{path} --dataset vtab:TASK --vtab-root DIR",
        f"Recipe: {_recipe(config)} The first {config.warmup_epochs:g} epochs warm up. Images squashed to 224 px, no "
        f"augmentation. A final run: it trains on all 1,000 images, and its last epoch is tested. The rates are not "
        f"tuned: configs/sweeps/vtab1k.yaml chooses them on the 200 validation images.",
        f"Expected: {_vtab_scores(recipe)} {NOT_TIMED}",
    )


def _vtab_scores(recipe: Recipe) -> str:
    rows = [row for row in VTAB if row.method in recipe.published]
    if not rows:
        return NONE_COLLECTED
    scores = (
        f"{row.mean_of_groups:.1f} % as the mean of the three groups, {row.mean_of_sets:.1f} % as that of the 19 tasks "
        f"({row.method}; {row.source})"
        for row in rows
    )
    return f"published, by other code, and not measured by this project: {', '.join(scores)}."


def _recipe(config: RunConfig) -> str:
    """Epochs, batch and rates, in words."""
    rate = "" if config.method == "linear" else f"lr {config.resolved().lr:g}, "
    return (
        f"{config.epochs} epochs, batch {config.batch_size}, {config.opt}, {rate}head_lr {config.head_lr:g}, "
        f"weight_decay {config.weight_decay:g}."
    )


def _comment(*paragraphs: str) -> str:
    """Each paragraph on lines of its own; those that begin with a space as they are."""
    lines: list[str] = []
    for paragraph in paragraphs:
        wrapped: Sequence[str] = textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False, break_long_words=False)
        lines += [paragraph] if paragraph.startswith(" ") else wrapped
    return "".join(f"# {line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
