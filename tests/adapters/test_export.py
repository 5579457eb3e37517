"""Exports: the written file gives eager's outputs at any batch size, and a file that doesn't is never there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nolora_vision
from nolora_vision.adapters import export as room
from nolora_vision.adapters import export_graph
from nolora_vision.adapters.export import ExportError, export, read_export_metadata
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.low_rank_adapter import LowRankAdapter
from tests.families import FAMILIES, Family
from tests.soak import SOAK

CLASSES = list("abcdefg")
UPDATES = [(f, modulation) for f in NONLINEARITIES for modulation in MODULATIONS]


def trained(model: nn.Module, **options: Any) -> nn.Module:
    """Adapted, and with an update that changes the outputs by much more than the tolerance."""
    nolora_vision.inject(model, rank=3, **options)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.2)
    return model


def tiny(**options: Any) -> nn.Module:
    """One block, 64 px."""
    return trained(timm.create_model("test_vit", num_classes=7, depth=1, img_size=64), **options)


def with_every_update(model: nn.Module, std: float) -> int:
    """Give its adapted layers one nonlinearity and modulation after another; how many layers there are."""
    layers = list(adapted_layers(model).values())
    for i, layer in enumerate(layers):
        f, modulation = UPDATES[4 * i % len(UPDATES)]  # in steps of four, so that a few layers differ in both
        config = replace(layer.adapter.config, nonlinearity=f, modulation=modulation, alpha=2.0)
        out_features, in_features = layer.weight.shape
        layer.adapter = LowRankAdapter(in_features, out_features, config)
        for parameter in layer.adapter.parameters():
            nn.init.normal_(parameter, std=std)
    return len(layers)


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def open_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


@pytest.fixture(params=["vit", "swinv2", "eva02"])
def member(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    """A model of each family with a few updates, each of another kind, and its image size."""
    family = FAMILIES[request.param]
    if request.param != "swinv2":  # which has one block for each of its two sizes of windows
        family = replace(family, options={**family.options, "depth": 1})
    model = trained(family.build())
    with_every_update(model, std=0.2)
    return model, family.size


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_file_gives_eagers_outputs_for_any_batch(member: tuple[nn.Module, int], format: Any, tmp_path: Path) -> None:
    model, size = member
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    report = export(model, path, format=format)
    assert report.path == path and report.file_bytes == path.stat().st_size and report.batches == (1, 2, 3)
    assert report.input_size == (3, size, size)
    assert list(path.parent.iterdir()) == [path]
    runtime = "ONNX Runtime" if format == "onnx" else "torch.export"
    assert report.max_abs_difference[runtime] <= 1e-4 * report.largest_output
    run = open_onnx(path) if format == "onnx" else open_torch(path)
    for n in (1, 3, 5):
        x = torch.randn(n, 3, size, size)
        with torch.no_grad():
            expected = model.eval()(x)
        got = run(x)
        assert got.shape == (n, 7)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # fp32, outputs of about 3
    with torch.no_grad(), nolora_vision.disabled(model):
        assert (model(x) - expected).abs().max() > 1e-2  # so the adapters are in the file


EVERY = {
    "vit": Family("test_vit", 64, {"img_size": 64, "depth": 9}),
    "swinv2": replace(FAMILIES["swinv2"], options={**FAMILIES["swinv2"].options, "depths": (5, 4)}),
    "eva02": replace(FAMILIES["eva02"], options={**FAMILIES["eva02"].options, "depth": 9}),
}
"""Deep enough that each nonlinearity has a layer with each modulation."""
ONLY_IN_SOAK = pytest.mark.skipif(not SOAK, reason="in `make soak` only")


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch", marks=ONLY_IN_SOAK)])
@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=ONLY_IN_SOAK) for name in ("swinv2", "eva02"))])
def test_every_update_in_one_file(name: str, format: Any, tmp_path: Path) -> None:
    model, size = nolora_vision.inject(EVERY[name].build(), rank=3), EVERY[name].size
    layers = with_every_update(model, std=0.7)
    assert layers >= len(UPDATES)
    for parameter in nolora_vision.head_parameters(model):
        nn.init.normal_(parameter, std=0.7)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    report = export(model.eval(), path, format=format)
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        got, expected = (open_onnx(path) if format == "onnx" else open_torch(path))(x), model(x)
        with nolora_vision.disabled(model):
            assert (model(x) - expected).abs().max() > 0.1 * expected.abs().max()
    error = float((got - expected).abs().max() / expected.abs().max())
    print(f"{name}, {format}, {layers} updates: {error:.1e} of the largest output, {report.max_abs_difference}")
    assert error < 1e-5  # fp32 through 27 random updates


def test_aot_inductor(tmp_path: Path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("AOTInductor needs a C++ compiler")
    model = tiny().eval()
    path = tmp_path / "m.pt2"
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # twice as fast to compile
        report = export(model, path, format="aoti")
    assert report.max_abs_difference["AOTInductor"] <= 1e-4 * report.largest_output
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x), model(x), rtol=0, atol=1e-5)
    assert read_export_metadata(path)["class_names"] == [str(i) for i in range(7)]


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny(nonlinearity="identity", modulation="vector")
    model.set_grad_checkpointing(True)
    model.train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = adapted_layers(model)
    export(model, tmp_path / "m.pt2", format="torch")
    assert adapted_layers(model) == layers and all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert model.blocks is not None and model.grad_checkpointing
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_linear_update_is_merged_and_a_disabled_one_is_left_out(tmp_path: Path) -> None:
    model = tiny(nonlinearity="identity", modulation="vector").eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), nolora_vision.disabled(model):
        export(model, tmp_path / "off.pt2", format="torch")
        torch.testing.assert_close(open_torch(tmp_path / "off.pt2")(x), model(x), rtol=0, atol=1e-5)
    export(model, tmp_path / "on.pt2", format="torch")
    names = torch.export.load(tmp_path / "on.pt2").state_dict
    assert not any("adapter" in name for name in names)
    with torch.no_grad():
        torch.testing.assert_close(open_torch(tmp_path / "on.pt2")(x), model(x), rtol=0, atol=1e-5)


def test_without_adapters_compiled_in_bf16(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7, depth=1, img_size=64).to(torch.bfloat16)
    nn.init.normal_(model.head.weight)
    export(torch.compile(model), tmp_path / "m.pt2", format="torch")
    got = open_torch(tmp_path / "m.pt2")(x := torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(got, model.float().eval()(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_normalisation_and_metadata(format: Any, tmp_path: Path) -> None:
    images = {"input_size": (3, 64, 64), "mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.5), "crop_pct": 0.9}
    model = timm.create_model("test_vit", num_classes=7, depth=1, img_size=64)
    directory = tmp_path / "adapter"
    nolora_vision.save_adapter(trained(model), directory, class_names=[*CLASSES[:-1], "gänse"], preprocessing=images)
    model = timm.create_model("test_vit", num_classes=7, depth=1, img_size=64)
    model = nolora_vision.load_adapter(model, directory, check_backbone=False).eval()
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    export(model, path, format=format, normalize=True)
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(images[name]).view(-1, 1, 1) for name in ("mean", "std"))
    run = open_onnx(path) if format == "onnx" else open_torch(path)
    with torch.no_grad():
        got = run(x)
        torch.testing.assert_close(got, model((x - mean) / std), rtol=0, atol=1e-5)
    found = read_export_metadata(path)
    assert found["class_names"] == [*CLASSES[:-1], "gänse"] and found["normalizes"] is True
    assert found["architecture"] == "test_vit" and found["nolora_vision"] == nolora_vision.__version__
    assert found["preprocessing"]["mean"] == [0.2, 0.4, 0.6] and found["preprocessing"]["input_size"] == [3, 64, 64]
    assert found["preprocessing"]["crop_pct"] == 0.9 and found["adapter"]["rank"] == 3


def test_the_names_in_an_onnx_file(tmp_path: Path) -> None:
    import onnx

    export(tiny(), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input]
    assert [value.name for value in graph.input] == ["images"] and shapes == [["batch", 3, 64, 64]]
    assert [value.name for value in graph.output] == ["logits"]


# --------------------------------------------------------------------------------------------- what is refused


class Fixed(nn.Module):
    """Takes two images at a time and no other number."""

    num_classes = 7

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)).reshape(2, 3) if x.shape[0] == 2 else x.mean((2, 3)))


def test_a_file_that_differs_is_refused_and_the_old_one_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("old")

    def without_adapters(model: nn.Module) -> None:
        nolora_vision.eject(model)

    monkeypatch.setattr(room, "fold_where_possible", without_adapters)
    with pytest.raises(ExportError, match=r"torch\.export differs from eager by .* allowed 0\.0001 of it\)\."):
        export(tiny(), path, format="torch")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_check_is_at_the_tolerance() -> None:
    expected = [torch.tensor([[3.0, -4.0]])]
    assert export_graph.refuse_difference("r", [expected[0] + 3e-4], expected) == (pytest.approx(3e-4, rel=0.01), 4.0)
    for wrong in (expected[0] + 5e-4, expected[0] * float("nan")):
        with pytest.raises(ExportError, match="r differs from eager by"):
            export_graph.refuse_difference("r", [wrong], expected)
    with pytest.raises(ExportError, match=r"outputs of \(2, 1\) where eager gives \(1, 2\)"):
        export_graph.refuse_difference("r", [expected[0].T], expected)


def test_a_model_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"The torch export failed: .*batch"):
        export(Fixed(), tmp_path / "m.pt2", format="torch", input_size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.onnx", {"format": "onxn"}, "must be one of onnx, torch, aoti, got 'onxn'. Did you mean 'onnx'"),
        ("m.pt2", {}, r"'onnx' writes \.onnx files, got .*m\.pt2\. .* or choose format 'torch' or 'aoti'"),
        ("m.onnx", {"format": "aoti"}, r"'aoti' writes \.pt2 files, .* or choose format 'onnx'"),
        ("m", {"format": "torch"}, r"'torch' writes \.pt2 files, got .*m\. Let its name end in \.pt2\."),
        ("no/m.onnx", {}, "would lie in a folder that does not exist"),
        ("m.onnx", {"input_size": 0}, r"input_size must be \(C, H, W\) or one side in pixels, got 0"),
        ("m.onnx", {"input_size": (3, 64)}, r"got \(3, 64\)"),
        ("m.onnx", {"input_size": (1, 64, 64)}, r"VisionTransformer does not run on images of \(1, 64, 64\)"),
    ],
)
def test_what_cannot_be_done_is_said(name: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_mean_and_std_of_other_channels_cannot_be_put_inside(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7, depth=1, img_size=64, in_chans=1)
    with pytest.raises(ExportError, match="mean and std are for 3 channels, its images have 1"):
        export(model, tmp_path / "m.pt2", format="torch", normalize=True, input_size=(1, 64, 64))
    report = export(trained(model), tmp_path / "m.pt2", format="torch", input_size=(1, 64, 64))
    assert report.input_size == (1, 64, 64) and report.max_abs_difference["torch.export"] < 1e-5


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export(tiny(), tmp_path / "m.onnx")


def test_missing_packages_compiler_and_space_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ExportError, match="needs a C\\+\\+ compiler and finds none"):
        export(tiny(), tmp_path / "m.pt2", format="aoti")
    with monkeypatch.context() as patch:
        patch.setattr(room, "MOST_ONNX_BYTES", 1000)
        with pytest.raises(ExportError, match=r"do not fit into one ONNX file of 2 GiB. Use format='torch'"):
            export(tiny(), tmp_path / "m.onnx")
    for package in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=r"ONNX needs onnxscript, onnxruntime: pip install 'nolora-vision\[export\]'"):
        export(tiny(), tmp_path / "m.onnx")


def test_outputs_that_cannot_be_compared_are_said(tmp_path: Path) -> None:
    model = tiny()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ExportError, match="itself gives NaN or infinity"):
        export(model, tmp_path / "m.onnx")
    model.head = nn.Module()
    model.forward = lambda x: (x, x)
    with pytest.raises(ExportError, match="gives a tuple; only a model that gives one tensor"):
        export(model, tmp_path / "m.onnx")


def test_metadata_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no file"):
        read_export_metadata(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not an export")
    with pytest.raises(ExportError, match=r"was not written by nolora_vision.export, or is damaged"):
        read_export_metadata(tmp_path / "m.onnx")
    torch.save({}, tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"was not written by nolora_vision.export, or is damaged"):
        read_export_metadata(tmp_path / "m.pt2")
