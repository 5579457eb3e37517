"""What timm knows by name: models, weights, optimizers, augmentation policies; a sentence for each that it does not."""

from __future__ import annotations

import difflib
from functools import cache

import timm
import torch
from timm.data import create_transform
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from nolora_vision.config import did_you_mean

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""Beginnings of a model's name that point to the Hub or a folder."""


def is_elsewhere(name: str) -> bool:
    """Whether a model's name points to the Hub or a folder, where timm knows neither it nor its weights."""
    return name.startswith(ELSEWHERE)


@cache
def model_problem(name: str) -> str | None:
    """That there is no such architecture, or no such weights of it."""
    if is_elsewhere(name):
        return None
    bare, tag = timm.models.split_model_name_tag(name)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        return f"timm {timm.__version__} has no model {name!r}.{hint} All names: timm.list_models()."
    if tag and not _is_known_tag(name):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(bare)]
        return f"{bare} has no weights {tag!r} in timm.{did_you_mean(tag, tags)} Tags: {', '.join(tags) or 'none'}."
    return None


def has_weights(name: str) -> bool:
    """Whether there is something to start from; of a model that timm points elsewhere for it is not known."""
    return is_elsewhere(name) or timm.is_model_pretrained(name)


@cache
def optimizer_problem(name: str) -> str | None:
    """That timm has no such optimizer; one that only this machine lacks something for is known."""
    try:
        made = create_optimizer_v2([nn.Parameter(torch.zeros(1, 1))], opt=name, lr=0.1)
    except ValueError as error:
        hint = did_you_mean(name, map(str, list_optimizers()))
        return f"opt must be the name of a timm optimizer, got {name!r} ({str(error).rstrip('.')}).{hint}"
    except Exception:  # such as a missing GPU: run.py says it, where the run is to be
        return None
    if getattr(made, "is_second_order", False):
        return f"opt {name!r} wants second derivatives of the loss, which training makes none of: choose another."
    return None


@cache
def policy_problem(name: str) -> str | None:
    """That timm cannot read an AutoAugment policy."""
    try:
        create_transform((3, 32, 32), is_training=True, auto_augment=name)
    except Exception as error:  # timm raises many kinds
        return f"aa must be one of timm's policies, such as rand-m9-mstd0.5, got {name!r} ({str(error).rstrip('.')})."
    return None


def _is_known_tag(name: str) -> bool:
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False) is not None
    except RuntimeError:
        return False
