"""Numbers that go wrong are found at their step, with their layer; what was good is kept."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nolora_vision
from nolora_vision.training import run as run_module
from nolora_vision.training.consistency import Batch, Outcome, Plain
from nolora_vision.training.determinism import deterministic_algorithms
from nolora_vision.training.engine import evaluate, fit, make_accelerator
from nolora_vision.training.errors import NotFiniteError, RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.health import collapsed, first_not_finite, tensors_of
from nolora_vision.training.progress import Silence
from nolora_vision.training.run import main
from nolora_vision.training.tally import rates_of

ADAM = partial(torch.optim.AdamW, fused=True)


class Bad(torch.autograd.Function):
    """Gives what it got, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("inf")


class Breaks(nn.Module):
    """Three layers; from some call on, one of them goes wrong."""

    def __init__(self, at: int, *, forward: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.at, self.forward_too, self.calls = at, forward, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        x = self.two(self.one(x))
        if self.calls >= self.at and self.training:
            x = x * float("inf") if self.forward_too else Bad.apply(x)
        return self.three(x)  # type: ignore[arg-type]


def loader(n: int = 8, batch_size: int = 4) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(n, 4), torch.arange(n) % 3), batch_size=batch_size)


def train(model: nn.Module, *, opt: Any = ADAM, progress: Any = None, epochs: int = 3, **settings: Any) -> Fit:
    accelerator = settings.pop("accelerator", None) or make_accelerator("none")
    lr = settings.pop("lr", 0.1)
    optimizer = opt([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = type("Schedule", (), {"step_update": lambda self, updates: None})()
    val = settings.pop("val", None) or loader()
    model, optimizer, batches, val = accelerator.prepare(model, optimizer, loader(), val)
    options = {"epochs": epochs, "progress": progress or Silence(), "set_training_mode": lambda m: m.train()}
    return fit(model, optimizer, schedule, batches, val, accelerator=accelerator, **options, **settings)


# ------------------------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_the_weights_are_those_from_before_the_step(clip_grad: float | None, forward: bool) -> None:
    model, good = Breaks(4, forward=forward), Breaks(99, forward=forward)
    good.load_state_dict(model.state_dict())
    with pytest.raises(NotFiniteError, match=r"at step 2 of epoch 2 \(learning rates: 0 0\.1\)") as caught:
        train(model, clip_grad=clip_grad)
    error = caught.value
    assert error.weights_kept and error.of == ("loss" if forward else "gradient")
    assert error.fit.epochs == 1 and error.fit.best_epoch == 1

    class Stop(Exception):
        pass

    def after_three(model: nn.Module, batch: Batch, plain: Plain = Plain()) -> Outcome:  # noqa: B008
        if good.calls == 3:
            raise Stop
        return plain(model, batch)

    with pytest.raises(Stop):
        train(good, clip_grad=clip_grad, objective=after_three)
    for name, value in good.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_an_optimizer_that_cannot_leave_an_update_out_is_told_of() -> None:
    with pytest.raises(NotFiniteError, match=r"4 of its parameters are not finite, the last one two\.bias") as caught:
        train(Breaks(2, forward=False), opt=torch.optim.SGD, epochs=1)
    assert not caught.value.weights_kept and not caught.value.fit.best_state


def test_a_finite_run_is_the_same_with_and_without_the_guard() -> None:
    guarded, free = Breaks(99, forward=True), Breaks(99, forward=True)
    free.load_state_dict(guarded.state_dict())
    train(guarded, clip_grad=None)
    optimizer = ADAM(free.parameters(), lr=0.1)
    free.train()
    for _ in range(3):
        for x, y in loader():
            F.cross_entropy(free(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in free.state_dict().items():
        assert torch.equal(guarded.state_dict()[name], value), name


# ------------------------------------------------------------------------------------------------------- the layer


def batch_of(*shape: int) -> Batch:
    return Batch(torch.randn(*shape), torch.arange(shape[0]) % 3, None, 0)


def adapted() -> nn.Module:
    model = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=3)
    nolora_vision.inject(model)
    for p in nolora_vision.adapter_parameters(model):
        nn.init.normal_(p, std=0.02)
    return model.train()


def test_the_layer_whose_output_overflows_is_named() -> None:
    model = adapted()
    assert first_not_finite(model, Plain(), batch_of(4, 3, 16, 16)) is None
    layer = model.get_submodule("blocks.1.mlp.fc1")
    handle = layer.register_forward_hook(lambda module, given, output: output * float("inf"))
    named = first_not_finite(model, Plain(), batch_of(4, 3, 16, 16))
    assert named == "blocks.1.mlp.fc1 makes of finite numbers some that are not"
    handle.remove()
    assert first_not_finite(model, Plain(), batch_of(4, 3, 16, 16)) is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_layer_that_the_bad_gradient_comes_from_is_named() -> None:
    model = adapted()
    model.get_submodule("blocks.1.attn.proj").register_forward_hook(lambda module, given, output: Bad.apply(output))
    named = first_not_finite(model, Plain(), batch_of(4, 3, 16, 16))
    assert named == "the gradient is not finite any more where it has come back through blocks.1.attn.proj"


def test_or_the_layer_before_what_is_no_layer() -> None:
    model = Breaks(1, forward=False).train()
    named = first_not_finite(model, Plain(), batch_of(4, 4))
    assert named == "the gradient is not finite any more where it comes to the output of two"


def test_what_is_no_tensor_is_passed_over() -> None:
    x = torch.ones(2)
    assert tensors_of(["words", (x, None, 3), {"a": x}, torch.ones(2, dtype=torch.int64)]) == [x]


def test_a_loss_that_is_not_finite_by_itself_is_named() -> None:
    def objective(model: nn.Module, batch: Batch) -> Outcome:
        outcome = Plain()(model, batch)
        return outcome._replace(loss=outcome.loss / 0)

    assert first_not_finite(adapted(), objective, batch_of(4, 3, 16, 16)) == "the loss is computed from finite logits"


# ----------------------------------------------------------------------------------------------------- what is kept

ARGS = ["--model", "test_vit", "--dataset", "digits", "--no-pretrained", "--img-size", "16", "--model-kwargs"]
ARGS += ["patch_size", "4", "--max-train-samples", "32", "--max-eval-samples", "32", "-b", "16", "-j", "0"]


class BreaksAt:
    """An objective whose loss is infinite from some call on."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        self.calls += 1
        outcome = Plain()(model, batch)
        return outcome._replace(loss=outcome.loss * (float("inf") if self.calls >= self.at else 1))

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass


@pytest.mark.parametrize(
    ("at", "kept"),
    [(6, "the adapter of epoch 2 "), (2, "the adapter as it was before that step"), (1, None)],
)
def test_the_last_good_adapter_is_kept(
    at: int, kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "objective_of", lambda *args, **options: BreaksAt(at))
    place = ["--output", str(tmp_path), "--experiment", "run", "--checkpoint-steps", "3", "--keep-epoch", "last"]
    assert main([*ARGS, *place]) == 2
    said, run = capsys.readouterr().err, tmp_path / "run"
    failure = json.loads((run / "failure.json").read_text())
    assert failure["error"] in said and failure["where"] == "the loss is computed from finite logits"
    assert (failure["kept"] or "").startswith(kept or "") and not (run / "record.json").exists()
    assert (f"--resume {run} --resume-changed" in said) == (at > 3)
    if kept is None:
        assert failure["kept"] is None and not (run / "adapter").exists()
        return
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert weights and all(value.isfinite().all() for value in weights.values())
    assert f"Kept in {run / 'adapter'}: {kept}" in said
    assert (
        main([*ARGS[:4], "--max-eval-samples", "32", "-j", "0", "--eval-only", "--adapter", str(run / "adapter")]) == 2
    )
    assert "random weights" in capsys.readouterr().err  # it is read as any other
    if at > 3:
        monkeypatch.undo()
        assert main(["--resume", str(run), "--resume-changed", "--lr", "1e-3"]) == 0
        assert (run / "record.json").exists() and not (run / "failure.json").exists()


# -------------------------------------------------------------------------------------------------------- collapsed


class Told(Silence):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_that_names_one_class_is_pointed_out_once() -> None:
    model, told = nn.Linear(4, 3), Told()
    nn.init.zeros_(model.weight)
    result = train(model, lr=0.0, val=loader(60), progress=told)
    assert told.warnings == result.warnings and len(told.warnings) == 1
    assert told.warnings[0].startswith("After epoch 1, ")
    assert "the same class (33.3 %)" in told.warnings[0] and "rates (0 0)" in told.warnings[0]


def test_and_the_rates_that_are_named_are_the_highest_of_the_schedule() -> None:
    optimizer = torch.optim.SGD([{"params": nn.Linear(1, 1).parameters(), "name": "head", "lr": 0.3}])
    optimizer.param_groups[0] |= {"initial_lr": 0.3, "lr": 0.0}  # as a schedule of timm's leaves it
    assert rates_of(optimizer, highest=True) == "head 0.3" and rates_of(optimizer) == "head 0"


def test_a_run_that_learns_is_not() -> None:
    x = torch.randn(60, 4)
    model, told = nn.Linear(4, 3), Told()
    easy = DataLoader(TensorDataset(x, model(x).argmax(1)), batch_size=20)
    assert not train(model, lr=0.0, val=easy, progress=told).warnings
    scores = evaluate(model, easy, accelerator=make_accelerator("none"))
    assert scores.top1_percent == 100


@pytest.mark.parametrize(("right", "complains"), [(500, True), (530, True), (533, False), (900, False)])
def test_chance_is_the_commonest_class_and_two_standard_errors(right: int, complains: bool) -> None:
    labels = torch.tensor([0] * 500 + [1] * 500)  # 2 √(0.25 / 1000) = 3.16 points
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    assert (collapsed(right / 10, labels, optimizer, epoch=3) is not None) == complains


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0] * 9 + [1]])
def test_too_few_images_to_tell_are_no_collapse(labels: list[int]) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    assert collapsed(100.0, torch.tensor(labels), optimizer, epoch=1) is None


def test_what_is_a_little_better_than_one_class_is_not_said_to_be_no_better() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    said = [collapsed(right, torch.tensor([0] * 50 + [1] * 50), optimizer, epoch=1) for right in (50.0, 55.0)]
    assert "right, no more than" in str(said[0]) and "right, hardly more than" in str(said[1])


# --------------------------------------------------------------------------------------------------------- float16


def with_scaler(scale: float) -> Any:
    accelerator = make_accelerator("none")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_float16_whose_scale_falls_below_one_is_stopped() -> None:
    with pytest.raises(RunError, match=r"the loss scale has fallen to 0\.5 \(learning rates: 0 0\.1\).*bfloat16"):
        train(Breaks(3, forward=False), opt=torch.optim.AdamW, accelerator=with_scaler(4.0), epochs=9)


def test_an_overflow_that_the_scaler_mends_is_not() -> None:
    accelerator, model = with_scaler(2.0**10), Breaks(99, forward=False)
    model.two.register_forward_hook(lambda m, given, output: Limited.apply(output))
    assert train(model, opt=torch.optim.AdamW, accelerator=accelerator).epochs == 3
    assert 1 <= accelerator.scaler.get_scale() < 2.0**10
    assert all(p.isfinite().all() for p in model.parameters())


class Limited(Bad):
    """Its gradient overflows as float16's would."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return (gradient * 2000).half().float() / 2000


# --------------------------------------------------------------------------------------------------- deterministic


def test_deterministic_runs_repeat_and_leave_pytorch_as_it_was(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        assert main([*ARGS, "--output", str(tmp_path), "--experiment", name, "--deterministic", "--epochs", "2"]) == 0
        assert not torch.are_deterministic_algorithms_enabled()
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())


def test_an_operation_without_such_an_algorithm_is_named() -> None:
    with (
        pytest.raises(RunError, match=r"--deterministic: .* does not have a deterministic implementation"),
        deterministic_algorithms(True),
    ):
        assert torch.are_deterministic_algorithms_enabled()
        torch.Tensor.put_(torch.zeros(3), torch.tensor([0]), torch.ones(1))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="other"), deterministic_algorithms(True):
        raise RuntimeError("other")
