"""What a model keeps for the backward pass, read off the autograd graph, and the real peak of its memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(output: Tensor, besides: Iterable[Tensor] = ()) -> int:
    """Bytes that the graph above an output keeps for the backward pass; shared memory counts once.

    The graph itself is read, without the hooks of `torch.autograd.graph.saved_tensors_hooks`: under hooks a node keeps
    everything that it might have made again.

    Args:
        besides: tensors that live anyway, such as parameters.
    """
    known = {t.untyped_storage().data_ptr() for t in besides}
    kept: dict[int, int] = {}
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        for tensor in _tensors_of(node):
            if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


def _tensors_of(node: Any) -> list[Tensor]:
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += list(getattr(node, "saved_tensors", ()))
    flat = [part for value in values for part in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that was allocated at once during a run, over what was there before."""
    return _peak_on_gpu(run) if device.type == "cuda" else _peak_on_cpu(run)


def _peak_on_gpu(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    """From the profiler's events of torch's own allocator; what libraries take for themselves it does not see."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first profile, which would print two lines for each
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    now = highest = 0
    for _, size in events:
        now += size
        highest = max(highest, now)
    return highest
