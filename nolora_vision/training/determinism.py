"""Runs that repeat bit for bit, on a GPU, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nolora_vision.training.errors import RunError


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within it PyTorch takes only algorithms that give the same bits each time, if that is wanted.

    Raises:
        RunError: if an operation has none on this device.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise RunError(f"--deterministic: {error} Train without it, or on another device.") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
