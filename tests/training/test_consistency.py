"""What a step minimises, by hand; what a run counts; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision import AdapterConfig, ConfigError
from nolora_vision.training.consistency import Batch, Every, Objective, Outcome, Plain, Previous, Twice
from nolora_vision.training.data import load_data, make_loader
from nolora_vision.training.engine import fit, make_accelerator
from nolora_vision.training.errors import RunError
from nolora_vision.training.ingredients import objective_of
from nolora_vision.training.progress import Silence
from nolora_vision.training.run import main
from nolora_vision.training.run_config import RunConfig

ROOT = Path(__file__).parents[2]
LAMBDA = 0.3
NOISY = AdapterConfig(modulation_noise=0.5)


class Noisy(nn.Module):
    """A linear model with noise on its outputs, which remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
            self.calls.append(logits.detach())
        return logits


def batch(n: int = 5, epoch: int = 0, rows: Tensor | None = None) -> Batch:
    return Batch(torch.randn(n, 4), torch.arange(n) % 3, rows, epoch)


def itself(t: Tensor) -> Tensor:
    return t


# ------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("weight", [0.0, LAMBDA])
def test_twice_is_the_mean_of_both_and_their_distance(weight: float) -> None:
    model, seen = Noisy(), batch()
    outcome = Twice(F.cross_entropy, weight)(model, seen)
    (logits,) = model.calls
    first, second = logits[:5], logits[5:]
    expected = (F.cross_entropy(first, seen.targets) + F.cross_entropy(second, seen.targets)) / 2
    expected = expected + weight * ((first - second) ** 2).sum(1).mean()
    torch.testing.assert_close(outcome.loss.detach(), expected)
    assert torch.equal(outcome.logits, first) and outcome.passes == 10


def test_a_part_is_looked_at_twice() -> None:
    model, seen = Noisy(), batch(5)
    outcome = Twice(F.cross_entropy, LAMBDA, share=0.4)(model, seen)
    (logits,) = model.calls
    assert len(logits) == outcome.passes == 7
    each = F.cross_entropy(logits, torch.cat([seen.targets, seen.targets[:2]]), reduction="none")
    by_image = torch.cat([(each[:2] + each[5:]) / 2, each[2:5]])
    expected = by_image.mean() + LAMBDA * ((logits[:2] - logits[5:]) ** 2).sum(1).mean()
    torch.testing.assert_close(outcome.loss.detach(), expected)
    assert torch.equal(outcome.logits, logits[:5])
    assert Twice(F.cross_entropy, LAMBDA, share=0.01)(model, seen).passes == 6


