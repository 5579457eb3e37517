"""What a method trained, saved and loaded again; and train.py from end to end with peers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import nolora_vision
from nolora_vision import AdapterConfig, AdapterMismatchError, CorruptAdapterError
from nolora_vision.adapters.adapter_files import read_adapter_files, write_adapter_files
from nolora_vision.adapters.checkpoint import adapter_bytes
from nolora_vision.methods import METHODS, apply_method, load_trained
from nolora_vision.training.run import main
from tests.families import SMALL, Family

VIT = Family("vit_tiny_patch16_224", 32, {**SMALL, "img_size": 32})
OPTIONS = {"fourierft": {"n_frequency": 50}}


def trained(method: str) -> tuple[nn.Module, nn.Module]:
    """A bare model, and the same after some made-up training."""
    bare = VIT.build().eval()
    model = apply_method(copy.deepcopy(bare), method, AdapterConfig(rank=4), options=OPTIONS.get(method))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return bare, model


@pytest.mark.parametrize("method", METHODS)
def test_it_loads_onto_the_bare_model(method: str, tmp_path: Path) -> None:
    bare, model = trained(method)
    directory = nolora_vision.save_adapter(model, tmp_path / "a")
    added = METHODS[method].group in ("peft", "own module")
    twin = copy.deepcopy(bare)
    if added:
        with pytest.raises(AdapterMismatchError, match=f"the method '{method}' trained.*methods\\.load_trained"):
            nolora_vision.load_adapter(twin, directory)
        assert list(twin.state_dict()) == list(bare.state_dict())
    loaded = load_trained(twin, directory).eval()
    x = VIT.images(2)
    assert torch.equal(loaded(x), model.eval()(x))
    assert "methods import load_trained" in (directory / "README.md").read_text() or not added
    without_head = nolora_vision.summary(model).trainable_params - nolora_vision.summary(model).head_params
    size = adapter_bytes(model)
    assert 4 * without_head <= size <= 4 * without_head + 200 * len(list(model.parameters())) + 200
    assert size <= (directory / "adapter_model.safetensors").stat().st_size


def test_loading_again_onto_the_same_and_onto_others(tmp_path: Path) -> None:
    _, model = trained("dora")
    directory = nolora_vision.save_adapter(model, tmp_path / "a")
    x, before = VIT.images(), model.eval()(VIT.images())
    assert before.shape == (1, 7)
    assert torch.equal(load_trained(model, directory)(x), model(x))
    with pytest.raises(AdapterMismatchError, match="the method 'dora' trained"):
        load_trained(apply_method(VIT.build(), "vera", AdapterConfig(rank=4)), directory)
    with pytest.raises(AdapterMismatchError, match="frozen weights of this model are not those"):
        load_trained(VIT.build(), directory)
    config, state = read_adapter_files(directory)
    for key in ("sha256", "tensors", "weights_sha256"):
        config.pop(key)
    for wrong, error in (
        ({"name": "dora"}, CorruptAdapterError),
        ({**config["method"], "name": "x"}, AdapterMismatchError),
    ):
        write_adapter_files(tmp_path / "b", {**config, "method": wrong}, state, "")
        with pytest.raises(error, match=r"method is not usable|method must be one of"):
            load_trained(VIT.build(), tmp_path / "b")


SMALL_RUN = ["--model", "test_vit", "--dataset", "digits:5-9", "--img-size", "16", "--model-kwargs", "patch_size", "4"]
SMALL_RUN += ["--workers", "0", "--max-train-samples", "64", "--max-eval-samples", "32", "--epochs", "1", "-b", "16"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dora", ["--amp-dtype", "bfloat16"]),
        ("fourierft", ["--method-options", "n_frequency", "100"]),
        ("adaptformer", ["--model-ema"]),
        ("bitfit", []),
    ],
)
def test_train_py(method: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = [*SMALL_RUN, "--no-pretrained", "--method", "full", "--output", str(tmp_path), "--experiment", "start"]
    assert main(start) == 0
    weights = tmp_path / "start" / "adapter" / "adapter_model.safetensors"
    args = [*SMALL_RUN, "--pretrained-path", str(weights), "--output", str(tmp_path), "--experiment", "run"]
    assert main([*args, "--method", method, "--adapter.rank", "2", *more]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    parameters = record["parameters"]["trainable_without_head"]
    assert record["method"] == method and 4 * parameters <= record["metrics"]["adapter_bytes"]
    assert record["config"]["method_options"] == ({"n_frequency": 100} if method == "fourierft" else {})
    capsys.readouterr()
    test = ["--eval-only", "--adapter", str(tmp_path / "run" / "adapter"), "--dataset", "digits:5-9", "-j", "0"]
    assert main([*test, "--max-eval-samples", "32", *(more if method == "dora" else [])]) == 0
    assert f"{record['metrics']['test_top1_percent']:.2f} %" in capsys.readouterr().out


def test_train_py_names_what_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*SMALL_RUN, "--no-pretrained", "--output", str(tmp_path), "--method", "oft"]
    assert main([*args, "--method-options", "block_size", "7"]) == 2
    assert "oft needs a block size that divides every layer's input" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
