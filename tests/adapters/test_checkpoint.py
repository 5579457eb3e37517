"""Adapter directories: whole or not at all, exact when they fit, refused with the model untouched when they don't."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nolora_vision
from nolora_vision import CheckpointError, load_adapter, read_adapter_config, save_adapter
from nolora_vision.adapters import checkpoint
from nolora_vision.surgery.adapter import adapted_layers


def base() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=7).eval()


def randomise(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)


def trained() -> nn.Module:
    model = nolora_vision.inject(base(), rank=3)
    randomise(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(
        trained(), tmp_path / "adapter", class_names=list("abcdefg"), metrics={"test_top1_percent": 87.5}
    )


def test_round_trip_is_exact_on_a_bare_and_on_an_injected_model(saved: Path) -> None:
    x = torch.randn(2, 3, 160, 160)
    expected = trained()(x)
    assert torch.equal(load_adapter(base(), saved)(x), expected)
    assert torch.equal(load_adapter(nolora_vision.inject(base(), rank=3), saved)(x), expected)
    assert {path.name for path in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = read_adapter_config(saved)
    assert (config["architecture"], config["num_classes"], config["adapter"]["rank"]) == ("test_vit", 7, 3)
    assert config["class_names"] == list("abcdefg") and config["metrics"] == {"test_top1_percent": 87.5}
    assert config["preprocessing"]["input_size"] == [3, 160, 160] and config["pretrained_tag"] == "r160_in1k"
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


def test_statistics_that_another_adapter_moved_are_not_taken_over(tmp_path: Path) -> None:
    def levit() -> nn.Module:
        torch.manual_seed(5)
        return timm.create_model("levit_128s", num_classes=7)

    still = save_adapter(nolora_vision.inject(levit(), rank=2), tmp_path / "still")
    model = nolora_vision.inject(levit(), rank=2)
    model.train()(torch.randn(2, 3, 224, 224))
    moved = save_adapter(model, tmp_path / "moved")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"that moved on this model and it does not bring \(load it onto a fresh"):
        load_adapter(model, still)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for directory in (still, moved, moved):
        other = load_adapter(levit(), directory)
        load_adapter(other, moved)


def test_what_is_said_goes_with_the_head(saved: Path, tmp_path: Path) -> None:
    cats, birds = list("tuvwxyz"), tuple("abcdefg")
    facts: dict[str, Any] = {"metrics": {"test_top1_percent": 1.0}, "metadata": {"dataset": "cats"}}
    other = save_adapter(trained(), tmp_path / "cats", class_names=cats, **facts)
    model = load_adapter(base(), other, head=False)
    assert nolora_vision.class_names(model) == tuple("0123456")
    model = load_adapter(load_adapter(base(), saved), other, head=False)
    said = read_adapter_config(save_adapter(model, tmp_path / "again"))
    assert nolora_vision.class_names(model) == birds == tuple(said["class_names"])
    assert said["metrics"] == {"test_top1_percent": 87.5} and said["metadata"] == {}
    model = load_adapter(base(), other)
    assert read_adapter_config(save_adapter(model, tmp_path / "b"))["metadata"] == {"dataset": "cats"}
    said = read_adapter_config(save_adapter(nolora_vision.inject(nolora_vision.eject(model)), tmp_path / "c"))
    assert said["metrics"] == said["metadata"] == {} and said["class_names"] == cats


def swin() -> nn.Module:
    """Small, and with the bypass that the cure is for."""
    torch.manual_seed(5)
    options = {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)}
    return timm.create_model("swinv2_tiny_window8_256", num_classes=7, **options).eval()


def test_round_trip_where_the_cure_is_needed(tmp_path: Path) -> None:
    model = nolora_vision.inject(swin(), targets=("q", "v", "proj"), rank_pattern={"proj": 3}, layers=[-1], rank=2)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    x = torch.randn(1, 3, 64, 64)
    other = load_adapter(swin(), tmp_path / "a")
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), swin()(x))
    assert list(adapted_layers(other)) == list(adapted_layers(model))


def test_a_folded_model_keeps_its_function(tmp_path: Path) -> None:
    model = nolora_vision.inject(base(), rank=3, alpha=5, modulation="vector", rank_pattern={"fc1": 2})
    randomise(model)
    save_adapter(nolora_vision.fold(model), tmp_path / "a")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_adapter(base(), tmp_path / "a")(x), model(x))


@pytest.mark.parametrize("frozen", ["v", ""])
def test_frozen_adapters_are_saved_all_the_same(tmp_path: Path, frozen: str) -> None:
    """v frozen is the ablation that method.md asks for; all of it frozen is a model made ready for inference."""
    model = nolora_vision.inject(base(), rank=3, modulation="vector")
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(frozen):
            parameter.requires_grad_(False)
    save_adapter(model, tmp_path / "a")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_adapter(base(), tmp_path / "a")(x), model(x))


@pytest.mark.parametrize("method", ["linear", "full"])
def test_without_adapters_what_trains_is_kept(tmp_path: Path, method: str) -> None:
    model = base()
    if method == "linear":
        nolora_vision.freeze_backbone(model)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_adapter(base(), tmp_path / "a")(x), model(x))


def test_an_existing_adapter_is_replaced_and_what_lies_beside_it_stays(saved: Path) -> None:
    (saved / "log.txt").write_text("x")
    save_adapter(nolora_vision.inject(base(), rank=5), saved)
    assert read_adapter_config(saved)["adapter"]["rank"] == 5
    assert (saved / "log.txt").read_text() == "x" and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    if os.name == "posix":
        assert (saved / "adapter_config.json").stat().st_mode & 0o400


@pytest.mark.parametrize("format", ["nolora", "peft"])
def test_a_directory_that_is_no_adapters_keeps_its_readme(tmp_path: Path, format: Literal["nolora", "peft"]) -> None:
    model = nolora_vision.inject(base(), nonlinearity="identity", modulation="none")
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(CheckpointError, match=r"has a README\.md but no adapter_config\.json.* Choose a new directory"):
        save_adapter(model, tmp_path, format=format)
    assert (tmp_path / "README.md").read_text() == "my project" and len(list(tmp_path.iterdir())) == 1
    save_adapter(model, tmp_path / "adapter", format=format)


def test_a_failed_save_leaves_the_old_one_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for step in ("model_card", "write_adapter_files"):
        monkeypatch.setattr(checkpoint, step, fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(trained(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_metrics_are_numbers_of_any_library_and_finite(tmp_path: Path) -> None:
    metrics: Any = {"a": np.float32(0.5), "b": torch.tensor(2), "c": {"d": [np.int64(3)]}}
    said = read_adapter_config(save_adapter(trained(), tmp_path / "a", metrics=metrics))["metrics"]
    assert said == {"a": 0.5, "b": 2, "c": {"d": [3]}}
    for bad in (float("nan"), np.float64("inf"), torch.tensor(float("-inf"))):
        with pytest.raises(ValueError, match=r"metrics\['top1'\] is -?(nan|inf), .*Pass finite numbers"):
            save_adapter(trained(), tmp_path / "b", metrics={"top1": bad})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_facts_that_json_cannot_hold_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_adapter(trained(), tmp_path / "a", metadata={"names": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError, match=r"directory|exists"):
        save_adapter(trained(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "mine"


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        config.pop("sha256", None)  # as the message for an edited file says
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
        edit_config(lambda c: c.update(weights_sha256=sha256(path.read_bytes()).hexdigest(), tensors=len(state)))(
            folder
        )

    return edit


def shorten(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)

    return edit


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed_pickle(folder: Path) -> None:
    as_pickle(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")


def other_backbone(config: dict) -> None:
    name = next(iter(config["backbone"]))
    config["backbone"][name][1] += 0.1


def drop_directory(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (drop_directory, r"adapter_config\.json does not exist\. Wanted a directory written by"),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        r"adapter_config\.json does not exist\. Wanted",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors does not exist"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not an adapter config"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "is not an adapter config"),
    "no adapter": (edit_config(lambda c: c.pop("adapter")), "is not an adapter config"),
    "adapter is text": (edit_config(lambda c: c.update(adapter="x")), "is not an adapter config"),
    "newer": (edit_config(lambda c: c.update(format_version=99)), r"format version 99, this .* reads 1\. Upgrade"),
    "a bit of the weights": (flip_a_bit("adapter_model.safetensors"), "does not have the checksum that adapter_config"),
    "a bit of the config": (flip_a_bit("adapter_config.json"), "does not have the checksum|is not an adapter config"),
    "a pickle": (as_pickle, r"adapter_model\.bin is a pickle, which can run any code and is never loaded"),
    "a renamed pickle": (renamed_pickle, "is a pickle by its first bytes"),
    "tag": (
        edit_config(lambda c: c.update(pretrained_tag="in22k")),
        r"for pretrained_tag 'in22k', this model has 'r160_in1k'\. Build .* check_backbone=False",
    ),
    "backbone": (
        edit_config(other_backbone),
        "frozen weights of this model are not those that the adapter",
    ),
    "field of another type": (edit_config(lambda c: c.update(metrics=[])), r"metrics must be dict, got '\[\]'"),
    "field too many": (edit_config(lambda c: c.update(metric={})), "'metric' is not a field"),
    "names": (edit_config(lambda c: c["class_names"].pop()), "6 class_names for 7 classes"),
    "NaN": (edit_config(lambda c: c["metrics"].update(a=float("nan"))), "NaN is no JSON"),
    "short": (shorten, "is not a whole safetensors file"),
    "architecture": (edit_config(lambda c: c.update(architecture="vit_x")), "vit_x"),
    "classes": (
        edit_config(lambda c: c.update(num_classes=9, class_names=None)),
        r"for num_classes 9, this model has 7\. Build .* head=False",
    ),
    "rank": (edit_config(lambda c: c["adapter"].update(rank=2)), r"of another shape: |they differ in rank\)"),
    "bad rank": (edit_config(lambda c: c["adapter"].update(rank=0)), "rank must be an integer|they differ in rank"),
    "no such block": (edit_config(lambda c: c["adapter"].update(layers=[99])), "no block 99|they differ in layers"),
    "unknown field": (edit_config(lambda c: c["adapter"].update(ranks=3)), "'ranks' is not a field|differ in ranks"),
    "missing A": (
        edit_weights(lambda s: s.pop("blocks.0.mlp.fc1.adapter.lora_A")),
        r"1 missing: blocks\.0\.mlp\.fc1\.adapter\.lora_A$",
    ),
    "no tensors": (edit_weights(dict.clear), r"110 missing: blocks\.0\.attn\.qkv\.adapter\.beta, .* …$"),
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
    check_refusal(model, saved, message)


def check_refusal(model: nn.Module, directory: Path, message: str) -> None:
    def fingerprint() -> list:
        flags = [
            (path, id(m), type(m), m.training, vars(m).get("qkv_bias_separate")) for path, m in model.named_modules()
        ]
        return [flags, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]]

    before, values = fingerprint(), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, directory)
    assert fingerprint() == before
    after = model.state_dict()
    assert list(after) == list(values) and all(torch.equal(after[key], values[key]) for key in values)


def test_other_models_are_refused(saved: Path) -> None:
    torch.manual_seed(5)
    advice = r"Build the model with timm\.create_model\('test_vit\.r160_in1k', num_classes=7\)"
    check_refusal(timm.create_model("test_vit2", num_classes=7), saved, rf"architecture 'test_vit', .*{advice}")
    check_refusal(timm.create_model("test_vit", num_classes=9), saved, rf"num_classes 7, this model has 9\. {advice}")
    check_refusal(nolora_vision.inject(base(), rank=4), saved, r"differ in rank\)\. Load onto a bare model, or inject")


def test_a_cured_model_is_as_before_after_a_refusal(tmp_path: Path) -> None:
    save_adapter(nolora_vision.inject(swin()), tmp_path / "a")
    edit_weights(lambda s: s.pop("head.fc.bias"))(tmp_path / "a")
    model = swin()
    model.layers[0].requires_grad_(False)
    check_refusal(model, tmp_path / "a", r"1 missing: head\.fc\.bias")
