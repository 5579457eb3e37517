"""From a RunConfig to what a run is made of: data, model, loaders, schedule, mixup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from nolora_vision.training.backbone import build_model, data_config
from nolora_vision.training.consistency import Every, Objective, Plain, Previous, Twice
from nolora_vision.training.data import ImageData, MakeCache, Split, cache_need, load_data, make_loader
from nolora_vision.training.errors import RunError
from nolora_vision.training.image_cache import ImageCache, cache_budget
from nolora_vision.training.run_config import RunConfig

SUBSET_FIELDS = (
    *("seed", "val_split", "max_train_samples", "max_eval_samples", "shots", "train_fraction", "train_on", "splits"),
    *("image_key", "label_key", "revision", "test_split", "vtab_root", "on_bad_image", "check_shared"),
)
DATA_FIELDS = ("dataset", *SUBSET_FIELDS)
"""Fields of RunConfig that decide which images a run sees."""
MODEL_OPTIONS = ("pretrained_path", "img_size", "drop_path", "grad_checkpointing", "model_kwargs")
MODEL_FIELDS = ("model", *MODEL_OPTIONS)
"""Fields of RunConfig that decide which model it starts from, seed and `pretrained` apart."""


def load_config_data(config: RunConfig) -> ImageData:
    """The dataset that the config names, split."""
    return load_data(config.dataset, **{name: getattr(config, name) for name in SUBSET_FIELDS})


def build_config_model(config: RunConfig, num_classes: int, *, pretrained: bool | None = None) -> nn.Module:
    """The timm model that the config names, with a fresh classifier.

    Args:
        pretrained: instead of the config's.
    """
    options = {name: getattr(config, name) for name in MODEL_OPTIONS}
    if pretrained is False:
        options["pretrained_path"] = None
    wanted = config.pretrained if pretrained is None else pretrained
    return build_model(config.model, num_classes, pretrained=wanted, **options)


def compute_options(config: RunConfig) -> dict[str, str]:
    """What `set_compute` is told."""
    return {name: getattr(config, name) for name in ("amp_dtype", "frozen_dtype", "fused_attn")}


def preprocessing(config: RunConfig, model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """What happens to images before the model: as the config says, or else as is known, or else as timm has it.

    Args:
        known: crop_pct and crop_mode, as far as the dataset or a saved adapter has its own; of an adapter also
            interpolation, mean and std.
    """
    crop_pct, crop_mode = config.crop_pct or known.get("crop_pct"), config.crop_mode or known.get("crop_mode")
    own = {name: known[name] for name in ("interpolation", "mean", "std") if name in known}
    return {**data_config(model, config.img_size, crop_pct, crop_mode), **own}


def loader(
    config: RunConfig,
    images: Mapping[str, Any],
    split: Split,
    *,
    training: bool,
    cache_bytes: int = 0,
    make_cache: MakeCache = ImageCache,
) -> Any:
    """Batches of one split, as the model wants its images."""
    augmentation = {"scale": config.scale, "hflip": config.hflip, "auto_augment": config.aa, "re_prob": config.reprob}
    return make_loader(
        split,
        images,
        batch_size=config.batch_size,
        training=training,
        no_aug=config.no_aug,
        workers=config.workers,
        seed=config.seed,
        augmentation={**augmentation, "color_jitter": None} if training and not config.no_aug else None,
        cache_bytes=cache_bytes,
        make_cache=make_cache,
        with_rows=training and config.consistency_in_use == "previous",
    )


def run_loaders(
    config: RunConfig,
    images: Mapping[str, Any],
    data: ImageData,
    cache_for: Callable[[RunConfig, Split, Mapping[str, Any]], MakeCache] | None = None,
) -> tuple[Any, Any, Any]:
    """Batches to train on, to validate on and to test; what is looked at again is kept decoded, as there is room.

    Args:
        images: what `preprocessing` gives.
        cache_for: a shelf's, where further runs will look at the same images.
    """
    again = config.epochs > 1 or cache_for is not None
    budget = cache_budget(config.cache_images) if again else 0
    room, loaders = budget // 2, []
    for split, repeated in ((data.val, again), (data.test, cache_for is not None)):
        taken = int(min(room, cache_need(split, images["input_size"], augmented=False))) if repeated else 0
        cache = cache_for(config, split, images) if cache_for else ImageCache
        loaders.append(loader(config, images, split, training=False, cache_bytes=taken, make_cache=cache))
        room, budget = room - taken, budget - taken
    kept_after = images if config.no_aug else {}  # augmented ones are kept as they are decoded
    cache = cache_for(config, data.train, kept_after) if cache_for else ImageCache
    train = loader(config, images, data.train, training=True, cache_bytes=budget, make_cache=cache)
    return train, *loaders


def refuse_few_images(config: RunConfig, images: int, processes: int) -> None:
    """Refuse to train on fewer images than a step takes, where that cannot be one smaller batch.

    Raises:
        RunError: if several processes would have to share it, or it cannot be mixed with itself.
    """
    if images < processes * config.batch_size and processes > 1:
        fits = f"Choose --batch-size {images // processes}, or" if images >= processes else "Choose"
        raise RunError(
            f"A step takes {config.batch_size} images in each of {processes} processes, and there are {images} to "
            f"train on. {fits} fewer processes."
        )
    if (config.mixup or config.cutmix) and images < config.batch_size and images % 2:
        raise RunError(
            f"The {images} training images make one batch, and mixup and cutmix mix an even number. Choose "
            f"--batch-size {max(2, images - 1)}, which leaves one out in each epoch."
        )


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, *, batches: int) -> Any:
    """timm's schedule over optimizer steps.

    Args:
        batches: per epoch and process.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=0.0,
        min_lr=config.min_lr,
        decay_epochs=config.epochs / 3 if config.decay_epochs is None else config.decay_epochs,
        decay_rate=1.0 if config.sched == "poly" else config.decay_rate,  # there timm takes it for the power
        step_on_epochs=False,
        updates_per_epoch=max(1, -(-batches // config.grad_accum_steps)),
    )
    return scheduler


def mixup_of(config: RunConfig, num_classes: int) -> Any | None:
    """timm's Mixup and CutMix, or None where both are off."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes
    )


def objective_of(config: RunConfig, *, images: int, gather: Callable[[Tensor], Any]) -> Objective:
    """What a training step minimises.

    Args:
        images: of the training split.
        gather: accelerate's: a tensor of this process → those of all.
    """
    mixes = config.mixup or config.cutmix
    loss = SoftTargetCrossEntropy() if mixes else nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    plain, twice = Plain(loss), Twice(loss, config.consistency)
    if config.consistency_in_use == "previous":
        return Previous(loss, config.consistency, images=images, gather=gather)
    if config.consistency_in_use == "every":
        return Every(config.consistency_every, twice, plain)
    if config.consistency_in_use == "part":
        return Twice(loss, config.consistency, share=config.consistency_fraction)
    return plain if config.consistency_in_use is None else twice
