"""timm model + head, and how it computes: type of the frozen weights, attention, preprocessing."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nolora_vision import hold_frozen
from nolora_vision.adapters.backbone_weights import create_model, weights_of_file
from nolora_vision.adapters.hub_cache import cached_models
from nolora_vision.adapters.hub_trouble import hub_trouble, reason_of
from nolora_vision.surgery.sites import classifier_paths
from nolora_vision.training.errors import RunError
from nolora_vision.training.label_checks import named
from nolora_vision.training.processes import on_main_process
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
        RunError: if the name is unknown, or its weights cannot be had or are none of this model's.
    """
    if problem := model_problem(name):
        raise RunError(problem)
    options: dict[str, Any] = {**({"drop_path_rate": drop_path} if drop_path else {}), **(model_kwargs or {})}
    options |= {} if img_size is None else {"img_size": img_size}
    if pretrained_path is not None:
        refuse_absent_weights(pretrained_path)
        options["pretrained_cfg_overlay"] = weights_of_file(pretrained_path)
    weights = f"The weights of {name}" if pretrained_path is None else f"--pretrained-path {pretrained_path}"
    try:
        with missing_weights() as missing:
            model = create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except Exception as error:
        if (said := _what_failed(error, name, options, weights, from_hub=pretrained_path is None)) is None:
            raise
        raise RunError(said) from error
    if pretrained:
        tell_missing(model, missing, weights)
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise RunError(f"{name} has no gradient checkpointing in timm. Leave --grad-checkpointing out.") from error
    return model


def _what_failed(
    error: Exception, name: str, options: Mapping[str, Any], weights: str, *, from_hub: bool
) -> str | None:
    """What a user can do about a model that could not be made; None for an error that is none of the user's."""
    given = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
    if isinstance(error, TypeError):
        return f"{name} does not take {', '.join(given)} ({error}). Leave it out."
    if "No pretrained weights" in str(error):
        return f"{name}: {error} Give some by --pretrained-path, or say --no-pretrained."
    if "loading state_dict" in str(error):
        named_by_torch = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:400]
        return f"{weights} do not fit {name}{f' with {given}' if given else ''}: {named_by_torch}"
    if isinstance(error, RuntimeError):
        return None
    if not from_hub:
        return f"{weights} could not be read as weights: {reason_of(error)}. Wanted a sound .safetensors file."
    instead = "Or train from scratch with --no-pretrained."
    return hub_trouble(weights, "model", error, cached=cached_models(adapters=False), instead=instead)


@contextmanager
def missing_weights() -> Iterator[list[str]]:
    """Collects the names that state dicts loaded inside do not have; timm loads what fits and only logs the rest."""
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def noting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = noting  # type: ignore[method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def tell_missing(model: nn.Module, missing: Collection[str], weights: str) -> None:
    """Say which matrices of the backbone stay random; norms and biases begin as well without weights.

    Raises:
        RunError: if all of them do.
    """
    heads = tuple(f"{path}." for path in classifier_paths(model))
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith(heads)]
    absent = [name for name in matrices if name in missing]
    if not absent:
        return
    if len(absent) == len(matrices):
        raise RunError(
            f"{weights} are of another model: none of its {len(matrices)} matrices is there, such as {matrices[-1]}. "
            f"Wanted weights by timm's names of them; for random ones say --no-pretrained."
        )
    if on_main_process():
        print(
            f"warning: {weights} have {len(matrices) - len(absent)} of the backbone's {len(matrices)} matrices. The "
            f"others stay random: {named(absent, 'matrix', 'matrices')}.",
            file=sys.stderr,
        )


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
