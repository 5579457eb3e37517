"""Optimizer, schedule, average and loaders of a run, on the device where it will run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from nolora_vision import param_groups
from nolora_vision.training.backbone import set_compute
from nolora_vision.training.ingredients import compute_options, make_scheduler
from nolora_vision.training.run_config import RunConfig


class Prepared(NamedTuple):
    """What accelerate made of a run's parts."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    train: Any
    val: Any
    test: Any
    ema: Any | None


def prepare(config: RunConfig, model: nn.Module, loaders: tuple[Any, Any, Any], accelerator: Any) -> Prepared:
    """Optimizer, schedule and average for a model, all of them where they will run."""
    set_compute(model, accelerator.device.type, **compute_options(config))
    groups = param_groups(model, lr=config.lr or 0.0, head_lr=config.head_lr, weight_decay=config.weight_decay)
    optimizer = make_optimizer(config, groups)
    scheduler = make_scheduler(config, optimizer, batches=len(loaders[0]) // accelerator.num_processes)
    ema = average_of(config, model.to(accelerator.device)) if config.model_ema else None
    runnable = torch.compile(model) if config.torchcompile else model
    runnable, optimizer, train, val, test = accelerator.prepare(runnable, optimizer, *loaders)
    return Prepared(runnable, optimizer, scheduler, train, val, test, ema)


def average_of(config: RunConfig, model: nn.Module) -> ModelEmaV3:
    """A moving average of the weights, where the model is now."""
    return ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)


def make_optimizer(config: RunConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """timm's; Adam's step as one call for all parameters: an adapted ViT has 200 small ones."""
    fused = config.opt in ("adam", "adamw") and config.amp_dtype != "float16"  # its gradients need unscaling first
    options: dict[str, Any] = {"fused": True} if fused else {}
    return create_optimizer_v2(groups, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)
