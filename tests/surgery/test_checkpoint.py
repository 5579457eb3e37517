"""Adapter directories: whole or not at all, exact when they fit, refused with the model untouched when they don't."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nolora_vision
from nolora_vision import CheckpointError, load_adapter, read_adapter_config, save_adapter
from nolora_vision.surgery import checkpoint
from nolora_vision.surgery.adapter import adapted_layers


def base() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=7).eval()


def trained() -> nn.Module:
    model = nolora_vision.inject(base(), rank=3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(trained(), tmp_path / "adapter", metadata={"class_names": list("abcdefg")})


def test_round_trip_is_exact_on_a_bare_and_on_an_injected_model(saved: Path) -> None:
    x = torch.randn(2, 3, 160, 160)
    expected = trained()(x)
    assert torch.equal(load_adapter(base(), saved)(x), expected)
    assert torch.equal(load_adapter(nolora_vision.inject(base(), rank=3), saved)(x), expected)
    assert {path.name for path in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = read_adapter_config(saved)
    assert (config["architecture"], config["num_classes"], config["adapter"]["rank"]) == ("test_vit", 7, 3)
    assert config["metadata"] == {"class_names": list("abcdefg")} and config["preprocessing"]["input_size"]
    names = load_file(saved / "adapter_model.safetensors")
    assert all(".adapter." in name or name.startswith("head.") for name in names)


def test_statistics_that_moved_travel_along(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = nolora_vision.inject(timm.create_model("levit_128s", num_classes=7), rank=2)
    model.train()(torch.randn(2, 3, 224, 224))
    save_adapter(model.eval(), tmp_path / "a")
    torch.manual_seed(5)
    other = load_adapter(timm.create_model("levit_128s", num_classes=7), tmp_path / "a").eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(other(x), model(x))
    assert any("running_mean" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["linear", "full"])
def test_without_adapters_what_trains_is_kept(tmp_path: Path, method: str) -> None:
    model = base()
    if method == "linear":
        nolora_vision.freeze_backbone(model)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "a")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_adapter(base(), tmp_path / "a")(x), model(x))


def test_an_existing_directory_is_replaced_whole(saved: Path) -> None:
    (saved / "leftover").write_text("x")
    save_adapter(trained(), saved)
    assert not (saved / "leftover").exists() and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    if os.name == "posix":
        assert (saved / "adapter_config.json").stat().st_mode & 0o400


@pytest.mark.parametrize("step", ["_card", "_swap_in"])
def test_a_failed_save_leaves_the_old_one_whole(saved: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(checkpoint, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def shorten(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        r"adapter_config\.json does not exist\. Wanted",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors does not exist"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not an adapter config"),
    "newer": (edit_config(lambda c: c.update(format_version=99)), r"format version 99, this .* reads 1\. Upgrade"),
    "short": (shorten, "is not a whole safetensors file"),
    "architecture": (edit_config(lambda c: c.update(architecture="vit_x")), "vit_x"),
    "classes": (
        edit_config(lambda c: c.update(num_classes=9)),
        r"for num_classes 9, this model has 7\. Build",
    ),
    "missing": (edit_weights(lambda s: s.pop("head.bias")), r"1 missing: head\.bias"),
    "unknown": (edit_weights(lambda s: s.update(x=torch.zeros(1))), "1 not in the model: x"),
    "shape": (
        edit_weights(lambda s: s.update({"head.bias": torch.zeros(3)})),
        r"head\.bias: \(3,\), the model has",
    ),
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_does_not_fit_is_refused(saved: Path, damage: Callable, message: str, injected: bool) -> None:
    damage(saved)
    model = nolora_vision.inject(base(), rank=3) if injected else base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, saved)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert bool(adapted_layers(model)) == injected
