"""The processes of a run: which one writes and prints, what one of them finds out for all, how they part."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

T = TypeVar("T")


def processes() -> PartialState:
    """accelerate's view of the processes of this run.

    Asked without a flag, it takes several processes on processors for so many runs of their own, and keeps to that.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def leave_processes() -> None:
    """End the connections between processes, if there are any, before Python ends.

    A thread of gloo's that lets go of the last message, a Python object, while Python ends aborts the process (torch
    2.14), and DDP keeps those threads beyond the connections; so they are given the time to let go of it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)


def on_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes().is_main_process


def from_main_process(make: Callable[[], T]) -> T:
    """What `make()` returns on the main process, on every process; the others don't call it.

    Raises:
        Exception: on every process, what `make` raised on the main one.
    """
    outcome: list[Any] = [None]
    here = on_main_process()
    if here:
        try:
            outcome = [make()]
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        vars(outcome[0])["told_by_main"] = not here
        raise outcome[0]
    return outcome[0]


def gather_objects(own: Any) -> list[Any]:
    """What each process has, in their order."""
    return list(gather_object([own]))
