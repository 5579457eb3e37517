"""Same logits, bit for bit, after saving and loading: on every family, through wrappers, in other types."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import nolora_vision
from nolora_vision import load_adapter, save_adapter


def trained(bare: nn.Module, **options) -> nn.Module:
    model = nolora_vision.inject(copy.deepcopy(bare), rank=2, **options)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family(family, dtype: torch.dtype, tmp_path: Path) -> None:
    bare = family.build().to(dtype)
    model = trained(bare)
    if family.name in ("levit_128s", "tiny_vit_5m_224", "maxvit_nano_rw_256"):
        with torch.no_grad():
            model.train()(family.images(2).to(dtype))  # BatchNorm statistics move
    model.eval()
    x = family.images(2).to(dtype)
    save_adapter(model, tmp_path / "a")
    half = load_file(save_adapter(model, tmp_path / "half", dtype="bfloat16") / "adapter_model.safetensors")
    for name, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        statistic = "running_" in name or "num_batches" in name
        assert half[name].dtype == (t.dtype if statistic else torch.bfloat16)
    with torch.no_grad():
        expected, other = model(x), load_adapter(copy.deepcopy(bare).eval(), tmp_path / "a")
        assert torch.equal(other(x), expected)
        assert not torch.equal(bare.eval()(x), expected)
        save_adapter(other, tmp_path / "b")
        assert torch.equal(load_adapter(copy.deepcopy(bare).eval(), tmp_path / "b")(x), expected)
        if any("running_mean" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors")):
            assert any("running_mean" in name for name in load_file(tmp_path / "b" / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": compiled_blocks,
    "data-parallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_through_wrappers(wrap, process_group: None, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    bare = timm.create_model("test_vit", num_classes=7).eval()
    model = trained(bare).eval()
    x = torch.randn(2, 3, 160, 160)
    plain = save_adapter(model, tmp_path / "plain")
    saved = save_adapter(wrap(copy.deepcopy(model)), tmp_path / "a")
    assert (saved / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        expected = model(x)
        fresh = copy.deepcopy(bare)
        assert torch.equal(load_adapter(fresh, saved)(x), expected)
        injected = wrap(nolora_vision.inject(copy.deepcopy(bare), rank=2).eval())
        assert load_adapter(injected, saved) is injected and torch.equal(injected(x), expected)


def test_bfloat16_on_request_is_half_as_large_and_loads_exactly(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    bare = timm.create_model("test_vit", num_classes=7).eval()
    model = trained(bare).eval()
    full, half = (save_adapter(model, tmp_path / f"{dtype}", dtype=dtype) for dtype in ("float32", "bfloat16"))
    sizes = [sum(t.nbytes for t in load_file(f / "adapter_model.safetensors").values()) for f in (full, half)]
    assert sizes[0] == 2 * sizes[1]
    loaded = load_adapter(copy.deepcopy(bare), half)
    for (name, got), wanted in zip(loaded.named_parameters(), model.parameters(), strict=True):
        trains = ".adapter." in name or name.startswith("head.")
        assert got.dtype == torch.float32 and torch.equal(got, wanted.bfloat16().float() if trains else wanted)
    with pytest.raises(ValueError, match="dtype must be one of None, float32, bfloat16, got 'int8'"):
        save_adapter(model, tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match="format must be one of nolora, peft, got 'onnx'"):
        save_adapter(model, tmp_path / "x", format="onnx")
    with pytest.raises(ValueError, match="2 class_names for a head of 7 classes"):
        save_adapter(model, tmp_path / "x", class_names=["a", "b"])


def test_the_head_can_stay(tmp_path: Path) -> None:
    """For another set of classes: the adapters without their head."""
    import timm

    torch.manual_seed(5)
    bare = timm.create_model("test_vit", num_classes=7).eval()
    model = trained(bare).eval()
    save_adapter(model, tmp_path / "a")
    other = copy.deepcopy(bare)
    other.reset_classifier(4)
    head = other.head.weight.clone()
    with pytest.raises(nolora_vision.AdapterMismatchError, match=r"head: load_adapter\(\.\.\., head=False\)"):
        load_adapter(other, tmp_path / "a")
    load_adapter(other, tmp_path / "a", head=False)
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(other.forward_features(x), model.forward_features(x))
        assert torch.equal(other.head.weight, head)


def test_other_frozen_weights_are_told_apart(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    bare = timm.create_model("test_vit", num_classes=7).eval()
    save_adapter(trained(bare), tmp_path / "a")
    load_adapter(copy.deepcopy(bare).bfloat16(), tmp_path / "a")  # the same, rounded
    torch.manual_seed(6)
    other = timm.create_model("test_vit", num_classes=7)
    message = r"frozen weights of this model are not .* Build the model with pretrained=True.*check_backbone=False"
    with pytest.raises(nolora_vision.AdapterMismatchError, match=message):
        load_adapter(other, tmp_path / "a")
    load_adapter(other, tmp_path / "a", check_backbone=False)


def test_what_the_loaded_adapter_said_is_said_again(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    bare = timm.create_model("test_vit", num_classes=2, img_size=96).eval()
    facts = {"class_names": ["cat", "dog"], "metrics": {"top1": 90.0}, "metadata": {"dataset": "pets"}}
    save_adapter(trained(bare), tmp_path / "a", preprocessing={"crop_pct": 1.0}, **facts)
    save_adapter(load_adapter(copy.deepcopy(bare), tmp_path / "a"), tmp_path / "b")
    first, second = (nolora_vision.read_adapter_config(tmp_path / name) for name in "ab")
    assert first == second and first["model_kwargs"] == {"img_size": 96} and first["metadata"] == {"dataset": "pets"}
    assert first["preprocessing"]["input_size"] == [3, 96, 96] and first["preprocessing"]["crop_pct"] == 1.0
    other = load_adapter(copy.deepcopy(bare), tmp_path / "a")
    other.reset_classifier(3)
    save_adapter(other, tmp_path / "c")  # other classes: the names and scores of the old ones are no longer true
    third = nolora_vision.read_adapter_config(tmp_path / "c")
    assert (third["num_classes"], third["class_names"], third["metrics"]) == (3, None, {})


@pytest.mark.parametrize("format", ["nolora", "peft"])
def test_parts_of_different_rank_are_saved_folded_merged_and_loaded(tmp_path: Path, format: Any) -> None:
    torch.manual_seed(0)
    plain, x = timm.create_model("test_vit", num_classes=7).eval(), torch.randn(2, 3, 160, 160)
    options: Any = {"nonlinearity": "identity", "modulation": "vector"} if format == "peft" else {}
    patterns: Any = {"rank_pattern": {"q": 2, "v": 5}, "alpha_pattern": {"v": 15.0}}
    model = nolora_vision.inject(copy.deepcopy(plain), targets=("q", "v"), rank=3, **patterns, **options)
    for parameter in nolora_vision.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model(x)
        with nolora_vision.use_backend("eager"):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        other = nolora_vision.load_adapter(plain, nolora_vision.save_adapter(model, tmp_path / "a", format=format))
        torch.testing.assert_close(other(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(nolora_vision.fold(model, merge=format == "peft")(x), expected, atol=1e-4, rtol=1e-4)
