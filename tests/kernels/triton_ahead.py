"""Compile the Triton kernels for an H100 that is not there, exactly as the launchers would, and say what each one uses.

`python -m tests.kernels.triton_ahead [NONLINEARITY …]` prints the table over modulations, ranks and types.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import FORMULAS, LowRank, triton_rank, triton_stack, triton_stages

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Use(NamedTuple):
    """What a compiled kernel needs of a GPU, by ptxas."""

    kernel: str
    registers: int
    """Of each thread; 255 is the most there are."""
    spilled_bytes: int
    """Of each thread: what did not fit into registers and is stored and loaded instead."""
    shared_bytes: int
    """Of each program; an H100 has 227 KiB for all programs on one processor."""


def meta_branch(
    nonlinearity: str, modulation: str, r: int, *, d: int, e: int, samples: int | None = None, dtype: torch.dtype
) -> LowRank:
    """A branch without values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    theta = tuple(empty(*make(r).shape) for make in FORMULAS[nonlinearity].theta.values())
    v = None if modulation == "none" else empty(r) if samples is None else empty(samples, 1, r)
    gate = (empty(r, r), empty(r)) if modulation == "gate" else None
    return LowRank(empty(r, d), empty(e, r), v, gate, nonlinearity, theta)


def launches(
    branches: Sequence[LowRank], dtype: torch.dtype, *, m: int, rows_per_sample: int, halves: bool = False
) -> list[tuple[Any, Any]]:
    """(kernel, its arguments) for forward and backward of an update on M rows, as the launchers would run them.

    K1, K3 and K4, then the rank space alone.

    Args:
        halves: also the kernels for a part of the work: a frozen adapter, dA alone, dx alone.
    """
    found: list[tuple[Any, Any]] = []

    def note(kernel: Any, grid: Any, blocks: triton_stages.Blocks, known: dict[str, Any]) -> None:
        shape = {"ROWS": blocks.rows, "COLUMNS": blocks.columns}
        found.append((kernel, known | shape | {"num_warps": blocks.warps, "num_stages": blocks.stages}))

    d, e = branches[0].down.shape[1], branches[0].up.shape[0]
    x, dy = (torch.empty(m, width, device="meta", dtype=dtype) for width in (d, e))
    with (
        mock.patch.object(triton_stages, "launch", note),
        mock.patch.object(triton_rank, "launch", note),
        mock.patch.object(triton_stack, "unfit_device", lambda x: None),
    ):
        down = torch.empty(sum(branch.down.shape[0] for branch in branches), d, device="meta", dtype=dtype)
        h, _ = triton_stages.rank_features(x, down, branches, dtype, rows_per_sample)
        up = torch.empty(e, h.shape[1], device="meta", dtype=dtype)
        dh, _, _ = triton_stages.rank_gradients(dy, h, branches, up, rows_per_sample)
        triton_stages.input_gradients(x, dh, down, torch.empty_like(x))
        if halves:
            triton_stages.rank_gradients(dy, h, branches, up, rows_per_sample, trains=False)
            triton_stages.down_gradient(x, dh)
            triton_stages.add_input_gradient(torch.empty_like(x), dh, down)
        h, _ = triton_rank.rank_features(x, down, branches, dtype, rows_per_sample)
        triton_rank.rank_gradients(dy, h, branches, up, rows_per_sample)
    return found


def compiled(kernel: Any, arguments: dict[str, Any]) -> Any:
    """The kernel for an H100, with the alignment that these sizes and PyTorch's allocator give."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligned = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(index,)] = POINTERS[value.dtype], aligned
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = aligned
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=H100, options=options)


def use_of(kernel: Any) -> Use:
    """What ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    return Use(kernel.metadata.name, registers, spilled, kernel.metadata.shared)


def uses(
    nonlinearity: str,
    modulation: str,
    ranks: Sequence[int],
    dtype: torch.dtype,
    samples: int | None = None,
    halves: bool = False,
) -> Iterator[Use]:
    """K1, K3, K4 and the rank space alone on ViT-B's qkv at batch 64."""
    branches = [
        meta_branch(nonlinearity, modulation, r, d=768, e=2304, samples=samples, dtype=torch.float32) for r in ranks
    ]
    for kernel, arguments in launches(branches, dtype, m=12_608, rows_per_sample=197, halves=halves):
        yield use_of(compiled(kernel, arguments))


def main() -> None:
    """The table, of all nonlinearities or of those that are named."""
    for nonlinearity, modulation, ranks, dtype in product(
        sys.argv[1:] or NONLINEARITIES, MODULATIONS, ([8], [8] * 3, [64]), POINTERS
    ):
        for use in uses(nonlinearity, modulation, ranks, dtype):
            sizes = f"{use.registers:4d} registers {use.spilled_bytes:5d} B spilled {use.shared_bytes:7d} B shared"
            print(f"{use.kernel:17} {nonlinearity:14}{modulation:7}{ranks!s:12} {str(dtype)[6:]:9} {sizes}", flush=True)


if __name__ == "__main__":
    main()
