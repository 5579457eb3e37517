"""TensorBoard and Weights & Biases through accelerate; a run that goes on continues its curves, each epoch once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nolora_vision.training.config_file import as_plain
from nolora_vision.training.engine import log_row
from nolora_vision.training.run_config import RunConfig


def begin_trackers(
    accelerator: Any, config: RunConfig, folder: Path | None, history: Sequence[Mapping[str, float]]
) -> None:
    """Start what `report_to` names.

    Args:
        folder: of the run.
        history: of the epochs done before, if it goes on. TensorBoard forgets what it was told and is told these again:
            epochs after them are done anew, and what it had not written yet when the run was killed is lost.
    """
    if config.report_to == "none":
        return
    options: dict[str, Any] = {"tensorboard": {"purge_step": 0}} if history else {}
    if folder is not None:
        options["wandb"] = {"id": folder.name, "name": folder.name, "resume": "allow", "dir": str(folder)}
    facts = {"config": json.dumps(as_plain(asdict(config)))}
    accelerator.init_trackers("nolora-vision", config=facts, init_kwargs=options)
    for row in history:
        log_row(accelerator, row)


def end_trackers(accelerator: Any) -> None:
    """Let them write what they still hold.

    Not accelerate's `end_training`, which also ends the connections between processes: a DDP model that outlives them
    waits, as it is deleted, for a thread of gloo's that may be waiting for Python, so for ever (torch 2.10).
    """
    for tracker in accelerator.trackers:
        tracker.finish()