def test_copies_share_a_mix() -> None:
    from timm.loss import SoftTargetCrossEntropy

    model, soft = Noisy(), torch.rand(4, 3).softmax(1)
    outcome = Twice(SoftTargetCrossEntropy(), 0.0)(model, Batch(torch.randn(4, 4), soft, None, 0))
    expected = -(torch.cat([soft, soft]) * model.calls[0].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(outcome.loss.detach(), expected)


def test_every_takes_turns() -> None:
    model = Noisy()
    objective = Every(3, Twice(F.cross_entropy, LAMBDA), Plain())
    assert [objective(model, batch(5, epoch)).passes for epoch in (0, 0, 0, 0, 1, 1, 1)] == [10, 5, 5, 10, 5, 5, 10]
    plain = Plain()(model, seen := batch(4))
    assert torch.equal(plain.loss, F.cross_entropy(plain.logits, seen.targets)) and plain.passes == 4


def test_previous_compares_with_the_logits_of_the_last_epoch() -> None:
    """Rows 0 to 6 in another order each epoch; row 6 is left out of the first, row 0 out of the second."""
    model = Noisy()
    objective = Previous(F.cross_entropy, LAMBDA, images=7, gather=itself)
    orders = ([[5, 0, 2], [1, 4, 3]], [[6, 3, 5], [2, 1, 4]], [[0, 6, 1], [2, 3, 4]])
    last: dict[int, Tensor] = {}
    for epoch, batches in enumerate(orders):
        now: dict[int, Tensor] = {}
        for rows in batches:
            seen = batch(3, epoch, torch.tensor(rows))
            outcome = objective(model, seen)
            logits = model.calls[-1]
            expected = F.cross_entropy(logits, seen.targets)
            distances = [((logits[i] - last[row]) ** 2).sum() for i, row in enumerate(rows) if row in last]
            assert len(distances) == (0 if epoch == 0 else 2 if rows[0] in (6, 0) else 3)
            if distances:
                expected = expected + LAMBDA * torch.stack(distances).mean()
            torch.testing.assert_close(outcome.loss.detach(), expected)
            assert outcome.passes == 3
            now |= dict(zip(rows, logits, strict=True))
        last = now
    with pytest.raises(ValueError, match="yields no indices of its images: make it with `with_rows=True`"):
        objective(model, batch(3, 3))


def test_previous_has_no_term_where_a_whole_batch_is_new() -> None:
    model = Noisy()
    objective = Previous(F.cross_entropy, LAMBDA, images=4, gather=itself)
    objective(model, batch(2, 0, torch.tensor([0, 1])))
    outcome = objective(model, seen := batch(2, 1, torch.tensor([2, 3])))
    torch.testing.assert_close(outcome.loss, F.cross_entropy(outcome.logits, seen.targets))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Plain),
        ({"consistency": 0.1}, Twice),
        ({"consistency_mode": "twice"}, Twice),
        ({"consistency": 0.1, "consistency_mode": "part", "consistency_fraction": 0.25}, Twice),
        ({"consistency": 0.1, "consistency_mode": "every", "consistency_every": 3}, Every),
        ({"consistency": 0.1, "consistency_mode": "previous"}, Previous),
    ],
)
def test_the_objective_of_a_config(options: dict, kind: type) -> None:
    objective = objective_of(RunConfig(adapter=NOISY, **options), images=9, gather=itself)
    assert type(objective) is kind
    if isinstance(objective, Twice):
        share = options.get("consistency_fraction", 1.0)
        assert (objective.weight, objective.share) == (options.get("consistency", 0.0), share)
    if isinstance(objective, Every):
        assert objective.period == 3 and isinstance(objective.first, Twice) and isinstance(objective.between, Plain)


# -------------------------------------------------------------------------------------------------------------- fit


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int) -> None:
        torch.manual_seed(1)
        self.x, self.y = torch.randn(n, 4), torch.arange(n) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.x[index], int(self.y[index]), index


class Steps(Silence):
    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def step(self, *, loss: float, top1: float, images_per_s: float) -> None:
        self.told.append({"loss": loss, "top1": top1})


def train(model: nn.Module, objective: Objective, *, accumulate: int = 1, epochs: int = 2, progress=None, **options):
    accelerator = make_accelerator("none", grad_accum_steps=accumulate)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.1))
    loader = torch.utils.data.DataLoader(Rows(12), batch_size=4, shuffle=True)
    val = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(3, 4), torch.arange(3)), batch_size=3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    class Schedule:
        def step_update(self, updates: int) -> None:
            optimizer.param_groups[0]["lr"] *= 0.5

    return fit(
        prepared,
        optimizer,
        Schedule(),
        loader,
        val,
        accelerator=accelerator,
        epochs=epochs,
        progress=progress or Silence(),
        set_training_mode=lambda m: m.train(),
        objective=objective,
        **options,
    )


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (Plain, 24),
        (lambda: Twice(F.cross_entropy, LAMBDA), 48),
        (lambda: Twice(F.cross_entropy, LAMBDA, share=0.5), 36),
        (lambda: Every(2, Twice(F.cross_entropy, LAMBDA), Plain()), 36),
        (lambda: Previous(F.cross_entropy, LAMBDA, images=12, gather=itself), 24),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_images_and_passes_are_counted(make: Callable[[], Objective], passes: int, accumulate: int) -> None:
    model = Noisy()
    result = train(model, make(), accumulate=accumulate, clip_grad=1.0)
    assert result.images_seen == 24 and result.forward_images == passes == sum(map(len, model.calls))


