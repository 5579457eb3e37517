"""FSDP's split parameters: the same training, checkpoints and adapters as without it, on two processes of the CPU."""

import sys
from pathlib import Path

import pytest

from tests.training.forked_start import finished

SCRIPT = """
import json, timm, torch
from torch.distributed.fsdp import fully_shard
import nolora_vision
from nolora_vision.training.consistency import Plain
from nolora_vision.training.engine import evaluate, fit, make_accelerator, restore, trained_copy
from nolora_vision.training.processes import leave_processes
from nolora_vision.training.progress import Silence
from nolora_vision.training.sharded import is_sharded
from nolora_vision.training.snapshot import Snapshot

ATOL, LOSS = 1e-5, 1e-4  # fp32: sums in another order; 2e-6 was seen in the weights after 9 steps of Adam
accelerator = make_accelerator("none")
schedule = type("Schedule", (), {"step_update": lambda self, updates: None})()
torch.manual_seed(1)
x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 3
data = torch.utils.data.TensorDataset(x, y)

def build():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=16, patch_size=4, depth=2, num_classes=3)
    nolora_vision.inject(model)
    return model

def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model

class Stops:
    def __init__(self, model, optimizer, at=None, state=None):
        self.snapshot = Snapshot(model, optimizer, Plain(), ema=None, accelerator=accelerator)
        self.at, self.state = at, state

    def begin(self):
        from nolora_vision.training.fit_state import Fit
        self.fit = self.snapshot.put(*self.state)[0] if self.state else Fit()
        return self.fit, {}

    def after_step(self, tally):
        if tally is None and self.fit.epochs == self.at:
            tensors, facts = self.snapshot.take(self.fit, {})
            self.saved = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(facts))

    def poll(self):
        pass

def train(model, wrap, *, at=None, state=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    val = torch.utils.data.DataLoader(data, batch_size=4)
    if wrap:
        model, *rest = accelerator.prepare(model, optimizer, loader, val)
    else:
        rest = accelerator.prepare(optimizer, loader, val)
    optimizer, loader, val = rest
    stops = Stops(accelerator.unwrap_model(model), optimizer, at, state)
    result = fit(model, optimizer, schedule, loader, val, accelerator=accelerator, epochs=3, progress=Silence(),
                 set_training_mode=lambda m: m.train(), clip_grad=1.0, keep_epoch="last", checkpointer=stops)
    return result, getattr(stops, "saved", None), val

plain, split = build(), shard(build())
assert is_sharded(split) and not is_sharded(plain)
expected, saved_plain, val = train(plain, True, at=1)
result, saved, _ = train(split, False, at=1)
for name, value in expected.best_state.items():
    assert type(result.best_state[name]) is torch.Tensor
    torch.testing.assert_close(result.best_state[name], value, rtol=1e-4, atol=ATOL)
for a, b in zip(expected.history, result.history):
    assert abs(a["val_loss"] - b["val_loss"]) < LOSS, (a, b)

again = shard(build())
resumed, _, _ = train(again, False, state=saved)
assert resumed.epochs == 3 and len(resumed.history) == 3
assert all(torch.equal(resumed.best_state[name], value) for name, value in result.best_state.items())

restore(again, {k.removeprefix("model/"): v for k, v in saved[0].items() if k.startswith("model/")})
for name, value in trained_copy(again, again).items():
    assert torch.equal(value, saved[0]["model/" + name])
restore(again, resumed.best_state)
scores = evaluate(again, val, accelerator=accelerator)
if accelerator.is_main_process:
    fresh = build()
    restore(fresh, resumed.best_state)
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(fresh.eval()(x).float(), y)
    assert abs(loss.item() - scores.loss) < LOSS, (loss, scores.loss)
print("all of it", flush=True)
del again, split, plain
leave_processes()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is not tried on Windows")
def test_fsdp_trains_saves_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = finished(str(script), processes=2, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("all of it") == 2, done.stderr
