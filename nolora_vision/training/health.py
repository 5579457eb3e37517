"""Numbers that go wrong: keeps what is not finite from the weights, finds its layer, notes a collapsed run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from nolora_vision.training.consistency import Batch, Objective
from nolora_vision.training.errors import NotFiniteError, RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.sharded import is_sharded, own_part, whole
from nolora_vision.training.tally import rates_of

SMALLEST_LOSS_SCALE = 1.0
"""Gradients that overflow float16 though they are not scaled up any more will go on to."""


class Guard:
    """Watches the gradient of each update of a run.

    Args:
        model: as accelerate prepared it.
        bare: the same one without wrappers.
        optimizer: as accelerate prepared it. PyTorch's fused Adam leaves its weights alone from the first gradient that
            is not finite on, without a wait for the device; with others they are lost with it.
        clip_grad: largest norm of the gradient; None does not clip.
    """

    def __init__(
        self, model: nn.Module, bare: nn.Module, optimizer: Any, *, accelerator: Any, clip_grad: float | None
    ) -> None:
        self.bare, self.accelerator, self.clip_grad = bare, accelerator, clip_grad
        self.whole = accelerator.num_processes == 1 or isinstance(model, DistributedDataParallel)
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        fused = getattr(self.inner, "_step_supports_amp_scaling", False)
        self.can_skip = fused and accelerator.scaler is None and not is_sharded(model)
        self.tripped: Tensor | None = None
        self.batch: Batch | None = None

    def before_update(self, batch: Batch) -> Tensor | None:
        """Clip the gradient, and have the optimizer leave out this update and all later ones if it is not finite.

        Args:
            batch: what the gradient is of.

        Returns:
            Its norm before clipping, a scalar; None where gradients are still being added up, or it is not known, and
            with float16, whose scaler looks for overflow and leaves out such updates itself.
        """
        self.batch = batch
        if not self.accelerator.sync_gradients:
            return None
        norm = None
        if self.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(self.trained, self.clip_grad)
        elif self.accelerator.scaler is None:
            norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.accelerator.scaler is not None or norm is None:  # DeepSpeed clips by itself and need not say
            return None
        norm = whole(torch.as_tensor(norm))
        if self.can_skip:
            bad = 1 - norm.detach().isfinite().float()
            self.tripped = bad if self.tripped is None else torch.maximum(self.tripped, bad)
            self.inner.found_inf = self.tripped
        return norm

    def after_update(self) -> None:
        """See whether float16 can still hold the gradient.

        Raises:
            RunError: if it overflows though it is not scaled up any more.
        """
        if (scaler := self.accelerator.scaler) is None or not self.accelerator.optimizer_step_was_skipped:
            return
        if (scale := scaler.get_scale()) < SMALLEST_LOSS_SCALE:
            raise RunError(
                f"Gradients overflow float16 again and again: the loss scale has fallen to {scale:g} (learning rates: "
                f"{rates_of(self.inner)}). Use --amp-dtype bfloat16, or a smaller --lr."
            )

    @contextmanager
    def naming(self, objective: Objective, fit: Fit) -> Iterator[None]:
        """Where a step turns out not to be finite, look for its layer with the last batch and say so.

        Raises:
            NotFiniteError: with the layer, if it can be found.
        """
        try:
            yield
        except NotFiniteError as error:
            error.fit, error.weights_kept = fit, all(bool(own_part(p).isfinite().all()) for p in self.trained)
            error.where = self._where(objective) if self.whole else None
            raise error from None

    def _where(self, objective: Objective) -> str:
        assert self.batch is not None
        broken = [name for name, p in self.bare.named_parameters() if not bool(p.isfinite().all())]
        if broken:
            return f"{len(broken)} of its parameters are not finite, the last one {broken[-1]}"
        with self.accelerator.autocast():
            return first_not_finite(self.bare, objective, self.batch) or "With the same weights it did not happen again"


def first_not_finite(model: nn.Module, objective: Objective, batch: Batch) -> str | None:
    """Where a step of training first stops being finite, in words, or None where it stays so.

    Args:
        model: as it is in training; its gradients are lost.
    """
    trace = Trace()
    hooks = [
        handle
        for name, module in model.named_modules()
        if name
        for handle in (
            module.register_forward_pre_hook(lambda _, given, name=name: trace.given(name, given)),
            module.register_forward_hook(lambda _, given, output, name=name: trace.made(name, given, output)),
        )
    ]
    try:
        loss = objective(model, batch).loss
        if not trace.found and not finite(loss):
            trace.found = "the loss is computed from finite logits"
        if not trace.found:
            loss.backward()
        if not trace.found:
            names = [name for name, p in model.named_parameters() if p.grad is not None and not finite(p.grad)]
            trace.found = f"the gradient of {names[-1]} is not finite" if names else None
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return trace.found


class Trace:
    """What hooks see of the tensors between modules, first on their way forward and then of their gradients."""

    def __init__(self) -> None:
        self.found: str | None = None
        self.places: dict[int, tuple[Tensor, str]] = {}
        """By its id, a tensor and the last thing that became of it."""

    def given(self, name: str, inputs: Any) -> None:
        """A module is called."""
        for tensor in tensors_of(inputs):
            self._note(tensor, f"the gradient is not finite any more where it has come back through {name}")

    def made(self, name: str, inputs: Any, output: Any) -> None:
        """A module has returned."""
        if self.found is None and not finite(output) and finite(inputs):
            self.found = f"{name} makes of finite numbers some that are not"
        for tensor in tensors_of(output):
            if id(tensor) not in self.places:
                self._note(tensor, f"the gradient is not finite any more where it comes to the output of {name}")

    def _note(self, tensor: Tensor, place: str) -> None:
        if not tensor.requires_grad:
            return
        key = id(tensor)
        if key not in self.places:
            tensor.register_hook(lambda gradient: self._look_back(key, gradient))
        self.places[key] = tensor, place

    def _look_back(self, key: int, gradient: Tensor) -> None:
        if self.found is None and not finite(gradient):
            self.found = self.places[key][1]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of floating point in what a module takes or gives."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for part in value for t in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def finite(value: Any) -> bool:
    """Whether all its numbers are."""
    return all(bool(t.isfinite().all()) for t in tensors_of(value))


def collapsed(top1_percent: float, labels: Tensor, optimizer: torch.optim.Optimizer, *, epoch: int) -> str | None:
    """What to say of a validation that is no better than one class for all images; None where it is.

    Args:
        labels: (N,) of the images.
        epoch: counted from 1.
    """
    share = labels.bincount().max().item() / len(labels)
    chance = share + 2 * sqrt(share * (1 - share) / len(labels))
    if chance >= 1 or top1_percent > 100 * chance:  # too few images to tell, or better than that
        return None
    rates = rates_of(optimizer, highest=True)
    more = "no more" if top1_percent <= 100 * share else "hardly more"
    return (
        f"After epoch {epoch}, {top1_percent:.1f} % of the validation images are right, {more} than if all were taken "
        f"for the same class ({100 * share:.1f} %). If it stays so, the learning rates ({rates}) are too high for this "
        f"model, or far too low: try others, or more --warmup-epochs."
    )
