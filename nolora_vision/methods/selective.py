"""Methods that add nothing and train a part of the model: its biases, or its norms."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nolora_vision.methods.catalogue import MethodError
from nolora_vision.surgery.inject import freeze_backbone


def train_biases(model: nn.Module) -> None:
    """BitFit: freeze all but every bias and the classifier; q_bias and v_bias count, tables of positions do not.

    Source: Ben Zaken et al., arXiv 2106.10199.

    Raises:
        MethodError: if the model has no biases.
    """
    _train_only(model, _biases(model), "bitfit", "bias")


def train_norms(model: nn.Module) -> None:
    """Freeze all but weights and biases of every normalisation and the classifier.

    Raises:
        MethodError: if the model has no norm with parameters.
    """
    _train_only(model, _norm_parameters(model), "layernorm", "norm with weights")


def _train_only(model: nn.Module, chosen: Iterator[nn.Parameter], method: str, what: str) -> None:
    wanted = list(chosen)
    if not wanted:
        raise MethodError(f"{method} cannot run on {type(model).__name__}: it has no {what}.")
    freeze_backbone(model)
    for parameter in wanted:
        parameter.requires_grad_(True)


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].endswith("bias"):
            yield parameter


def _norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if "Norm" in type(module).__name__:
            yield from module.parameters(recurse=False)
