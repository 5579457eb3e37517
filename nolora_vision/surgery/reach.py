"""The proof of reach: one cheap dry forward in which every adapter must be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.surgery.plan import InjectionError

OTHER_SIZES = (256, 384, 192, 128, 96, 64, 160, 448, 512, 288, 320, 336)
"""Pixels on a side of the squares that are tried on meta after all that the model knows."""


class UnrunnableError(InjectionError):
    """The model took none of the inputs tried; `failures` are the reasons, by turns on meta and for real."""

    def __init__(self, message: str, failures: Sequence[str]) -> None:
        self.failures = tuple(failures)
        super().__init__(message)


def prove_reach(model: nn.Module, adapters: Mapping[str, nn.Module], example_input: Any | None = None) -> None:
    """Run the model once, on the meta device if it can, and check that it calls each adapter.

    Parameters, buffers, training flags and random states are as before afterwards.

    Args:
        adapters: the adapters in the model by their layers' paths.
        example_input: a tensor or a tuple of arguments; None tries images of the sizes that the model knows.

    Raises:
        InjectionError: if an adapter is not called, or the model cannot be run on any input tried (UnrunnableError).
    """
    called: set[str] = set()
    hooks = [adapter.register_forward_pre_hook(_noting(called, path)) for path, adapter in adapters.items()]
    try:
        with _evaluating(model), torch.no_grad():
            _dry_forward(model, example_input, called)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [path for path in adapters if path not in called]
    if missed:
        raise InjectionError(
            f"{len(missed)} of {len(adapters)} adapters are never called by the model, so they would not learn: "
            f"{', '.join(missed[:8])}{' …' if len(missed) > 8 else ''}. The model uses these layers' weights without "
            f"calling the layers, or does not use them at all; leave them out with exclude=."
        )


def _noting(called: set[str], path: str) -> Callable[..., None]:
    def note(_module: nn.Module, _args: object) -> None:
        called.add(path)

    return note


def _dry_forward(model: nn.Module, example_input: Any | None, called: set[str]) -> None:
    """Run the model on the first input that it takes; `called` is of that run alone."""
    failures = []
    for inputs in _candidate_inputs(model, example_input):
        for run in (_forward_on_meta, _forward_for_real):
            called.clear()  # a run that failed half-way proves nothing
            try:
                return run(model, inputs)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                failures.append(f"{run.__name__[1:]} on {_shapes(inputs)}: {reason}")
    if example_input is None:  # a model made for other images may not know it (LeViT, MaxViT with img_size)
        for inputs in _squares(model, OTHER_SIZES):
            called.clear()
            try:
                return _forward_on_meta(model, inputs)
            except Exception:
                continue
        failures.append(f"forward_on_meta on squares of {', '.join(map(str, OTHER_SIZES))} pixels: none ran")
    raise UnrunnableError(
        f"{type(model).__name__} could not be run to check that its adapters are called. Pass example_input=, a tensor "
        f"(or tuple of arguments) that the model accepts. Tried:\n" + "\n".join(f"  - {f[:300]}" for f in failures),
        failures,
    )


def _forward_on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """No memory, no arithmetic: parameters and buffers are stood in for by meta tensors during the call."""
    with _on_meta(model):
        model(*(x.to("meta") if isinstance(x, Tensor) else x for x in inputs))


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Stand-ins for every parameter and buffer, then the very same objects again.

    Not torch.func.functional_call: on a module with two names (CoaT's shared MLPs) it leaves a stand-in behind.
    """
    stand_ins: dict[int, Tensor] = {}
    tables: list[dict[str, Any]] = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = stand_ins.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
        yield
    finally:
        for table, original in zip(tables, before, strict=True):
            table.clear()  # a forward may have added a buffer
            table.update(original)


def _forward_for_real(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """One tiny batch where the model lives, for models that cannot run on meta."""
    tensor = next(model.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))


def _candidate_inputs(model: nn.Module, example_input: Any | None) -> Iterator[tuple[Any, ...]]:
    if example_input is not None:
        yield example_input if isinstance(example_input, tuple) else (example_input,)
        return
    for size in dict.fromkeys(_input_sizes(model)):
        yield (torch.zeros(1, *size, dtype=_dtype(model)),)


def _squares(model: nn.Module, sizes: Sequence[int]) -> Iterator[tuple[Tensor]]:
    for size in sizes:
        yield (torch.zeros(1, _channels(model), size, size, dtype=_dtype(model)),)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _channels(model: nn.Module) -> int:
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if stem is None else stem.in_channels * (1 if stem.groups == 1 else stem.groups)


def _input_sizes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """(channels, height, width), likeliest first: the patch embedding's, the pretrained config's, common ones."""
    channels = _channels(model)
    known = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(known, (tuple, list)) and len(known) == 2:
        yield channels, int(known[0]), int(known[1])
    config = getattr(model, "pretrained_cfg", None) or {}
    for key in ("input_size", "test_input_size", "min_input_size"):
        size = config.get(key)
        if size:
            yield int(size[0]), int(size[1]), int(size[2])
            yield channels, int(size[1]), int(size[2])
    yield channels, 224, 224
    yield channels, 32, 32


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that no running statistic moves; each module's own flag comes back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(flags[model])  # some modules then forget what they computed in evaluation: LeViT's attention biases
        for module, training in flags.items():
            module.training = training


def _shapes(inputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
