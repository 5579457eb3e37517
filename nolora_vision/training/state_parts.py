"""Nested state, such as an optimizer's, in two parts: its tensors by name, and the rest as JSON takes it; and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, DTYPE, NUMBERED = "tensor", "tuple", "dtype", "numbered"
"""What JSON has no word for stands there as a mapping with one of these keys alone."""


def take_apart(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value without its tensors, which go into `tensors` under names that begin with the place.

    Raises:
        TypeError: if it holds what neither tensors nor JSON can say.
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {TENSOR: place}
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        kept = {key: take_apart(item, f"{place}/{key}", tensors) for key, item in value.items()}
        return kept if all(isinstance(key, str) for key in kept) else {NUMBERED: list(kept.items())}
    if isinstance(value, (list, tuple)):
        items = [take_apart(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place} is {type(value).__name__}, which a checkpoint cannot hold.")


def put_together(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The value that was taken apart.

    Args:
        tensor: from a name in `tensors` to what lies there.
    """
    if isinstance(value, list):
        return [put_together(item, tensor) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {TENSOR}:
        return tensor(value[TENSOR])
    if set(value) == {DTYPE}:
        return getattr(torch, value[DTYPE])
    if set(value) == {TUPLE}:
        return tuple(put_together(item, tensor) for item in value[TUPLE])
    if set(value) == {NUMBERED}:
        return {key: put_together(item, tensor) for key, item in value[NUMBERED]}
    return {key: put_together(item, tensor) for key, item in value.items()}