def test_each_step_is_told_once_and_in_order() -> None:
    model, progress = Noisy(), Steps()
    result = train(model, Twice(F.cross_entropy, 0.0), progress=progress)
    labels = Rows(12).y
    assert len(progress.told) == 6
    assert progress.told[2]["loss"] == result.history[0]["train_loss"]
    assert progress.told[5]["top1"] == result.history[1]["train_top1_percent"]
    first = progress.told[0]
    assert progress.told[1] != first and len(labels) == 12
    assert first["top1"] in (0, 25, 50, 75, 100)


class NotFinite:
    """An objective whose loss is infinite in one of its steps."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: nn.Module, seen: Batch) -> Outcome:
        self.calls += 1
        outcome = Plain()(model, seen)
        return outcome._replace(loss=outcome.loss * (float("inf") if self.calls == self.at else 1))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (1, r"The loss is inf at step 1 of epoch 1 \(learning rates: 0 0\.1\)\..* Try"),
        (2, r"The loss is inf at step 2 of epoch 1 \(learning rates: 0 0\.05\)"),
        (3, r"at step 3 of epoch 1 \(learning rates: 0 0\.025\)"),
        (5, r"at step 2 of epoch 2"),
        (6, r"at step 3 of epoch 2"),
    ],
)
def test_the_step_that_was_not_finite_is_named_before_its_epoch_is_judged(at: int, message: str) -> None:
    judged = []

    class Judged(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                judged.append(bool(self.linear.weight.isfinite().all()))
            return super().forward(x)

    with pytest.raises(RunError, match=message):
        train(Judged(), NotFinite(at))
    assert judged == [True] * ((at - 1) // 3)


# ----------------------------------------------------------------------------------------------------- data and runs


def test_the_loader_yields_rows_only_when_asked() -> None:
    data = load_data("digits", max_train_samples=12)
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    config |= {"crop_pct": 1.0, "crop_mode": "center"}
    plain = [*make_loader(data.train, config, batch_size=5, training=True)]
    with_rows = [*make_loader(data.train, config, batch_size=5, training=True, with_rows=True)]
    assert [len(seen) for seen in plain] == [2, 2] and [len(seen) for seen in with_rows] == [3, 3]
    for _, labels, rows in with_rows:
        assert labels.tolist() == data.train.labels[rows.numpy()].tolist()
    rows = torch.cat([rows for _, _, rows in with_rows])
    assert len(rows.unique()) == 10 and rows.max() < 12


SMALL = ["--model", "test_vit", "--dataset", "digits:5-9", "--img-size", "16", "--model-kwargs", "patch_size", "4"]
SMALL += ["--workers", "0", "--max-train-samples", "64", "--max-eval-samples", "32", "--epochs", "2", "-b", "16"]
SMALL += ["--no-pretrained", "--experiment", "run", "--adapter.modulation-noise", "0.5", "--consistency", "0.1"]


@pytest.mark.parametrize(
    ("args", "passes"),
    [
        ("--consistency-mode twice --method lora --grad-accum-steps 2 --mixup 0.2 --model-ema", 256),
        ("--consistency-mode part --consistency-fraction 0.25 --amp-dtype bfloat16 --grad-checkpointing", 160),
        ("--consistency-mode every --consistency-every 4 --clip-grad 0.5", 160),
        ("--consistency-mode previous --method lora --smoothing 0.1", 128),
    ],
)
def test_runs_say_how_many_images_went_through(tmp_path: Path, args: str, passes: int) -> None:
    assert main([*SMALL, "--output", str(tmp_path), *args.split()]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["metrics"]["train_forward_images"] == passes
    assert record["config"]["consistency"] == 0.1 and record["config"]["adapter"]["modulation_noise"] == 0.5


TWO_PROCESSES = """
import sys, torch
from torch.nn import functional as F
sys.path[:0] = [{root!r}]
import nolora_vision, timm
from tests.training.test_consistency import Rows, Noisy
from nolora_vision.training.consistency import Previous, Twice
from nolora_vision.training.engine import fit, make_accelerator, seed_everything
from nolora_vision.training.processes import leave_processes
from nolora_vision.training.progress import Silence

accelerator = make_accelerator("none")
assert accelerator.num_processes == 2
schedule = type("Schedule", (), {{"step_update": lambda self, updates: None}})()

