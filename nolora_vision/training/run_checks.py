"""What is wrong with a RunConfig beyond the kinds of its fields: names, and fields that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from nolora_vision.adapters.model_kwargs import REFUSED_KWARGS
from nolora_vision.config import Problem, shown
from nolora_vision.methods.catalogue import METHODS, method_problems
from nolora_vision.methods.limits import setting_problems
from nolora_vision.training.timm_names import has_weights, model_problem, optimizer_problem, policy_problem

if TYPE_CHECKING:
    from nolora_vision.training.run_config import RunConfig

MODULATED_METHODS = ("nolora", "lora", "aurora")
"""Methods whose adapters take modulation_noise."""
DROPOUT_KWARGS = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
"""timm's arguments that make a model in training noisy."""
LONGEST_NAME = 200
"""Bytes of a folder's name: file systems take 255, and a number may come behind it."""


def problems_of(config: RunConfig) -> Iterator[Problem]:
    """A sentence for each."""
    yield from _method_problems(config)
    yield from _timm_problems(config)
    yield from _weight_problems(config)
    yield from _schedule_problems(config)
    yield from _split_problems(config)
    yield from _source_problems(config)
    yield from _augmentation_problems(config)
    yield from _consistency_problems(config)
    yield from _mode_problems(config)


def is_file_name(name: str) -> bool:
    """Whether a name stays in its folder, on any system, and is not hidden there."""
    plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")
    return plain and bool(name.strip()) and len(name.encode()) <= LONGEST_NAME


def _usual(config: RunConfig, name: str) -> Any:
    """The default of a field."""
    return next(field.default for field in fields(config) if field.name == name)


def _idle(config: RunConfig, names: Sequence[str], used: bool, by: str, *others: str) -> Iterator[Problem]:
    """Fields that were given and do nothing.

    Args:
        used: whether what uses them is on.
        by: what does.
    """
    for name in names:
        if not used and (value := getattr(config, name)) != _usual(config, name):
            text = f"{name} ({shown(value)}) is for {by}, which is not on: turn that on, or leave {name} out."
            yield Problem(text, name, *others)


def _method_problems(config: RunConfig) -> Iterator[Problem]:
    for text in method_problems(config.method, config.method_options):
        yield Problem(text, *(("method", "method_options") if text.startswith("method_options") else ("method",)))
    if config.method in METHODS and METHODS[config.method].group != "ours":
        for name, text in setting_problems(config.method, config.adapter):
            yield Problem(text, "method", f"adapter.{name}")
    only_lr = config.lr not in (None, METHODS["linear"].lr) and config.head_lr == _usual(config, "head_lr")
    if config.method == "linear" and only_lr:
        text = f"linear trains the classifier alone, at head_lr, so lr {config.lr:g} does nothing: give head_lr."
        yield Problem(text, "lr", "head_lr", "method")


def _timm_problems(config: RunConfig) -> Iterator[Problem]:
    if text := model_problem(config.model):
        yield Problem(f"model: {text}", "model")
    if text := optimizer_problem(config.opt):
        yield Problem(text, "opt")
    if config.aa is not None and (text := policy_problem(config.aa)):
        yield Problem(text, "aa")


def _weight_problems(config: RunConfig) -> Iterator[Problem]:
    path = config.pretrained_path
    if path is not None and path.suffix != ".safetensors":
        yield Problem(f"pretrained_path must be a .safetensors file, got {shown(str(path))}.", "pretrained_path")
    if path is not None and not config.pretrained:
        text = "pretrained_path names weights to start from, and pretrained is off, which takes none: give one of them."
        yield Problem(text, "pretrained_path", "pretrained")
    if config.pretrained and path is None and not model_problem(config.model) and not has_weights(config.model):
        yield Problem(
            f"model: timm has no weights of {config.model}: give some by pretrained_path, or turn pretrained off.",
            *("model", "pretrained", "pretrained_path"),
        )
    for name in config.model_kwargs:
        if name in REFUSED_KWARGS or name.startswith("pretrained") or name in ("img_size", "in_chans"):
            text = f"model_kwargs can't say {name}: it has a field of its own, or follows from images and weights."
            yield Problem(text, "model_kwargs")
    if config.drop_path and "drop_path_rate" in config.model_kwargs:
        text = "drop_path and drop_path_rate in model_kwargs are the same: give one of them."
        yield Problem(text, "drop_path", "model_kwargs")


def _schedule_problems(config: RunConfig) -> Iterator[Problem]:
    if config.warmup_epochs > config.epochs:
        text = f"warmup_epochs ({config.warmup_epochs:g}) is longer than epochs ({config.epochs})."
        yield Problem(text, "warmup_epochs", "epochs")
    if config.sched == "step" and config.min_lr:
        yield Problem(f"min_lr ({config.min_lr:g}) does nothing for sched step: leave it out.", "min_lr", "sched")
    yield from _idle(config, ("decay_epochs", "decay_rate"), config.sched == "step", "sched step", "sched")
    yield from _idle(config, ("model_ema_decay", "model_ema_warmup"), config.model_ema, "model_ema", "model_ema")
    own = METHODS[config.method].lr if config.method in METHODS else None
    lr = own if config.lr is None else config.lr
    for name, rate in (("lr", lr), ("head_lr", lr if config.head_lr is None else config.head_lr)):
        if rate is not None and config.min_lr > rate:
            text = f"min_lr ({config.min_lr:g}), the rate at the end, is above the peak {name} ({rate:g})."
            yield Problem(text, "min_lr", name, *(("lr", "method") if name == "head_lr" else ("method",)))


