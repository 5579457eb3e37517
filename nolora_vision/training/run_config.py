"""RunConfig: what a run is told, validated all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nolora_vision.config import AdapterConfig, ConfigError
from nolora_vision.methods.catalogue import METHODS
from nolora_vision.training.kinds import (
    Amount,
    Count,
    File,
    ModelOptions,
    Options,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Text,
    Whole,
    settle,
    unaffected,
)
from nolora_vision.training.run_checks import problems_of
from nolora_vision.training.timm_names import is_elsewhere

Short = tyro.conf.arg


@dataclass(frozen=True)
class RunConfig:
    """Fine-tune and evaluate a pretrained timm model on an image-classification dataset."""

    model: Text = "vit_base_patch16_224"
    """Name of a timm model, with or without its pretrained tag."""
    dataset: Text = "cifar100"
    """cifar10, cifar100, pets, cars, dtd, eurosat, aircraft, resisc45, food101, flowers102, beans, digits (or
    digits:5-9), vtab:TASK, a Hugging Face dataset id, or a local folder or file."""
    method: Text = "nolora"
    """What trains: nolora, lora, aurora (ours); linear (the classifier), full, bitfit, layernorm; adaptformer; or by
    PEFT peft-lora, rslora, lora-plus, dora, pissa, vera, fourierft, hira, peanut, randlora, c3a, oft, boft, ia3."""
    method_options: Options = field(default_factory=dict)
    """Options of the method, such as `lr_ratio 16` or `n_frequency 500`; a wrong one is answered with all."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapters of nolora; other methods take of it what they have: layers, rank, alpha, dropout."""
    pretrained: bool = True
    """Start from pretrained weights."""
    pretrained_path: File | None = None
    """A safetensors file to start from instead of the weights that timm knows."""
    img_size: Count | None = None
    """Image height and width in pixels; None takes the pretrained model's own."""
    model_kwargs: ModelOptions = field(default_factory=dict)
    """Further arguments of the timm model, such as `patch_size=4 depth=6`."""

    epochs: Count = 10
    """Passes over the training images."""
    batch_size: Annotated[Count, Short(aliases=["-b"])] = 64
    """Images per step and process."""
    grad_accum_steps: Count = 1
    """Batches whose gradients are averaged into one step."""
    opt: Text = "adamw"
    """Optimizer, by its timm name."""
    lr: Amount | None = None
    """Peak learning rate of the adapters, or of what trains of the backbone, of which linear trains nothing; None takes
    the method's, which is 2e-3 for LoRA and ours and 1e-4 for full."""
    head_lr: Amount | None = 3e-3
    """Peak learning rate of the classifier; None takes lr."""
    weight_decay: Amount = 1e-4
    """Weight decay of matrices; v, θ, biases and norms have none."""
    sched: Literal["cosine", "tanh", "step", "poly"] = "cosine"
    """timm's learning-rate schedule; poly is a straight line."""
    decay_epochs: Positive | None = None
    """Epochs between the drops of step; None is a third of them."""
    decay_rate: Positive = 0.1
    """Factor of each drop of step."""
    warmup_epochs: Amount = 0.5
    """Length of the linear warm-up."""
    min_lr: Amount = 0.0
    """Learning rate at the end; step has none."""
    clip_grad: Positive | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    smoothing: ShareBelowOne = 0.0
    """Label smoothing."""
    mixup: Amount = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: Amount = 0.0
    """CutMix alpha; 0 is off."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth rate."""
    keep_epoch: Literal["best", "last"] = "best"
    """Epoch whose weights are kept and tested: the best by validation, or the last."""
    validate_every: Whole = 1
    """Epochs between validations; 0 validates after the last epoch only, which always is."""
    consistency: Amount = 0.0
    """λ: weight of ‖logits₁ − logits₂‖² between two noisy looks at an image; needs adapter.modulation_noise, or another
    source of noise where the method has no modulation. Looks of two epochs differ by their crops anyway."""
    consistency_mode: Literal["twice", "previous", "part", "every"] | None = None
    """Which two looks: two copies of each image in a batch, or this epoch's and the last one's; or copies of a part of
    the batch, or in every so many batches. None is twice where consistency is above 0; others are on at 0, too."""
    consistency_fraction: ShareAboveZero = 0.5
    """Share of a batch that part looks at twice."""
    consistency_every: Count = 2
    """Period of every, in batches."""
    model_ema: bool = False
    """Also keep a moving average of the trained weights, and evaluate that."""
    model_ema_decay: ShareBelowOne = 0.999
    """Decay of that average for each step: it reaches back some 1 / (1 − decay) steps."""
    model_ema_warmup: bool = False
    """Begin with a small decay, which rises with the steps: for runs of less than some thousand of them."""

    scale: tuple[ShareAboveZero, ShareAboveZero] = (0.5, 1.0)
    """Area of the random crop of training images, as fractions of the image."""
    hflip: Share = 0.5
    """Probability of mirroring a training image."""
    aa: Text | None = None
    """timm's AutoAugment policy, such as rand-m9-mstd0.5; None is off."""
    reprob: Share = 0.0
    """Probability of erasing a random rectangle."""
    no_aug: bool = False
    """Training images as evaluation sees them: no random crop, mirroring, erasing; scale and hflip then do nothing."""
    crop_pct: ShareAboveZero | None = None
    """Share of the image that evaluation looks at; None takes the dataset's (1 for CIFAR) or else the model's own."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """How evaluation crops: the middle of the image, all of it squashed to a square, or all of it within borders (both
    at crop_pct 1); None takes the dataset's (squash for VTAB-1k) or else the model's own."""
    image_key: Text | None = None
    """Column of the images; None finds it."""
    label_key: Text | None = None
    """Column of the labels; None finds it."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset; None takes main. The record says which commit that was."""
    test_split: Text | None = None
    """The dataset's own name of the split to test on, such as contrast of cars; None takes its test split."""
    vtab_root: File | None = None
    """Folder with VTAB-1k's tasks, for vtab:TASK: each with train800.txt, val200.txt, test.txt and its images."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """An image that cannot be read ends the run; or all are read beforehand, and the record lists those left out."""
    check_shared: Literal["auto", "always", "never"] = "auto"
    """Warn of images that training and test share, byte for byte; auto: where there are at most 10,000."""
    val_split: ShareBelowOne = 0.1
    """Share of the training images held out where the dataset has no validation split."""
    max_train_samples: Count | None = None
    """Train on this many images at most, drawn by the seed."""
    max_eval_samples: Count | None = None
    """Validate and test on this many images at most each, the same for every seed."""
    shots: Count | None = None
    """Train on this many images of each class, drawn by the seed."""
    train_fraction: ShareAboveZero | None = None
    """Train on this share of the images of each class, drawn by the seed."""
    train_on: Literal["train", "train_val"] = "train"
    """Training images, or in a final run also the validation images (VTAB-1k's train800val200): their score is then
    none, so it needs keep_epoch last."""
    splits: File | None = None
    """A splits.json of another run: train, validate and test on exactly its images."""

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
    workers: Annotated[Whole, Short(aliases=["-j"])] = 2
    """Processes that load images; 0 loads in the main one."""
    cache_images: Literal["auto", "none"] | Count = "auto"
    """Keep decoded images in memory for later epochs: none, at most so many MiB in each process, or auto, at most a
    quarter of the memory that is free. The batches are the same."""
    seed: Whole = 0
    """Of initialisation, order, augmentation and subsets."""

    deterministic: bool = False
    """Use only algorithms that give the same bits in each run on the same machine; on a GPU that costs time. On a
    processor runs repeat without it."""

    output: File = Path("output/train")
    """Parent of the run's own folder."""
    experiment: Text | None = None
    """Name of the run's folder; None makes one of time, model and size."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go."""
    resume: Text | None = None
    """Go on with a run that was stopped: its folder, or auto: the one of this config in output, if there is any."""
    resume_changed: bool = False
    """Go on though the config is another one now."""
    checkpoint_minutes: Amount | None = 10.0
    """Minutes of training between checkpoints; None makes none by time. A run that is told to stop makes one, too."""
    checkpoint_steps: Count | None = None
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of them are kept; when the run is done they go."""
    eval_only: bool = False
    """Only test a saved adapter; what is about training then does nothing."""
    adapter_dir: Annotated[File | None, Short(name="adapter-dir", aliases=["--adapter"])] = None
    """Directory of the saved adapter to test, or its id on the Hub."""
    traceback: bool = False
    """On an error, show the whole traceback."""

    def __post_init__(self) -> None:
        problems, bad = settle(self)
        problems += unaffected(list(problems_of(self)), bad)
        if problems:
            raise ConfigError("RunConfig", problems)

    @property
    def consistency_in_use(self) -> str | None:
        """The consistency_mode with its default, or None for plain training."""
        return self.consistency_mode or ("twice" if self.consistency > 0 else None)

    def resolved(self) -> RunConfig:
        """The same config with the method's own learning rate in place of None."""
        return self if self.lr is not None else replace(self, lr=METHODS[self.method].lr)

    def for_adapter(self, saved: Mapping[str, Any]) -> RunConfig:
        """The same config with the model that a saved adapter was trained on; own weights and image size win.

        So does a model of the Hub or a folder, which timm's name in the adapter does not lead to.

        Args:
            saved: contents of the adapter's `adapter_config.json`.
        """
        facts, kwargs = saved["metadata"], dict(saved["model_kwargs"])
        named = saved["architecture"] + (f".{saved['pretrained_tag']}" if saved["pretrained_tag"] else "")
        pretrained = self.pretrained and facts.get("pretrained", True)
        path = self.pretrained_path or (facts.get("pretrained_path") if pretrained else None)
        img_size = kwargs.pop("img_size", None)
        if isinstance(img_size, (list, tuple)) and len(set(img_size)) == 1:
            img_size = img_size[0]
        return replace(
            self,
            model=self.model if is_elsewhere(self.model) else named,
            pretrained=pretrained,
            pretrained_path=None if path is None else Path(path),
            img_size=self.img_size or img_size,
            model_kwargs=self.model_kwargs or kwargs,
        )
