"""All that training changes, taken from the live objects and put back: weights, optimizer, averages, random numbers.

The schedule is none of it: timm's are functions of the count of updates, and the rates lie in the optimizer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nolora_vision.training.consistency import Objective
from nolora_vision.training.engine import restore, trained_copy
from nolora_vision.training.errors import RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.processes import gather_objects
from nolora_vision.training.sharded import split_like, whole
from nolora_vision.training.state_parts import put_together, take_apart

Tensors = dict[str, Tensor]


class Snapshot:
    """Takes the state of a run in training, and puts it back.

    Args:
        model: the bare one.
        ema: of `fit`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, objective: Objective, *, ema: Any | None, accelerator: Any
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.ema, self.accelerator = ema, accelerator

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.accelerator.num_processes

    def largest(self, numbers: list[int]) -> list[int]:
        """Each of the numbers where it is largest among the processes."""
        return self.accelerator.gather(torch.tensor([numbers], device=self.accelerator.device)).amax(0).tolist()

    def take(self, fit: Fit, sums: Mapping[str, float]) -> tuple[Tensors, dict[str, Any]]:
        """Tensors by name, and the rest as JSON takes it; of all processes, so each must call it.

        Args:
            sums: of the epoch so far, of this process.
        """
        tensors = {f"model/{name}": value for name, value in trained_copy(self.model, self.model).items()}
        tensors |= {f"best/{name}": value for name, value in fit.best_state.items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in trained_copy(self.model, self.ema.module).items()}
        optimizer = take_apart(self.optimizer.state_dict(), "optimizer", tensors)
        processes = gather_objects({"random": random_state(), "objective": self.objective.state(), "sums": dict(sums)})
        for i, process in enumerate(processes):
            for kind in ("random", "objective"):
                found = {k: v for k, v in process[kind].items() if isinstance(v, Tensor)}
                tensors |= {f"process/{i}/{kind}/{name}": value for name, value in found.items()}
                process[kind] = {k: v for k, v in process[kind].items() if k not in found}
        scaler = self.accelerator.scaler
        facts = {
            "fit": fit.facts(),
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": processes,
        }
        return {name: whole(value.detach()).cpu().contiguous() for name, value in tensors.items()}, facts

    def put(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Fit, dict[str, float]]:
        """Put the state back; returns how far the run was, and the sums of this process.

        Raises:
            RunError: if it is of a run with another number of processes.
        """
        there, here = len(facts["processes"]), self.accelerator.num_processes
        if there != here:
            raise RunError(f"The checkpoint is of a run with {there} processes, this one has {here}. Start as many.")
        restore(self.model, _under(tensors, "model/"))
        if self.ema is not None:
            restore(self.ema.module, _under(tensors, "ema/"))
        self.optimizer.load_state_dict(put_together(facts["optimizer"], partial(self._of_optimizer, tensors)))
        if self.accelerator.scaler is not None and facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        own, place = facts["processes"][self.accelerator.process_index], f"process/{self.accelerator.process_index}/"
        device = self.accelerator.device
        objective = {name: value.to(device) for name, value in _under(tensors, f"{place}objective/").items()}
        self.objective.load_state(objective)
        set_random_state({**own["random"], **_under(tensors, f"{place}random/")})
        return Fit.of(facts["fit"], _under(tensors, "best/")), own["sums"]

    def _of_optimizer(self, tensors: Mapping[str, Tensor], place: str) -> Tensor:
        """A tensor of the optimizer's state; one that is as large as its parameter is split as that is."""
        value, (_, of, index, *_) = tensors[place], place.split("/")
        if of != "state":
            return value
        p = [p for group in self.optimizer.param_groups for p in group["params"]][int(index)]
        return split_like(value, p) if value.shape == p.shape else value


def random_state() -> dict[str, Any]:
    """Of all generators that a step may draw from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    found["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put it back, from JSON, too."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