def _split_problems(config: RunConfig) -> Iterator[Problem]:
    draws = [name for name in ("max_train_samples", "shots", "train_fraction") if getattr(config, name) is not None]
    if len(draws) > 1:
        yield Problem(f"{' and '.join(draws)} each choose the training images: give one of them.", *draws)
    if config.max_eval_samples is not None:
        draws.append("max_eval_samples")
    if config.val_split != _usual(config, "val_split"):
        draws.append("val_split")
    if config.splits is not None and draws:
        text = f"splits says which images to take, so {' and '.join(draws)} can't: give --splits or that."
        yield Problem(text, "splits", *draws)
    if config.train_on == "train_val" and config.keep_epoch == "best" and not config.eval_only:
        text = "train_on train_val trains on the validation images, so they can't choose an epoch: set keep_epoch last."
        yield Problem(text, "train_on", "keep_epoch", "eval_only")


def _source_problems(config: RunConfig) -> Iterator[Problem]:
    """What a dataset whose kind its name says has no use for."""
    name = config.dataset
    if config.image_key is not None and config.image_key == config.label_key:
        text = f"image_key and label_key are the same column, {shown(config.image_key)}: give each its own."
        yield Problem(text, "image_key", "label_key")
    if not name.startswith(("digits:", "vtab:")) and name != "digits" and not name.endswith(".safetensors"):
        return
    for field in ("image_key", "label_key", "revision"):
        if getattr(config, field) is not None:
            yield Problem(f"{field} does nothing for dataset {shown(name)}: leave it out.", field, "dataset")


def _augmentation_problems(config: RunConfig) -> Iterator[Problem]:
    asked = [name for name in ("aa", "reprob") if getattr(config, name)]
    if config.no_aug and asked:  # scale and hflip have defaults, so nobody need have asked for them
        text = f"no_aug leaves training images alone, so {' and '.join(asked)} can't change them: give one of them."
        yield Problem(text, "no_aug", *asked)
    if config.scale[0] > config.scale[1]:
        yield Problem(f"scale must be (smallest, largest), got {config.scale}.", "scale")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        text = f"mixup and cutmix need an even batch_size, got {config.batch_size}."
        yield Problem(text, "batch_size", "mixup", "cutmix")


def _consistency_problems(config: RunConfig) -> Iterator[Problem]:
    mode, method = config.consistency_in_use, config.method
    for field, use in (("consistency_fraction", "part"), ("consistency_every", "every")):
        yield from _idle(config, (field,), mode == use, f"consistency_mode {use}", "consistency_mode")
    if mode is None:
        return
    if mode == "previous" and config.epochs == 1:
        text = "consistency_mode previous compares with the epoch before, and epochs is 1: take more, or another mode."
        yield Problem(text, "consistency_mode", "epochs")
    about = ("consistency" if config.consistency_mode is None else "consistency_mode", "method")
    if mode == "previous" and not config.no_aug:  # each epoch looks at another crop of the image
        same = False
    elif method in MODULATED_METHODS:
        same = not config.adapter.modulation_noise
    else:
        same = not (config.drop_path or any(config.model_kwargs.get(name) for name in DROPOUT_KWARGS))
    if same and method in MODULATED_METHODS:
        yield Problem(
            f"consistency of {method} needs noise on v, or both looks are the same: set adapter.modulation_noise, 0.5 "
            f"for example.",
            *(*about, "adapter.modulation_noise", "no_aug"),
        )
    if same and method not in MODULATED_METHODS:
        yield Problem(
            f"consistency of {method} needs another source of noise, as it has no v, or both looks are the same: set "
            f"drop_path, or drop_rate in model_kwargs, or leave consistency off.",
            *(*about, "drop_path", "model_kwargs", "no_aug"),
        )
    if mode == "previous" and (config.mixup or config.cutmix):
        yield Problem(
            "consistency_mode previous does not go with mixup or cutmix, which mix an image with another one in each "
            "epoch. Turn them off, or take twice, part or every, whose copies share the mix.",
            *("consistency_mode", "mixup", "cutmix"),
        )


def _mode_problems(config: RunConfig) -> Iterator[Problem]:
    if config.eval_only and config.adapter_dir is None:
        yield Problem("eval_only needs the adapter to test: --adapter DIR.", "eval_only", "adapter_dir")
    if config.adapter_dir is not None and not config.eval_only:
        text = "--adapter DIR is for --eval-only; without it a fresh adapter is trained."
        yield Problem(text, "adapter_dir", "eval_only")
    if config.experiment is not None and not is_file_name(config.experiment):
        yield Problem(
            f"experiment must be the name of a folder within output, got {shown(config.experiment)}. Give a plain name "
            f"of at most {LONGEST_NAME} bytes, and the place by --output.",
            "experiment",
        )
    if config.resume_changed and config.resume is None:
        text = "resume_changed is for --resume, which is not given: give it, or leave resume_changed out."
        yield Problem(text, "resume_changed", "resume")
    if config.resume is not None and config.eval_only:
        text = "resume goes on with training, and eval_only has none: give one of them."
        yield Problem(text, "resume", "eval_only")
