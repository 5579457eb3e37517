"""An estimate, on paper, of what several GPUs gain: gradient bytes are counted, times given, the rest arithmetic.

DDP sums the gradient of what trains by a ring: each of n processes sends and receives 2 (n − 1) / n of its bytes
(Thakur et al., 2005). Nothing of it is hidden behind the backward pass here, so the truth should be better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timm
import torch
import tyro

from nolora_vision import AdapterConfig
from nolora_vision.methods import METHODS, apply_method
from nolora_vision.training.progress import print_columns


@dataclass(frozen=True)
class Link:
    """How fast processes talk.

    Args:
        gigabytes_per_s: in each direction, of one process.
        microseconds: before the first byte arrives, at each of the ring's 2 (n − 1) hops.
    """

    name: str
    gigabytes_per_s: float
    microseconds: float


LINKS = (
    Link("NVLink 4, 450 GB/s", 450, 5),
    Link("InfiniBand NDR, 50 GB/s", 50, 10),
    Link("Ethernet 25 Gbit/s", 3.125, 50),
)
"""Of the makers' data sheets, in one direction; none was measured here."""


def gradient_bytes(model: str, method: str, *, num_classes: int = 100) -> int:
    """Bytes that each process sends of one gradient: 4 of each number that trains; built without memory."""
    with torch.device("meta"):
        network = timm.create_model(model, num_classes=num_classes)
        apply_method(network, method, AdapterConfig(), options={})
    return sum(4 * p.numel() for p in network.parameters() if p.requires_grad)


def seconds_of_a_sum(nbytes: int, processes: int, link: Link) -> float:
    """Of one gradient by a ring."""
    hops = 2 * (processes - 1)
    return hops / processes * nbytes / (link.gigabytes_per_s * 1e9) + hops * link.microseconds * 1e-6


def efficiency_percent(nbytes: int, processes: int, link: Link, *, step_ms: float) -> float:
    """Of so many times the images per second of one process, with as many images in each."""
    return 100 * step_ms / (step_ms + 1e3 * seconds_of_a_sum(nbytes, processes, link))


def rows(model: str, methods: Sequence[str], processes: Sequence[int], step_ms: float) -> Iterator[tuple[str, ...]]:
    """A line for each method and link."""
    for method in methods:
        nbytes = gradient_bytes(model, method)
        for link in LINKS:
            sums = (f"{1e3 * seconds_of_a_sum(nbytes, n, link):.2f}" for n in processes)
            shares = (f"{efficiency_percent(nbytes, n, link, step_ms=step_ms):.1f}" for n in processes)
            yield method, f"{nbytes / 2**20:.1f}", link.name, *sums, *shares


def main(
    model: str = "vit_base_patch16_224",
    *,
    methods: tuple[str, ...] = ("nolora", "lora", "full"),
    processes: tuple[int, ...] = (8, 64),
    step_ms: float = 100.0,
) -> None:
    """Estimate what several GPUs gain; nothing is run.

    Args:
        model: Name of a timm model.
        methods: Of train.py.
        processes: One for each GPU.
        step_ms: Of one step on one of your GPUs: --batch-size over the images/s that train.py prints, times 1,000.
    """
    for method in methods:
        if method not in METHODS:
            raise SystemExit(f"There is no method {method!r}. Choose from: {', '.join(METHODS)}.")
    if step_ms <= 0 or min(processes) < 2:
        raise SystemExit("Wanted --step-ms above 0 and --processes of at least 2.")
    header = ["method", "gradient MiB", "link"]
    header += [f"sum ms, {n} GPUs" for n in processes] + [f"% of {n} times, est." for n in processes]
    title = f"{model}: an estimate, from a step of {step_ms:g} ms that was given and data sheets of links"
    print_columns(title, header, list(rows(model, methods, processes, step_ms)))


if __name__ == "__main__":
    tyro.cli(main)
