"""The command export: a saved adapter in, one checked file and a table out."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import tyro
from torch import nn

import nolora_vision
from nolora_vision.adapters import export as room
from nolora_vision.adapters.export import ExportError, read_export_metadata
from nolora_vision.commands.export import export_command


def command(*args: str) -> object:
    return tyro.cli(export_command, args=args)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A saved model with every weight in its file, so that none has to be downloaded."""
    model = timm.create_model("test_vit", num_classes=3, depth=1, img_size=64)
    nn.init.normal_(model.head.weight)
    kwargs = {"depth": 1, "img_size": 64}
    return nolora_vision.save_adapter(model, tmp_path / "whole", class_names=["a", "b", "c"], model_kwargs=kwargs)


def test_a_saved_model_becomes_a_file_and_a_table(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole.parent / "m.pt2"
    assert command(str(whole), str(path), "--format", "torch", "--normalize") == 0
    out, err = capsys.readouterr()
    assert "torch.export − eager" in out and "any number of images, 3 × 64 × 64, in [0, 1]" in out and "MiB" in out
    assert not err
    found = read_export_metadata(path)
    assert found["class_names"] == ["a", "b", "c"] and found["normalizes"] is True and found["adapter"] is None
    x = torch.rand(3, 3, 64, 64)
    model = nolora_vision.from_pretrained(whole)
    mean, std = (torch.tensor(found["preprocessing"][name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        got, expected = torch.export.load(path).module()(x), model((x - mean) / std)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_wrong_name_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Let its name end in \.onnx, or choose format 'torch' or 'aoti'"):
        command("no-such-adapter", str(tmp_path / "m.pt2"))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(nolora_vision.AdapterNotFoundError, match="no-such-adapter is no directory"):
        command("no-such-adapter", str(tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(model: nn.Module) -> None:
        model.head.bias.add_(1)  # type: ignore[operator, union-attr]

    monkeypatch.setattr(room, "fold_where_possible", damage)
    with pytest.raises(ExportError, match=r"torch\.export differs from eager by 1 "):
        command(str(whole), str(whole.parent / "m.pt2"), "--format", "torch")
    assert list(whole.parent.iterdir()) == [whole]
