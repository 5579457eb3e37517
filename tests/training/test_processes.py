"""Two processes compute what one does with the same images in a step, and go on together where they were stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nolora_vision.training.lost_loaders import lost_worker_explained
from nolora_vision.training.run import main
from tests.training.forked_start import ROOT, TRAIN, finished, started

ARGS = ["--model", "test_vit", "--dataset", "digits", "--no-pretrained", "--img-size", "32", "--lr", "5e-3", "-j", "1"]
ARGS += ["--model-kwargs", "depth", "2", "--max-train-samples", "64", "--max-eval-samples", "61"]
ARGS += ["--reprob", "0.3"]


def trained(folder: Path, processes: int, *args: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Record and weights of a run."""
    done = finished(TRAIN, *ARGS, *args, processes=processes, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test top-1") == 1  # only the main process speaks
    record = json.loads((folder / "record.json").read_text())
    return record, load_file(folder / "adapter" / "adapter_model.safetensors")


LEAVES = """
import torch
from nolora_vision.training.engine import make_accelerator
from nolora_vision.training.processes import leave_processes

def train():
    model = make_accelerator("none").prepare(torch.nn.Linear(3, 3))
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()

train()
leave_processes()
"""


def test_processes_end_well_right_after_their_last_message(tmp_path: Path) -> None:
    """Without `leave_processes`, each launch aborted two times of three."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES, encoding="utf-8")
    for _ in range(3):
        done = finished(str(script), processes=2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


RUNS = """
import gc, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from nolora_vision.training import processes, run

def leave():
    assert torch.distributed.is_initialized(), "the connections ended before the model"
    assert not [x for x in gc.get_objects() if type(x) is DistributedDataParallel], "the model is still there"
    processes.leave_processes()

run.leave_processes = leave
sys.exit(run.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is not tried on Windows")
def test_the_wrapped_model_is_gone_before_the_connections_end(tmp_path: Path) -> None:
    """The other way round a run that was done hung now and then: its model was the last to hold gloo's threads."""
    script = tmp_path / "runs.py"
    script.write_text(RUNS, encoding="utf-8")
    place = ["--output", str(tmp_path), "--epochs", "1", "-b", "8"]
    done = finished(str(script), *ARGS, *place, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is not tried on Windows")
def test_two_processes_are_one_and_go_on_together(tmp_path: Path) -> None:
    place = ["--output", str(tmp_path), "--epochs", "2", "--experiment"]
    one, weights = trained(tmp_path / "one", 0, *place, "one", "-b", "16")
    two, others = trained(tmp_path / "two", 2, *place, "two", "-b", "8")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=2e-6)  # sums in another order: 4e-7 was seen
    for score in ("test_top1_percent", "val_top1_percent", "best_epoch"):
        assert two["metrics"][score] == one["metrics"][score]
    assert two["metrics"]["test_loss"] == pytest.approx(one["metrics"]["test_loss"], rel=1e-4)
    assert two["metrics"]["train_forward_images"] == one["metrics"]["train_forward_images"] == 128

    place = ["--output", str(tmp_path), "--epochs", "12", "-b", "8", "--validate-every", "0", "--experiment"]
    whole, weights = trained(tmp_path / "whole", 2, *place, "whole")
    log = tmp_path / "log"
    with started(TRAIN, *ARGS, *place, "part", processes=2, log=log) as process:
        process.until("epoch 2/12")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() != 0
    said = log.read_text()
    assert said.count("Stopping after this step") == 1 and "Go on: python train.py --resume" in said
    part, others = trained(tmp_path / "part", 2, *place, "part", "--resume", "auto")
    assert len(part["resumed_at_updates"]) == 1 and part["resumed_at_updates"][0] < 48
    assert all(torch.equal(others[name], value) for name, value in weights.items())
    assert part["metrics"]["test_loss"] == whole["metrics"]["test_loss"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux shows them")
def test_a_process_that_is_killed_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The first launch is a real one: nothing is forked."""
    place = ["--output", str(tmp_path), "--experiment", "run", "--epochs", "8", "-b", "8", "--validate-every", "0"]
    place += ["--checkpoint-steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*launch, "--standalone", TRAIN, *ARGS, *place]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while "epoch 2/8" not in log.read_text() and process.poll() is None:
            time.sleep(0.02)
        workers = children(process.pid)
        assert len(workers) == 2, log.read_text()
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait() != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "SIGKILL" in log.read_text()
    record, _ = trained(tmp_path / "run", 2, *place, "--resume", "auto")
    assert record["resumed_at_updates"][0] >= 4


KILLS = """
import multiprocessing, os, signal, sys, time
from nolora_vision.training import run
from nolora_vision.training.progress import Silence

class KillsLoaders(Silence):
    steps = 0

    def step(self, **_):
        self.steps += 1
        if self.steps == 3:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(1)
            print("the step goes on", flush=True)

run.LiveProgress = KillsLoaders
sys.exit(run.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_that_loads_images_and_dies_is_named(tmp_path: Path) -> None:
    script = tmp_path / "kills.py"
    script.write_text(KILLS, encoding="utf-8")
    args = [*ARGS, "--output", str(tmp_path), "--experiment", "run", "--epochs", "2", "-b", "8"]
    done = finished(str(script), *args, "--checkpoint-steps", "2", cwd=tmp_path)
    how = r"DataLoader worker .*exited unexpectedly|ConnectionResetError: .*|EOFError: .*|FileNotFoundError: .*"
    assert re.search(rf"A process that loads images died \(({how})\).*--workers 1", done.stderr), done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout.count("the step goes on") == 1  # torch's handler would raise in it
    assert main(["--resume", str(tmp_path / "run")]) == 0


def test_a_gradient_that_is_not_finite_is_told_once_and_with_its_layer(tmp_path: Path) -> None:
    args = ["--output", str(tmp_path), "--experiment", "run", "--epochs", "2", "-b", "8"]
    args += ["--img-size", "16", "--model-kwargs", "patch_size", "4"]
    args += ["--lr", "1e6", "--clip-grad", "None", "--warmup-epochs", "0"]
    done = finished(TRAIN, *ARGS, *args, processes=2, cwd=tmp_path)
    assert done.returncode != 0
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["of"] == "gradient" and "blocks." in failure["where"]
    assert done.stderr.count("train.py: The gradient is") == 1 and failure["error"] in done.stderr


DRAWS = """
import sys, torch
from nolora_vision.training import run
from nolora_vision.training.processes import gather_objects, on_main_process

def fit(*args, **options):
    drawn = gather_objects(torch.rand(1).item())
    if on_main_process():
        print("drawn", *drawn, flush=True)
    sys.exit(0)

run.fit = fit
run.main()
"""


def test_each_process_draws_its_own_noise_and_the_first_that_of_a_run_alone(tmp_path: Path) -> None:
    script = tmp_path / "draws.py"
    script.write_text(DRAWS, encoding="utf-8")
    drawn = []
    for processes in (0, 2):
        done = finished(str(script), *ARGS, "-b", "8", "--output", str(tmp_path), processes=processes, cwd=tmp_path)
        drawn.append(re.findall(r"^drawn (.*)$", done.stdout, re.MULTILINE)[0].split())
    (alone,), (first, second) = drawn
    assert first == alone != second


def test_other_errors_of_these_kinds_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), FileNotFoundError("x.png"), ConnectionResetError("of a tracker")):
        with pytest.raises(type(error)) as caught, lost_worker_explained():
            raise error
        assert caught.value is error
