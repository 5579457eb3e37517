"""What many adapters on one backbone cost: memory, the time to swap, and batches that mix them."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import tyro
from torch import nn

from nolora_vision import AdapterConfig, add_adapter, inject, load_adapter, save_adapter, set_adapter
from nolora_vision.training.progress import print_columns
from nolora_vision.training.record import environment, write_record


def main(
    *,
    model: str = "vit_base_patch16_224",
    adapters: int = 100,
    rank: int = 8,
    batch_size: int = 8,
    repeats: int = 9,
    output: Path | None = None,
) -> None:
    """Measure adding, swapping and mixing adapters on a timm model of random weights.

    Args:
        model: Name of the timm model.
        adapters: How many to add.
        rank: Of each.
        batch_size: Images in a mixed batch, over four adapters.
        repeats: Of each timing; medians and quartiles are shown.
        output: JSON file for the figures.
    """
    torch.manual_seed(0)
    bare = timm.create_model(model, num_classes=100).eval()
    with tempfile.TemporaryDirectory() as folder:
        directory = save_random_adapter(bare, AdapterConfig(rank=rank), Path(folder) / "adapter")
        memory = measure_memory(bare, directory, adapters)
        times = measure_times(bare, model, directory, batch_size, repeats)
    rows = [(name, f"{value / 2**20:.2f} MiB") for name, value in memory.items()]
    rows += [(name, f"{t['median_ms']:.2f} ms ({t['low_ms']:.2f} to {t['high_ms']:.2f})") for name, t in times.items()]
    print_columns(f"{adapters} adapters of rank {rank} on {model}", ("what", "measured"), rows)
    record = {"model": model, "adapters": adapters, "rank": rank, "batch_size": batch_size, "repeats": repeats}
    record |= {"bytes": memory, "times": times, "environment": environment()}
    if output is not None:
        write_record(output, record)
        print(output)


def save_random_adapter(bare: nn.Module, config: AdapterConfig, directory: Path) -> Path:
    """An adapter that does something, saved; the model is bare again afterwards."""
    from nolora_vision import eject

    inject(bare, config)
    for parameter in (p for p in bare.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.02)
    save_adapter(bare, directory)
    eject(bare)
    return directory


def measure_memory(bare: nn.Module, directory: Path, count: int) -> dict[str, int]:
    """Bytes: of one adapter's tensors with its head, of the backbone, and what the process grew by for each adapter."""
    with torch.inference_mode():
        bare(torch.zeros(1, 3, *_size(bare)))  # so that the first forward's buffers do not count
    add_adapter(bare, "0", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    own = (directory / "adapter_model.safetensors").stat().st_size
    before = psutil.Process().memory_info().rss
    for i in range(1, count):
        add_adapter(bare, f"{i}", directory)
    grown = psutil.Process().memory_info().rss - before
    backbone = sum(p.numel() * p.element_size() for name, p in bare.named_parameters() if ".adapter." not in name)
    return {
        f"file of one adapter and head ({config['tensors']} tensors)": own,
        "backbone with one head": backbone,
        f"the process grew for each of {count - 1} more by": grown // max(1, count - 1),
    }


def measure_times(
    bare: nn.Module, name: str, directory: Path, batch_size: int, repeats: int
) -> dict[str, Mapping[str, float]]:
    """Interleaved timings: swap, reload, build anew; one adapter for a batch, four mixed, four apart.

    A round begins and ends on adapter "0", so that each counted swap, to "1", changes the adapter.
    """
    images = torch.randn(batch_size, 3, *_size(bare))
    names = [f"{i * 4 // batch_size}" for i in range(batch_size)]
    other = timm.create_model(name, num_classes=100)
    other.load_state_dict({n: p for n, p in bare.state_dict().items() if ".adapter." not in n})
    load_adapter(other, directory)

    def apart() -> None:
        for i in range(4):
            set_adapter(bare, f"{i}")(images[[n == f"{i}" for n in names]])
        set_adapter(bare, "0")

    jobs: dict[str, Callable[[], Any]] = {
        "swap (set_adapter)": lambda: set_adapter(bare, "1"),
        "reload the files onto the model": lambda: load_adapter(other, directory),
        "build the model (without download)": lambda: timm.create_model(name, num_classes=100),
        f"batch of {batch_size}, one adapter": lambda: bare(images),
        f"batch of {batch_size}, four adapters mixed": lambda: bare(images, adapter_names=names),
        f"the same, four batches of {batch_size // 4} apart": apart,
    }
    found: dict[str, list[float]] = {what: [] for what in jobs}
    set_adapter(bare, "0")
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for what, job in jobs.items():
                started = time.perf_counter()
                job()
                if repeat:  # the first round warms up
                    found[what].append(1000 * (time.perf_counter() - started))
    return {what: _quartiles(values) for what, values in found.items()}


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"low_ms": low, "median_ms": median, "high_ms": high}


def _size(bare: nn.Module) -> tuple[int, int]:
    return tuple(bare.pretrained_cfg["input_size"][1:])  # type: ignore[return-value, index]


if __name__ == "__main__":
    tyro.cli(main)
