"""What is wrong with a RunConfig, field by field and field against field: every problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nolora_vision.config import did_you_mean
from nolora_vision.methods.catalogue import method_problems

if TYPE_CHECKING:
    from nolora_vision.training.run_config import RunConfig

CONSISTENCY_MODES = ("twice", "previous", "part", "every")
MODULATED_METHODS = ("nolora", "lora", "aurora")
"""Methods whose adapters take modulation_noise."""
DROPOUT_KWARGS = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
"""timm's arguments that make a model in training noisy."""

_AT_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "grad_accum_steps", "img_size"), 1),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "shots", "checkpoint_steps", "keep_checkpoints"), 1),
    **dict.fromkeys(("lr", "head_lr", "weight_decay", "warmup_epochs", "min_lr", "clip_grad", "mixup", "cutmix"), 0),
    **dict.fromkeys(("workers", "seed", "consistency", "validate_every", "checkpoint_minutes"), 0),
    "consistency_every": 1,
}
_FRACTIONS = ("consistency_fraction", "smoothing", "drop_path", "model_ema_decay", "hflip", "reprob", "val_split")


def problems_of(config: RunConfig) -> Iterator[str]:
    """A sentence for each."""
    yield from method_problems(config.method, config.method_options)
    yield from _range_problems(config)
    yield from _split_problems(config)
    yield from _augmentation_problems(config)
    yield from _consistency_problems(config)
    yield from _other_problems(config)


def _range_problems(config: RunConfig) -> Iterable[str]:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            yield f"{name} must be at least {least}, got {value}."
    for name in _FRACTIONS:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            yield f"{name} must be between 0 and 1, got {value}."
    if isinstance(config.cache_images, int) and config.cache_images < 1:
        yield f"cache_images must be auto, none or at least 1 MiB, got {config.cache_images}."
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        yield f"crop_pct must be in (0, 1], got {config.crop_pct}."
    if config.train_fraction is not None and not 0 < config.train_fraction <= 1:
        yield f"train_fraction must be in (0, 1], got {config.train_fraction}."
    for value in config.scale:
        if not 0 < value <= 1:
            yield f"scale must be fractions of the image in (0, 1], got {value}."


def _split_problems(config: RunConfig) -> Iterable[str]:
    draws = [name for name in ("max_train_samples", "shots", "train_fraction") if getattr(config, name) is not None]
    if len(draws) > 1:
        yield f"{' and '.join(draws)} each choose the training images: give one of them."
    if config.max_eval_samples is not None:
        draws.append("max_eval_samples")
    if config.splits is not None and draws:
        yield f"splits says which images to take, so {' and '.join(draws)} can't: give --splits or that."
    if config.train_on == "train_val" and config.keep_epoch == "best" and not config.eval_only:
        yield "train_on train_val trains on the validation images, so they can't choose an epoch: set keep_epoch last."


def _augmentation_problems(config: RunConfig) -> Iterable[str]:
    asked = [name for name in ("aa", "reprob") if getattr(config, name)]
    if config.no_aug and asked:  # scale and hflip have defaults, so nobody need have asked for them
        yield f"no_aug leaves training images alone, so {' and '.join(asked)} can't change them: give one of them."


def _consistency_problems(config: RunConfig) -> Iterable[str]:
    mode, method = config.consistency_in_use, config.method
    if config.consistency_mode not in (None, *CONSISTENCY_MODES):
        hint = did_you_mean(str(config.consistency_mode), CONSISTENCY_MODES)
        yield f"consistency_mode must be one of {', '.join(CONSISTENCY_MODES)}, got {config.consistency_mode!r}.{hint}"
    if config.consistency_fraction == 0:
        yield "consistency_fraction is 0, so nothing would be looked at twice; leave consistency off instead."
    if mode is None:
        return
    if mode == "previous" and not config.no_aug:  # each epoch looks at another crop of the image
        same = False
    elif method in MODULATED_METHODS:
        same = not config.adapter.modulation_noise
    else:
        same = not (config.drop_path or any(config.model_kwargs.get(name) for name in DROPOUT_KWARGS))
    if same and method in MODULATED_METHODS:
        yield (
            f"consistency of {method} needs noise on v, or both looks are the same: set adapter.modulation_noise, 0.5 "
            f"for example."
        )
    if same and method not in MODULATED_METHODS:
        yield (
            f"consistency of {method} needs another source of noise, as it has no v, or both looks are the same: set "
            f"drop_path, or drop_rate in model_kwargs, or leave consistency off."
        )
    if mode == "previous" and (config.mixup or config.cutmix):
        yield (
            "consistency_mode previous does not go with mixup or cutmix, which mix an image with another one in each "
            "epoch. Turn them off, or take twice, part or every, whose copies share the mix."
        )


def _other_problems(config: RunConfig) -> Iterable[str]:
    if config.eval_only and config.adapter_dir is None:
        yield "eval_only needs the adapter to test: --adapter DIR."
    if config.pretrained_path is not None and config.pretrained_path.suffix != ".safetensors":
        yield f"pretrained_path must be a .safetensors file, got {config.pretrained_path}."
    if config.adapter_dir is not None and not config.eval_only:
        yield "--adapter DIR is for --eval-only; without it a fresh adapter is trained."
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        yield f"mixup and cutmix need an even batch_size, got {config.batch_size}."
    if config.warmup_epochs > config.epochs:
        yield f"warmup_epochs ({config.warmup_epochs:g}) is longer than epochs ({config.epochs})."
    if config.scale[0] > config.scale[1]:
        yield f"scale must be (smallest, largest), got {config.scale}."
    if config.experiment is not None and not _is_file_name(config.experiment):
        yield (
            f"experiment must be the name of a folder within output, got {config.experiment!r}. Give a plain name, and "
            f"the place by --output."
        )
    if config.resume_changed and config.resume is None:
        yield "resume_changed is for --resume, which is not given: give it, or leave resume_changed out."
    if config.resume is not None and config.eval_only:
        yield "resume goes on with training, and eval_only has none: give one of them."


def _is_file_name(name: str) -> bool:
    """Whether a name stays in its folder, on any system, and is not hidden there."""
    return bool(name.strip()) and not name.startswith(".") and not set(name) & set("/\\:\0")
