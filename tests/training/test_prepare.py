"""Optimizer, schedule and average of a run, where they will run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nolora_vision
from nolora_vision.training import prepare as module
from nolora_vision.training.errors import RunError
from nolora_vision.training.ingredients import make_scheduler, refuse_few_images
from nolora_vision.training.prepare import average_of, prepare
from nolora_vision.training.run_config import RunConfig
from tests.families import FAMILIES


def test_the_average_is_made_where_the_model_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here the other device is meta."""
    found: list[set[str]] = []
    monkeypatch.setattr(module, "ModelEmaV3", lambda m, **_: found.append({p.device.type for p in m.parameters()}))
    accelerator = SimpleNamespace(device=torch.device("meta"), num_processes=1, prepare=lambda *parts: parts)
    prepare(RunConfig(model_ema=True), nolora_vision.inject(FAMILIES["vit"].build()), ([1], [1], [1]), accelerator)
    assert found == [{"meta"}]


def test_an_average_with_warm_up_follows_a_short_run() -> None:
    model = nn.Linear(2, 2)
    late, soon = (average_of(RunConfig(model_ema=True, model_ema_warmup=warmup), model) for warmup in (False, True))
    for ema in (late, soon):
        ema.update(model, step=1)  # timm's copies the weights there
    with torch.no_grad():
        model.weight += 1
    for step in range(2, 32):
        late.update(model, step=step)
        soon.update(model, step=step)
    left = [(model.weight - ema.module.weight).mean().item() for ema in (late, soon)]
    assert left[0] == pytest.approx(0.999**30, abs=1e-5) and left[1] < 0.01


def test_schedules_fall_within_the_training() -> None:
    def rates(**options: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make_scheduler(RunConfig(warmup_epochs=0, **options), optimizer, batches=10)
        found = []
        for update in range(1, 101):
            scheduler.step_update(update)
            found.append(round(optimizer.param_groups[0]["lr"], 6))
        return found

    thirds = rates(sched="step")
    assert {thirds[32], thirds[34], thirds[66], thirds[98]} == {1.0, 0.1, 0.01} and thirds[98] == 0.01
    halves = rates(sched="step", decay_epochs=5, decay_rate=0.5)
    assert halves[48] == 1.0 and halves[50] == 0.5
    line = rates(sched="poly")
    assert line[49] == pytest.approx(0.5) and line[79] == pytest.approx(0.2) and line[99] == 0
    for sched in ("cosine", "tanh"):
        curve = rates(sched=sched)
        assert curve[0] > curve[50] > curve[90] and curve[99] < 0.02


def test_few_images_are_no_step() -> None:
    config = RunConfig(batch_size=16)
    refuse_few_images(config, 10, processes=1)
    refuse_few_images(config, 32, processes=2)
    with pytest.raises(RunError, match=r"16 images in each of 2 processes, and there are 31 .* --batch-size 15, or"):
        refuse_few_images(config, 31, processes=2)
    with pytest.raises(RunError, match=r"there are 3 to train on\. Choose fewer processes\."):
        refuse_few_images(config, 3, processes=4)
    mixed = RunConfig(batch_size=16, mixup=0.2)
    refuse_few_images(mixed, 12, processes=1)
    with pytest.raises(RunError, match=r"13 training images make one batch, .* Choose --batch-size 12, which"):
        refuse_few_images(mixed, 13, processes=1)
