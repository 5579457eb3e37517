"""Every method, and every kind of consistency, trains under DDP, which refuses parameters that a step leaves out."""

import sys
from pathlib import Path

import pytest

from nolora_vision.methods import METHODS
from tests.training.forked_start import finished

SCRIPT = """
import timm, torch, torch.distributed as dist
import nolora_vision
from nolora_vision import AdapterConfig
from nolora_vision.methods import METHODS, apply_method
from nolora_vision.training.consistency import Batch, Every, Plain, Previous, Twice
from nolora_vision.training.engine import make_accelerator
from nolora_vision.training.processes import leave_processes

accelerator = make_accelerator("none")
OPTIONS = {"fourierft": {"n_frequency": 50}, "c3a": {"block_size": 16}, "oft": {"block_size": 16}}

def train(name, method, objective=Plain(), steps=3, **config):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=16, patch_size=4, depth=2, num_classes=3)
    apply_method(model, method, AdapterConfig(rank=4, **config), options=OPTIONS.get(method))
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(prepared, torch.nn.parallel.DistributedDataParallel)
    torch.manual_seed(1 + accelerator.process_index)
    x, y, rows = torch.randn(4, 3, 16, 16), torch.arange(4) % 3, torch.arange(4) + 4 * accelerator.process_index
    for step in range(steps):
        accelerator.backward(objective(prepared, Batch(x, y, rows, step)).loss)
        left_out = [k for k, p in trained.items() if p.grad is None]
        assert not left_out, (name, left_out)
        optimizer.step()
        optimizer.zero_grad()
    for k, p in trained.items():  # all processes have the same weights, and not those of the beginning
        mean = p.detach().clone()
        dist.all_reduce(mean)
        assert torch.equal(mean / 2, p.detach()), (name, k)
    changed = [k for k, p in trained.items() if not torch.equal(p.detach(), before[k])]
    assert any("head" not in k for k in changed) or method == "linear", name
    if accelerator.is_main_process:
        print("trained", name, flush=True)

loss = torch.nn.functional.cross_entropy
for method in METHODS:
    train(method, method)
modes = {
    "twice": lambda: Twice(loss, 0.1),
    "part": lambda: Twice(loss, 0.1, 0.5),
    "every": lambda: Every(2, Twice(loss, 0.1), Plain()),
    "previous": lambda: Previous(loss, 0.1, images=8, gather=accelerator.gather),
}
for mode, objective in modes.items():
    for modulation, f in (("none", "identity"), ("gate", "swish"), ("vector", "aurora")):
        noisy = {"nonlinearity": f, "modulation": modulation, "modulation_noise": 0.5}
        train(f"{mode} {modulation}", "nolora", objective(), **noisy)
leave_processes()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is not tried on Windows")
def test_every_method_and_every_consistency_trains_under_ddp(tmp_path: Path) -> None:
    script = tmp_path / "methods.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = finished(str(script), processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = [line.removeprefix("trained ") for line in done.stdout.splitlines() if line.startswith("trained ")]
    modes = [f"{m} {v}" for m in ("twice", "part", "every", "previous") for v in ("none", "gate", "vector")]
    assert trained == [*METHODS, *modes]
