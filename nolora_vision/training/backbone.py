"""timm model + head, and how it computes: type of the frozen weights, attention, preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nolora_vision import hold_frozen
from nolora_vision.adapters.backbone_weights import create_model
from nolora_vision.adapters.hub_cache import cached_models
from nolora_vision.adapters.hub_trouble import hub_trouble
from nolora_vision.training.errors import RunError
from nolora_vision.training.timm_names import model_problem


def build_model(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = True,
    pretrained_path: Path | None = None,
    img_size: int | None = None,
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model with a fresh classifier.

    Args:
        pretrained_path: a safetensors file to start from instead of the weights that timm knows.
        model_kwargs: further arguments of the timm model.

    Raises:
        RunError: if the name is unknown, or its weights cannot be had.
    """
    if problem := model_problem(name):
        raise RunError(problem)
    options: dict[str, Any] = {**({"drop_path_rate": drop_path} if drop_path else {}), **(model_kwargs or {})}
    options |= {} if img_size is None else {"img_size": img_size}
    if pretrained_path is not None:
        refuse_absent_weights(pretrained_path)
        # Any classifier; and not the loader of the .npz that the weights which timm knows may have come from.
        options["pretrained_cfg_overlay"] = {"file": str(pretrained_path), "custom_load": False, "num_classes": -1}
    try:
        model = create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except TypeError as error:
        raise RunError(f"{name} does not take {', '.join(options)} ({error}). Leave it out.") from error
    except RuntimeError as error:
        if "No pretrained weights" in str(error):
            raise RunError(f"{name}: {error} Give some by --pretrained-path, or say --no-pretrained.") from error
        raise
    except Exception as error:
        instead = "Or train from scratch with --no-pretrained."
        cached = cached_models(adapters=False)
        text = hub_trouble(f"The weights of {name}", "model", error, cached=cached, instead=instead)
        raise RunError(text) from error
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise RunError(f"{name} has no gradient checkpointing in timm. Leave --grad-checkpointing out.") from error
    return model


def refuse_absent_weights(path: Path) -> None:
    """Check that a file of weights is there.

    Raises:
        RunError: if not.
    """
    if not path.is_file():
        raise RunError(f"--pretrained-path {path} is no file. Wanted a .safetensors file of weights.")


def set_compute(model: nn.Module, device_type: str, *, amp_dtype: str, frozen_dtype: str, fused_attn: str) -> None:
    """How the model computes what it computes: the type of its frozen weights, and its attention; see RunConfig.

    Args:
        device_type: cpu, cuda, …: where it will run.
    """
    if frozen_dtype == "auto" and amp_dtype != "none":
        hold_frozen(model, getattr(torch, amp_dtype), keep_original=False)
    slower = device_type == "cpu" and amp_dtype == "bfloat16"
    if fused_attn == "never" or (fused_attn == "auto" and slower):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]


def data_config(
    model: nn.Module, img_size: int | None = None, crop_pct: float | None = None, crop_mode: str | None = None
) -> dict[str, Any]:
    """timm's preprocessing for the model, at another image size or with another crop if one is given."""
    config = resolve_model_data_config(model)
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    if crop_mode is not None:
        config["crop_mode"] = crop_mode
    return config


@torch.no_grad()
def refuse_wrong_size(model: nn.Module, input_size: Sequence[int]) -> None:
    """Run the model once on an empty image of this size (C, H, W), in evaluation mode.

    Raises:
        RunError: if it does not take it.
    """
    training = model.training
    try:
        model.eval()(torch.zeros(1, *input_size))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise RunError(
            f"{type(model).__name__} does not take images of {input_size[1]}×{input_size[2]} pixels ({reason}). "
            f"Choose another --img-size, or leave it out for the pretrained model's own."
        ) from error
    finally:
        model.train(training)


def full_name(model: nn.Module, *, pretrained: bool = True, pretrained_path: Path | None = None) -> str:
    """Architecture and pretrained tag as timm spells them, or the weight file's name, or `untrained`."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    tag = (cfg.get("tag") if pretrained_path is None else pretrained_path.stem) if pretrained else "untrained"
    return f"{cfg.get('architecture', type(model).__name__)}{f'.{tag}' if tag else ''}"


def training_mode(model: nn.Module) -> None:
    """Training mode, but frozen BatchNorms keep their running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
