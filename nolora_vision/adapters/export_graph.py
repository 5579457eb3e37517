"""The function that an export holds: a copy of the model for inference, images to try it on, and the comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision.adapters.model_kwargs import image_size_of
from nolora_vision.adapters.pretrained import preprocessing_of
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.fold import fold, tied_weight
from nolora_vision.surgery.frozen_dtype import release_frozen
from nolora_vision.surgery.inject import SHELF, is_injected

BATCHES = (1, 2, 3)
"""Sizes at which a file is compared with eager: one alone would not tell a fixed batch from a dynamic one."""
TOLERANCE = 1e-4
"""Largest difference, as a share of eager's largest output: fp32 rounding grows with the numbers that are rounded.
Real files differ by about 1e-6 of it; a wrong graph by far more."""


class ExportError(ValueError):
    """A model that cannot be exported as asked, or a file that is no such export; nothing was written."""


class ExportGraph(nn.Module):
    """The exported function: images (B, C, H, W) → logits, with the normalisation where that is asked for."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocessing: Mapping[str, Any], normalize: bool) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(-1, 1, 1), persistent=normalize)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) → (B, classes)."""
        return self.model((images - self.mean) / self.std if self.normalize else images)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy for inference: fp32 on the CPU, which holds the values of 16-bit weights exactly."""
    plain = copy.deepcopy(model)
    release_frozen(plain)
    plain = plain.cpu().float().eval().requires_grad_(False)
    if callable(getattr(plain, "set_grad_checkpointing", None)):
        plain.set_grad_checkpointing(False)  # type: ignore[operator]  # timm recomputes in evaluation too
    return plain


def image_size(model: nn.Module, asked: int | Sequence[int] | None) -> tuple[int, int, int]:
    """(C, H, W): as asked, or as the adapter or the model was evaluated, or as its patch embedding was made.

    Raises:
        ExportError: if what was asked is no such size.
    """
    size: Any = preprocessing_of(model)["input_size"]
    made = image_size_of(model).get("img_size")
    if made and tuple(size) == tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", size)):
        size = (size[0], *(made if isinstance(made, list) else (made, made)))  # nobody chose it: as the model was made
    if asked is not None:
        size = (3, asked, asked) if isinstance(asked, int) else tuple(asked)
    if len(size) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ExportError(f"input_size must be (C, H, W) or one side in pixels, got {asked!r}. For example 224.")
    return (size[0], size[1], size[2])


def probe_images(preprocessing: Mapping[str, Any], normalize: bool) -> list[Tensor]:
    """A batch of each size; coarse patches of random colour, because white noise looks the same image after image.

    Raises:
        ExportError: if the graph is to normalise, and mean and std are for another number of channels.
    """
    channels, height, width = preprocessing["input_size"]
    mean, std = (torch.tensor(preprocessing[name]).view(-1, 1, 1) for name in ("mean", "std"))
    fits = len(mean) == len(std) == channels
    if normalize and not fits:
        raise ExportError(
            f"The model's mean and std are for {len(mean)} channels, its images have {channels}, so the file cannot "
            f"normalise them. Leave normalize out, and normalise before."
        )
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n in BATCHES:
        x = F.interpolate(torch.rand(n, channels, 5, 5, generator=generator), (height, width), mode="nearest")
        x = 0.8 * x + 0.2 * torch.rand(n, channels, height, width, generator=generator)
        batches.append((x - mean) / std if fits and not normalize else x)
    return batches


def fold_where_possible(model: nn.Module) -> None:
    """Put v and s into B; and into W what is linear, unless some adapter is switched off, which must stay off.

    Adapters beside the one that is set are taken off: the model is a copy for export.
    """
    shelf = getattr(model, SHELF, None)
    if shelf is not None:
        shelf.close()
        delattr(model, SHELF)
    layers = adapted_layers(model).values()
    linear = all(branch.is_linear for layer in layers for branch in layer.adapter.branches())
    if is_injected(model):
        merge = linear and all(layer.adapter_enabled for layer in layers) and not tied_weight(model)
        fold(model, merge=merge)


@torch.no_grad()
def eager_outputs(graph: ExportGraph, feeds: Sequence[Tensor]) -> list[Tensor]:
    """What the model itself makes of each batch.

    Raises:
        ExportError: if it does not run on such images, or gives something that no file can be compared with.
    """
    name, size = type(graph.model).__name__, tuple(feeds[0].shape[1:])
    try:
        outputs = [graph(x) for x in feeds]
    except Exception as error:  # a model's own checks raise any kind
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise ExportError(f"{name} does not run on images of {size} ({reason}). Pass input_size=(C, H, W).") from error
    if not all(isinstance(y, Tensor) for y in outputs):
        raise ExportError(
            f"{name} gives a {type(outputs[0]).__name__}; only a model that gives one tensor is exported."
        )
    if not all(y.isfinite().all() for y in outputs):
        raise ExportError(
            f"{name} itself gives NaN or infinity, so no file can be checked against it. Mend its weights."
        )
    return outputs


def refuse_difference(runtime: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference, and eager's largest output.

    Raises:
        ExportError: if shapes differ, or outputs by more than TOLERANCE of the largest one.
    """
    largest = max(float(y.abs().max()) for y in expected)
    for theirs, ours in zip(got, expected, strict=True):
        if theirs.shape != ours.shape:
            raise ExportError(
                f"{runtime} gives outputs of {tuple(theirs.shape)} where eager gives {tuple(ours.shape)}. "
                f"The file is not kept."
            )
    difference = max(float((theirs - ours).abs().max()) for theirs, ours in zip(got, expected, strict=True))
    if not difference <= TOLERANCE * largest:  # NaN is refused too
        raise ExportError(
            f"{runtime} differs from eager by {difference:.3g} (largest output {largest:.3g}, allowed "
            f"{TOLERANCE:g} of it). The file is not kept. Try another format, or another version of the runtime."
        )
    return difference, largest
