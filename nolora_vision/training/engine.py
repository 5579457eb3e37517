"""fit and evaluate on given objects, on whatever device and precision accelerate finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision.training.consistency import Batch, Objective, Outcome, Plain
from nolora_vision.training.errors import RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.health import Guard, collapsed
from nolora_vision.training.lost_loaders import awaited
from nolora_vision.training.order import number_of, start_epoch, weight_in_update
from nolora_vision.training.processes import processes
from nolora_vision.training.sharded import split_like, whole
from nolora_vision.training.tally import Tally

Batches = Iterable[Sequence[Tensor]]
"""(images, labels), or for training (images, labels, indices into the data set)."""


class Progress(Protocol):
    """Who is told how a run goes."""

    def __enter__(self) -> Progress: ...
    def __exit__(self, *exception: object) -> None: ...
    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None: ...
    def step(self, *, loss: float, top1: float, images_per_s: float) -> None: ...
    def end_epoch(self, row: Mapping[str, float]) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Scores of one pass over a split."""

    loss: float
    top1_percent: float
    top5_percent: float
    predictions: Tensor
    """(N,) class of the highest logit."""
    labels: Tensor
    """(N,)."""
    seconds: float


class Checkpointer(Protocol):
    """Who is told how far training is, and may save it, or stop it by an exception."""

    def begin(self) -> tuple[Fit, Mapping[str, float]]: ...
    def after_step(self, tally: Tally | None) -> None: ...
    def poll(self) -> None: ...


class NoCheckpoints:
    """Starts from the beginning and saves nothing."""

    def begin(self) -> tuple[Fit, Mapping[str, float]]:
        """A fresh run."""
        return Fit(), {}

    def after_step(self, tally: Tally | None) -> None:
        """Nothing."""

    def poll(self) -> None:
        """Nothing."""


