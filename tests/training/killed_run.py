"""A run that is killed again and again and goes on each time, beside one that nobody killed; a program of its own.

    python tests/training/killed_run.py FOLDER [KILLS] [EPOCHS] [SEED]

It forks, so that each start costs no imports, and what forks must have begun no threads: no test may call it in its own
process. The moments are random, but the first three are inside a step, a save and an evaluation. Prints a JSON with
what both runs gave, and how often it was killed in each of these.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nolora_vision.config import AdapterConfig
from nolora_vision.training import checkpoints, engine
from nolora_vision.training import run as run_module
from nolora_vision.training.progress import Silence
from nolora_vision.training.run_config import RunConfig

PLACES = ("start", "step", "save", "evaluation")
WHERE = mmap.mmap(-1, 1)
"""Where the child is, seen from the parent."""


def marked(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, saying where it is."""

    def call(*args: Any, **options: Any) -> Any:
        WHERE[0] = PLACES.index(place)
        try:
            return function(*args, **options)
        finally:
            WHERE[0] = PLACES.index("step")

    return call


def start(config: RunConfig) -> int:
    """A child that runs it; its process id."""
    WHERE[0] = 0
    if pid := os.fork():
        return pid
    checkpoints.write_directory = marked("save", checkpoints.write_directory)
    engine.evaluate = run_module.evaluate = marked("evaluation", engine.evaluate)
    run_module.fit = marked("step", engine.fit)
    os.dup2(2, 1)
    run_module.run(config, progress=Silence(), checkpoints=True)
    os._exit(0)


def seconds_of(pid: int) -> float:
    """From the beginning of the child's training to its end."""
    while WHERE[0] == 0:
        time.sleep(1e-3)
    began = time.perf_counter()
    assert os.waitpid(pid, 0)[1] == 0
    return time.perf_counter() - began


def moment(pid: int, place: str, draw: random.Random) -> None:
    """Wait until the child is there, and then a little."""
    while True:
        while PLACES[WHERE[0]] != place:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the run ended before it was killed"
            time.sleep(1e-4)
        time.sleep(draw.uniform(0, 2e-3))
        if PLACES[WHERE[0]] == place:
            return


def left_by(folder: Path) -> dict[str, Any]:
    """What must be the same: all of a run's results but times, memory and the folder's name."""
    record = json.loads((folder / "record.json").read_text())
    metrics = {k: v for k, v in record["metrics"].items() if not k.endswith(("seconds", "per_s")) and "memory" not in k}
    lines = [line.split(",")[:-2] for line in (folder / "summary.csv").read_text().splitlines()]  # the last are times
    return {
        "metrics": metrics,
        "summary": lines,
        "weights": (folder / "adapter" / "adapter_model.safetensors").read_bytes().hex(),
        "files": sorted(path.name for path in folder.iterdir()),
    }


def main(folder: Path, kills: int = 20, epochs: int = 24, seed: int = 0) -> None:
    """Both runs."""
    torch.set_num_threads(1)
    config = RunConfig(
        **{"model": "test_vit", "dataset": "digits", "pretrained": False, "img_size": 16, "workers": 0},
        model_kwargs={"patch_size": 4, "depth": 2},
        **{"max_train_samples": 64, "max_eval_samples": 300, "epochs": epochs, "batch_size": 16, "lr": 5e-3},
        adapter=AdapterConfig(modulation="gate", modulation_noise=0.5),
        **{"consistency": 0.1, "consistency_mode": "previous", "model_ema": True, "drop_path": 0.1},
        **{"checkpoint_steps": 1, "output": folder},
    )
    whole = seconds_of(start(replace(config, experiment="whole")))
    draw, killed_in = random.Random(seed), Counter()
    often = replace(config, experiment="killed", resume="auto")
    for i in range(kills):
        pid = start(often)
        while WHERE[0] == 0:
            time.sleep(1e-3)
        time.sleep(draw.uniform(0, 0.6 * whole / kills))
        if 1 + i < len(PLACES):
            moment(pid, PLACES[1 + i], draw)
        killed_in[PLACES[WHERE[0]]] += 1
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status), "the run ended before it was killed"
    seconds_of(start(often))
    print(json.dumps({"killed_in": killed_in, **{name: left_by(folder / name) for name in ("whole", "killed")}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
