"""What the end of a run says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

import nolora_vision.methods
from nolora_vision.commands.main import main as nolora_vision_command
from nolora_vision.training import run as run_module
from nolora_vision.training.outputs import NOT_FINITE
from nolora_vision.training.run_config import RunConfig
from tests.training.test_run import SMALL, train


def test_a_test_loss_that_is_no_number_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        result, test = whole(*args, **kwargs)
        return result, replace(test, loss=float("nan"))

    whole = run_module.train_and_test
    monkeypatch.setattr(run_module, "train_and_test", broken)
    record = train(tmp_path, "--epochs", "1", "--max-eval-samples", "20")
    assert record["metrics"]["test_loss"] is None and record["warnings"][-1] == NOT_FINITE
    assert f"warning: {NOT_FINITE}" in capsys.readouterr().err


def test_an_adapter_that_needs_its_method_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", img_size=16, patch_size=4).state_dict(), weights)
    base = [*SMALL, "--pretrained-path", str(weights)]
    train(tmp_path, "--method", "adaptformer", "--epochs", "1", "--max-eval-samples", "20", base=base)
    out = capsys.readouterr().out
    said = out.split("Use it: ")[1].splitlines()[0]
    assert said.startswith("nolora_vision.methods.load_trained(timm.create_model('test_vit', pretrained=True")
    assert nolora_vision.class_names(eval(said)) == tuple("56789")  # what is printed works as it stands
    assert nolora_vision_command(["summary", str(next(tmp_path.rglob("adapter")))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "adaptformer was trained, whose updates are not laid out here" in said


@pytest.mark.parametrize("name", ["hf-hub:me/mine", "local-dir:here"])
def test_a_model_that_timm_has_no_name_for_is_tested_again_by_its_own(name: str) -> None:
    saved = {"architecture": "test_vit", "pretrained_tag": "", "metadata": {}, "model_kwargs": {}}
    assert RunConfig(model=name).for_adapter(saved).model == name
    assert RunConfig(model="resnet18").for_adapter(saved).model == "test_vit"