def train(model, objective, data, lr):
    seed_everything(0)
    torch.manual_seed(accelerator.process_index)  # noise and order of its own
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    val = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=4)
    prepared = accelerator.prepare(model, optimizer, loader)
    return fit(*prepared[:2], schedule, prepared[2], accelerator.prepare(val), accelerator=accelerator, epochs=3,
               progress=Silence(), set_training_mode=lambda m: m.train(), objective=objective)

data, model = Rows(16), Noisy()
model.forward = lambda x: model.linear(x)
torch.manual_seed(0)
torch.nn.init.normal_(model.linear.weight)
objective = Previous(F.cross_entropy, 0.3, images=16, gather=accelerator.gather)
result = train(model, objective, data, lr=0.0)  # so each image has the same logits in every epoch
logits, known = objective.last
assert known.all() and len(torch.cat([rows for rows, _ in objective.seen])) == 8
torch.testing.assert_close(logits, model.linear(data.x))  # also of the rows that the other process saw
assert result.images_seen == result.forward_images == 48
plain = F.cross_entropy(model.linear(data.x), data.y).item()
loss = accelerator.gather(torch.tensor([result.history[2]["train_loss"]])).mean().item()
assert abs(loss - plain) < 1e-5, (loss, plain)  # fp32; no distance to what has not changed

torch.manual_seed(0)
vit = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=3)
nolora_vision.inject(vit, modulation_noise=0.5)
data.x = torch.randn(16, 3, 16, 16)
result = train(vit, Twice(F.cross_entropy, 0.1), data, lr=0.1)
assert (result.images_seen, result.forward_images) == (48, 96)
trained = torch.cat([p.detach().flatten() for p in nolora_vision.adapter_parameters(vit)])
both = accelerator.gather(trained[None])
assert torch.equal(both[0], both[1])
open(f"done-{{accelerator.process_index}}", "w").close()
leave_processes()
"""


def test_two_processes_share_what_they_saw(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["nolora", "lora"])
def test_consistency_needs_noise_on_v(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"consistency of {method} needs noise on v.* set adapter\.modulation_noise"):
        RunConfig(method=method, consistency=0.1, drop_path=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs noise on v"):
        RunConfig(method=method, consistency_mode="twice")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs noise on v"):
        RunConfig(method=method, consistency_mode="previous", no_aug=True)  # type: ignore[arg-type]
    assert RunConfig(method=method, consistency_mode="previous").consistency_in_use  # type: ignore[arg-type]
    assert RunConfig(method=method, consistency=0.1, adapter=NOISY).consistency_in_use == "twice"  # type: ignore[arg-type]
    assert RunConfig(method=method, adapter=NOISY).consistency_in_use is None  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["linear", "full"])
def test_or_another_source_of_it(method: str) -> None:
    message = rf"consistency of {method} needs another source of noise, as it has no v.* set drop_path, or drop_rate in"
    with pytest.raises(ConfigError, match=message):
        RunConfig(method=method, consistency=0.1, adapter=NOISY)  # type: ignore[arg-type]
    for options in ({"drop_path": 0.1}, {"model_kwargs": {"drop_rate": 0.1}}):
        assert RunConfig(method=method, consistency=0.1, **options).consistency_in_use == "twice"  # type: ignore[arg-type]


def test_every_other_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(
            consistency=-1,
            consistency_mode="previous",
            consistency_fraction=0,
            no_aug=True,
            consistency_every=0,
            mixup=0.2,
            epochs=0,
        )
    for part in (
        "consistency must be a number of at least 0, got -1",
        "consistency_fraction must be a number above 0 and at most 1, got 0",
        "consistency_every must be a whole number of at least 1, got 0",
        "consistency of nolora needs noise on v",
        "consistency_mode previous does not go with mixup or cutmix",
        "epochs must be a whole number of at least 1, got 0",
    ):
        assert part in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"consistency_mode must be one of twice, .*got 'twise'\. Did you mean 'twice'"
    ):
        RunConfig(consistency_mode="twise", adapter=NOISY)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="consistency_fraction must be a number above 0 and at most 1, got 2"):
        RunConfig(consistency_fraction=2)
    for mode in ("twice", "part", "every"):
        assert RunConfig(consistency=0.1, consistency_mode=mode, mixup=0.2, adapter=NOISY)  # type: ignore[arg-type]
