"""fit and evaluate on objects small enough to check by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nolora_vision.training.backbone import training_mode
from nolora_vision.training.engine import evaluate, fit, make_accelerator, restore, slow_precision
from nolora_vision.training.errors import RunError
from nolora_vision.training.outputs import history_csv
from nolora_vision.training.progress import Silence

SCHEDULE = SimpleNamespace(step_update=lambda updates: None)


def batches(n: int, size: int, *, classes: int = 3) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(n, 4), torch.randint(0, classes, (n,))), batch_size=size)


def train(model: nn.Module, loader: DataLoader, *, lr: float = 0.1, accumulate: int = 1, epochs: int = 1, **options):
    accelerator = make_accelerator("none", grad_accum_steps=accumulate)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    prepared = accelerator.prepare(model, optimizer, loader)
    return fit(
        prepared[0],
        prepared[1],
        SCHEDULE,
        prepared[2],
        options.pop("val", batches(6, 6)),
        accelerator=accelerator,
        epochs=epochs,
        progress=Silence(),
        set_training_mode=training_mode,
        **options,
    )


def test_evaluate_counts_each_sample_once() -> None:
    model, loader = nn.Linear(4, 7), batches(23, 5, classes=7)
    scores = evaluate(model, loader, accelerator=make_accelerator("none"))
    x, y = loader.dataset.tensors
    logits = model(x)
    assert scores.top1_percent == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    top5 = sum(int(y[i] in logits[i].topk(5).indices) for i in range(23))
    assert scores.top5_percent == pytest.approx(100 * top5 / 23)
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert torch.equal(scores.predictions, logits.argmax(1)) and torch.equal(scores.labels, y)


@pytest.mark.parametrize("images", [32, 20, 24, 8])
def test_accumulated_batches_are_one_large_batch_however_many_an_epoch_ends_with(images: int) -> None:
    large = nn.Linear(4, 3)
    small = copy.deepcopy(large)
    train(large, batches(images, 16))
    train(small, batches(images, 4), accumulate=4)
    torch.testing.assert_close(small.weight, large.weight)


def test_the_best_epoch_by_validation_is_kept_not_the_last() -> None:
    model, loader = nn.Linear(4, 3), batches(12, 12)
    x = loader.dataset.tensors[0]
    at_first = TensorDataset(x, model(x).argmax(1))  # training towards other labels makes these ever less right
    result = train(model, loader, lr=0.2, epochs=40, val=DataLoader(at_first, batch_size=12))
    scores = [row["val_top1_percent"] for row in result.history]
    assert result.best_epoch == scores.index(max(scores)) + 1 and max(scores) > scores[-1]
    restore(model, result.best_state)
    judged = evaluate(model, DataLoader(at_first, batch_size=12), accelerator=make_accelerator("none"))
    assert judged.top1_percent == result.best_val_top1_percent == max(scores)


def test_the_last_epoch_is_kept_where_it_is_asked_for() -> None:
    model, loader = nn.Linear(4, 3), batches(12, 12)
    x = loader.dataset.tensors[0]
    at_first = TensorDataset(x, model(x).argmax(1))
    result = train(model, loader, lr=0.2, epochs=40, val=DataLoader(at_first, batch_size=12), keep_epoch="last")
    scores = [row["val_top1_percent"] for row in result.history]
    assert result.best_epoch == 40 and result.best_val_top1_percent == scores[-1] < max(scores)
    assert torch.equal(result.best_state["weight"], model.weight)


@pytest.mark.parametrize(("every", "validated"), [(0, [5]), (2, [2, 4, 5]), (9, [5])])
def test_the_last_epoch_is_validated_however_seldom_others_are(every: int, validated: list[int]) -> None:
    loader = batches(8, 8)
    result = train(nn.Linear(4, 3), loader, epochs=5, val=loader, validate_every=every)
    assert [row["epoch"] for row in result.history if "val_loss" in row] == validated
    assert result.best_epoch in validated
    first, *_, last = history_csv(result.history).splitlines()[1:]
    assert ",," in first and ",," not in last


def test_a_history_that_ends_without_validation_has_its_columns() -> None:
    first, second = {"epoch": 1, "val_loss": 2.0, "lr": 0.5}, {"epoch": 2, "lr": 0.1}
    assert history_csv([second, first, second]).splitlines() == ["epoch,val_loss,lr", "2,,0.1", "1,2.0,0.5", "2,,0.1"]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(RunError, match=r"The loss is nan at step 1 of epoch 1 \(learning rates: 0 0\.1\)\..* Try"):
        train(model, batches(4, 4))


def test_gradients_are_clipped() -> None:
    free, clipped = nn.Linear(4, 3), nn.Linear(4, 3)
    clipped.load_state_dict(free.state_dict())
    start = free.weight.detach().clone()
    train(free, batches(8, 8), lr=1.0)
    train(clipped, batches(8, 8), lr=1.0, clip_grad=1e-3)
    moved = [torch.cat([(m.weight - start).flatten()]).norm().item() for m in (free, clipped)]
    assert moved[0] > 1e-2 and moved[1] <= 1.001e-3


def test_the_moving_average_is_what_is_validated_and_kept() -> None:
    from timm.utils import ModelEmaV3

    model = nn.Linear(4, 3)
    start = model.weight.detach().clone()
    result = train(model, batches(12, 4), ema=ModelEmaV3(model, decay=0.9))
    last, kept = model.weight.detach().clone(), result.best_state["weight"]
    assert not torch.equal(kept, last) and (kept - start).norm() < (last - start).norm()


def test_frozen_norms_keep_their_statistics_in_training() -> None:
    frozen, trained = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, trained)
    training_mode(model)
    model(torch.randn(8, 4))
    assert not frozen.running_mean.any() and trained.running_mean.any()


def test_half_precision_needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match=r"--amp-dtype float16 needs a GPU\. Use bfloat16"):
            make_accelerator("float16")


@pytest.mark.parametrize(
    ("told", "slow"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_warned_about_where_a_processor_only_emulates_it(
    told: dict, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert (slow_precision("bfloat16") is not None) == slow
    assert slow_precision("none") is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_precision("bfloat16") is None


class Remembers(nn.Module):
    """As timm's LeViT: what it makes of its weights in evaluation is kept until it trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 2), None

    def train(self, mode: bool = True) -> "Remembers":
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None or self.training:
            self.kept = self.linear.bias.detach().clone()
        return x @ self.linear.weight.t() + self.kept


def test_an_evaluation_knows_nothing_of_the_last_one() -> None:
    model, x = Remembers(), torch.zeros(8, 4)
    batches, accelerator = DataLoader(TensorDataset(x, torch.ones(8).long()), batch_size=4), make_accelerator("none")
    scores = []
    for bias in ([1.0, -1.0], [-1.0, 1.0]):
        with torch.no_grad():
            model.linear.bias.copy_(torch.tensor(bias))
        scores.append(evaluate(model, batches, accelerator=accelerator).top1_percent)
    assert scores == [0.0, 100.0] and not model.training