PLAIN, NO_CHECKPOINTS = Plain(), NoCheckpoints()


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers, on every device."""
    set_seed(seed)


def draw_apart(seed: int, process: int) -> None:
    """From here on dropout, noise and mixup are other ones on each process; the first draws what it would alone."""
    if process > 0:
        set_seed(number_of(seed, process))


def precision_of(amp_dtype: str) -> str:
    """accelerate's name of an autocast type: none, bfloat16 or float16.

    Raises:
        RunError: if this machine cannot compute in it.
    """
    if amp_dtype == "float16" and not torch.cuda.is_available():
        raise RunError("--amp-dtype float16 needs a GPU. Use bfloat16, which also runs on this processor, or none.")
    return {"none": "no", "bfloat16": "bf16", "float16": "fp16"}[amp_dtype]


def slow_precision(amp_dtype: str) -> str | None:
    """Why an autocast type makes training slower on this machine, if it does: bfloat16 where no instruction takes it.

    A step of ViT-Ti took 14 times as long as in fp32 on a processor with AVX2 only.
    """
    told = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has none
    able = ("avx512_f", "avx_ne_convert", "amx_bf16")
    known = told.get("architecture") == "x86_64" and not any(told.get(name) for name in able)
    if amp_dtype != "bfloat16" or torch.accelerator.is_available() or not known:
        return None
    return (
        "this processor has no instructions for bfloat16: it is emulated, which takes many times as long as fp32. "
        "Leave out --amp-dtype."
    )


def make_accelerator(
    amp_dtype: str, *, grad_accum_steps: int = 1, report_to: str = "none", folder: Path | None = None
) -> Accelerator:
    """accelerate's view of the machine; `amp_dtype` is none, bfloat16 or float16."""
    processes()
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process; several runs may share one
    return Accelerator(
        mixed_precision=precision_of(amp_dtype),
        gradient_accumulation_steps=grad_accum_steps,
        log_with=None if report_to == "none" else report_to,
        project_dir=None if folder is None else str(folder),
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),  # the batches are pinned
    )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    train: Batches,
    val: Batches,
    *,
    accelerator: Accelerator,
    epochs: int,
    progress: Progress,
    set_training_mode: Callable[[nn.Module], None],
    objective: Objective = PLAIN,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    clip_grad: float | None = None,
    ema: Any | None = None,
    keep_epoch: str = "best",
    validate_every: int = 1,
    checkpointer: Checkpointer = NO_CHECKPOINTS,
) -> Fit:
    """Train for some epochs and validate in between; nothing is kept but the trainable weights of one epoch.

    Args:
        scheduler: with `step_update(updates)`, once for each optimizer step, as timm's.
        set_training_mode: puts the bare model in training mode.
        mixup: of timm, on a batch and its labels.
        ema: a moving average of the bare model with `update(model)` and `.module`, which is validated instead.
        keep_epoch: the best of those that were validated, or the last.
        validate_every: epochs between validations; 0 validates after the last epoch only, which always is.
        checkpointer: who saves the state of training.

    Raises:
        RunError: if float16 cannot hold the gradient; NotFiniteError, if a loss or a gradient is not finite.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    judged, source = (model, bare) if ema is None else (ema.module, ema.module)
    result, sums = checkpointer.begin()
    guard = Guard(model, bare, optimizer, accelerator=accelerator, clip_grad=clip_grad)
    for epoch in range(result.epochs, epochs):
        set_training_mode(model)
        tally, sums = Tally(progress, epoch=epoch, processes=accelerator.num_processes, sums=sums), {}
        result.batches = start_epoch(train, epoch, skip=tally.images)
        progress.start_epoch(epoch, epochs, batches := len(train))  # type: ignore[arg-type]
        with guard.naming(objective, result):
            for images, labels, *rows in awaited(train) if result.batches < batches else ():
                mixed, targets = (images, labels) if mixup is None else mixup(images, labels)
                weight = weight_in_update(result.batches, batches, accelerator.gradient_accumulation_steps)
                batch = Batch(mixed, targets, rows[0] if rows else None, epoch, weight)
                outcome, norm = take_step(model, optimizer, objective, batch, guard=guard, accelerator=accelerator)
                tally.add(outcome, labels, optimizer, norm)
                result.batches += 1
                if accelerator.sync_gradients:
                    result.updates += 1
                    scheduler.step_update(result.updates)
                    if ema is not None:
                        ema.update(bare, step=result.updates)
                    checkpointer.after_step(tally)
            tally.end()
        row = {"epoch": epoch + 1, "train_loss": tally.loss, "train_top1_percent": tally.top1_percent}
        if epoch + 1 == epochs or (validate_every and (epoch + 1) % validate_every == 0):
            scores = evaluate(judged, val, accelerator=accelerator, poll=checkpointer.poll)
            row |= {"val_loss": scores.loss, "val_top1_percent": scores.top1_percent}
            if complaint := collapsed(scores.top1_percent, scores.labels, optimizer, epoch=epoch + 1):
                result.warn(complaint, progress)
            if keep_epoch == "last" or scores.top1_percent > result.best_val_top1_percent:
                result.keep(scores.top1_percent, trained_copy(bare, source))
        result.end_epoch(tally, row | {"lr": optimizer.param_groups[0]["lr"]})
        checkpointer.after_step(None)
        progress.end_epoch(result.history[-1])
        log_row(accelerator, result.history[-1])
    return result


def log_row(accelerator: Accelerator, row: Mapping[str, float]) -> None:
    """Tell the trackers of an epoch."""
    accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=int(row["epoch"]))


def take_step(
    model: nn.Module, optimizer: Any, objective: Objective, batch: Batch, *, guard: Guard, accelerator: Accelerator
) -> tuple[Outcome, Tensor | None]:
    """Forward, backward and, unless gradients are still being added up, an update; with the norm of its gradient."""
    with accelerator.accumulate(model):
        outcome = objective(model, batch)
        loss = outcome.loss if batch.weight == 1 else outcome.loss * batch.weight
        accelerator.backward(loss)  # which it divides by the batches of a full update
        norm = guard.before_update(batch)
        optimizer.step()
        optimizer.zero_grad()
        guard.after_update()
    return outcome, norm


def evaluate(
    model: nn.Module, batches: Batches, *, accelerator: Accelerator, poll: Callable[[], None] | None = None
) -> Evaluation:
    """Score a model on a split, each sample once however many processes there are.

    Args:
        poll: called before each batch, as often on every process; may stop it by an exception.
    """
    model.train()  # LeViT's kin keep biases from their last evaluation, and let go of them here
    model.eval()
    started = time.perf_counter()
    losses, logits_of, labels_of = [], [], []
    with torch.inference_mode():
        for images, labels in awaited(batches):
            if poll is not None:
                poll()
            with accelerator.autocast():
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="none")
            gathered = accelerator.gather_for_metrics((loss, logits, labels))
            for kept, part in zip((losses, logits_of, labels_of), gathered, strict=True):
                kept.append(part.cpu())
    logits, labels = torch.cat(logits_of), torch.cat(labels_of)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return Evaluation(
        loss=float(torch.cat(losses).double().mean()),
        top1_percent=100 * float(best[:, 0].double().mean()),
        top5_percent=100 * float(best.any(1).double().mean()),
        predictions=logits.argmax(1),
        labels=labels,
        seconds=time.perf_counter() - started,
    )


def trained_copy(model: nn.Module, source: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of what trains in a model and of its BatchNorm statistics, as they are in `source`."""
    values = dict(source.state_dict())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    names += [name for name, _ in model.named_buffers() if name in values]
    return {name: whole(values[name].detach()).cpu().clone() for name in names}


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a `trained_copy` back."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(split_like(value, own[name]))
