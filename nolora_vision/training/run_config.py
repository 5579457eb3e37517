"""RunConfig: what a run is told, validated all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ConfigDict

from nolora_vision.config import AdapterConfig, ConfigError
from nolora_vision.methods.catalogue import METHODS, method_problems

Short = tyro.conf.arg


@dataclass(frozen=True)
class RunConfig:
    """Fine-tune and evaluate a pretrained timm model on an image-classification dataset."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str = "vit_base_patch16_224"
    """Name of a timm model, with or without its pretrained tag."""
    dataset: str = "cifar100"
    """cifar10, cifar100, digits (or digits:5-9), a Hugging Face dataset id, or a local folder or file."""
    method: str = "nolora"
    """What trains: nolora, lora, aurora (ours); linear (the classifier), full, bitfit, layernorm; adaptformer; or by
    PEFT peft-lora, rslora, lora-plus, dora, pissa, vera, fourierft, hira, peanut, randlora, c3a, oft, boft, ia3."""
    method_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Options of the method, such as `lr_ratio 16` or `n_frequency 500`; a wrong one is answered with all."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapters of nolora; other methods take of it what they have: layers, rank, alpha, dropout."""
    pretrained: bool = True
    """Start from pretrained weights."""
    pretrained_path: Path | None = None
    """A safetensors file to start from instead of the weights that timm knows."""
    img_size: int | None = None
    """Image height and width in pixels; None takes the pretrained model's own."""
    model_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of the timm model, such as `patch_size 4 depth 6`."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: Annotated[int, Short(aliases=["-b"])] = 64
    """Images per step and process."""
    grad_accum_steps: int = 1
    """Batches whose gradients are averaged into one step."""
    opt: str = "adamw"
    """Optimizer, by its timm name."""
    lr: float | None = None
    """Peak learning rate of the adapters, or of what trains of the backbone; None takes the method's: 2e-3, 1e-3 with
    bitfit and layernorm, 1e-4 with full."""
    head_lr: float | None = 3e-3
    """Peak learning rate of the classifier; None takes lr."""
    weight_decay: float = 1e-4
    """Weight decay of matrices; v, θ, biases and norms have none."""
    sched: str = "cosine"
    """Learning-rate schedule, by its timm name."""
    warmup_epochs: float = 0.5
    """Length of the linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    smoothing: float = 0.0
    """Label smoothing."""
    mixup: float = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: float = 0.0
    """CutMix alpha; 0 is off."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    model_ema: bool = False
    """Also keep a moving average of the trained weights, and evaluate that."""
    model_ema_decay: float = 0.999
    """Decay of that average for each step."""

    scale: tuple[float, float] = (0.5, 1.0)
    """Area of the random crop of training images, as fractions of the image."""
    hflip: float = 0.5
    """Probability of mirroring a training image."""
    aa: str | None = None
    """timm's AutoAugment policy, such as rand-m9-mstd0.5; None is off."""
    reprob: float = 0.0
    """Probability of erasing a random rectangle."""
    crop_pct: float | None = None
    """Share of the image that evaluation looks at; None takes the dataset's (1 for CIFAR) or else the model's own."""
    image_key: str | None = None
    """Column of the images; None finds it."""
    label_key: str | None = None
    """Column of the labels; None finds it."""
    revision: str | None = None
    """Revision of a Hub dataset."""
    val_split: float = 0.1
    """Share of the training images held out where the dataset has no validation split."""
    max_train_samples: int | None = None
    """Train on this many images at most, drawn by the seed."""
    max_eval_samples: int | None = None
    """Validate and test on this many images at most each, drawn by the seed."""

    amp_dtype: Literal["none", "bfloat16", "float16"] = "none"
    """Compute in this type under autocast."""
    frozen_dtype: Literal["auto", "float32"] = "auto"
    """Type of the frozen weights in memory: auto is amp_dtype, which takes half the memory and changes no result, as
    autocast computes in it anyway."""
    fused_attn: Literal["auto", "timm", "never"] = "auto"
    """PyTorch's fused attention: where timm takes it, never, or auto: not for bfloat16 on a processor."""
    torchcompile: bool = False
    """Compile the model."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, for less memory."""
    workers: Annotated[int, Short(aliases=["-j"])] = 2
    """Processes that load images; 0 loads in the main one."""
    cache_images: Literal["auto", "none"] | int = "auto"
    """Keep decoded images in memory for later epochs: none, at most so many MiB in each process, or auto, at most a
    quarter of the memory that is free. The batches are the same."""
    seed: int = 0
    """Of initialisation, order, augmentation and subsets."""

    output: Path = Path("output/train")
    """Parent of the run's own folder."""
    experiment: str | None = None
    """Name of the run's folder; None makes one of time, model and size."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go."""
    eval_only: bool = False
    """Only test a saved adapter."""
    adapter_dir: Annotated[Path | None, Short(name="adapter-dir", aliases=["--adapter"])] = None
    """Directory of the saved adapter to test, or its id on the Hub."""
    traceback: bool = False
    """On an error, show the whole traceback."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if self.pretrained_path is not None:
            object.__setattr__(self, "pretrained_path", Path(self.pretrained_path))
        problems = [*method_problems(self.method, self.method_options), *_range_problems(self)]
        if self.eval_only and self.adapter_dir is None:
            problems.append("eval_only needs the adapter to test: --adapter DIR.")
        if self.pretrained_path is not None and self.pretrained_path.suffix != ".safetensors":
            problems.append(f"pretrained_path must be a .safetensors file, got {self.pretrained_path}.")
        if self.adapter_dir is not None and not self.eval_only:
            problems.append("--adapter DIR is for --eval-only; without it a fresh adapter is trained.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            problems.append(f"mixup and cutmix need an even batch_size, got {self.batch_size}.")
        if self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs ({self.warmup_epochs:g}) is longer than epochs ({self.epochs}).")
        if self.scale[0] > self.scale[1]:
            problems.append(f"scale must be (smallest, largest), got {self.scale}.")
        if problems:
            raise ConfigError("RunConfig", problems)

    def resolved(self) -> RunConfig:
        """The same config with the method's own learning rate in place of None."""
        return self if self.lr is not None else replace(self, lr=METHODS[self.method].lr)

    def for_adapter(self, saved: Mapping[str, Any]) -> RunConfig:
        """The same config with the model that a saved adapter was trained on; own weights and image size win.

        Args:
            saved: contents of the adapter's `adapter_config.json`.
        """
        facts, kwargs = saved["metadata"], dict(saved["model_kwargs"])
        path = self.pretrained_path or facts.get("pretrained_path")
        img_size = kwargs.pop("img_size", None)
        return replace(
            self,
            model=saved["architecture"] + (f".{saved['pretrained_tag']}" if saved["pretrained_tag"] else ""),
            pretrained=self.pretrained and facts.get("pretrained", True),
            pretrained_path=None if path is None else Path(path),
            img_size=self.img_size or img_size,
            model_kwargs=self.model_kwargs or kwargs,
        )


_AT_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "grad_accum_steps", "img_size"), 1),
    **dict.fromkeys(("max_train_samples", "max_eval_samples"), 1),
    **dict.fromkeys(("lr", "head_lr", "weight_decay", "warmup_epochs", "min_lr", "clip_grad", "mixup", "cutmix"), 0),
    **dict.fromkeys(("workers", "seed"), 0),
}
_FRACTIONS = ("smoothing", "drop_path", "model_ema_decay", "hflip", "reprob", "val_split")


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
    for value in config.scale:
        if not 0 < value <= 1:
            yield f"scale must be fractions of the image in (0, 1], got {value}."
