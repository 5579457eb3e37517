"""nolora-vision summary: what it prints at which width, what it writes, and what it says where there is nothing."""

import csv
import io
import json
from pathlib import Path

import pytest
import timm
from rich.cells import cell_len
from rich.console import Console
from torch import nn

import nolora_vision
from nolora_vision import CorruptAdapterError, inject, save_adapter
from nolora_vision.adapters.anatomy import anatomy, as_plain
from nolora_vision.commands.adapter_picture import adapter_picture
from nolora_vision.commands.adapter_table import bar, sparkline
from nolora_vision.commands.look import header, show, summary_command
from nolora_vision.training import figures
from nolora_vision.training.errors import RunError

OPTIONS = {"metrics": {"test_top1_percent": 91.5}, "metadata": {"dataset": "uoft-cs/cifar10"}}


def saved(folder: Path, *, train: bool = True, **config: object) -> Path:
    model = inject(timm.create_model("test_vit", num_classes=3), **{"rank": 2, **config})
    for parameter in nolora_vision.adapter_parameters(model) if train else ():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return save_adapter(model, folder / "adapter", class_names=["cat", "d\x1b[31mog", "emu"], **OPTIONS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved"))


def printed(directory: Path, width: int, *, by: str = "layer", encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    found = anatomy(directory)
    show(found, header(found, directory), Console(file=stream, width=width), title=str(directory.name), by=by)
    stream.seek(0)
    return stream.read()


def test_the_header_says_what_the_adapter_is(directory: Path) -> None:
    text = printed(directory, 140)
    size = sum(path.stat().st_size for path in directory.iterdir())
    count = anatomy(directory).adapter_parameters
    wanted = ["NoLoRA (swish, gate), rank 2", "test_vit", "3: cat, d\\x1b[31mog, emu", "160 × 160 pixels"]
    wanted += ["uoft-cs/cifar10", "test_top1_percent 91.5", f"{size:,} bytes on disk", "nolora_vision 0.1.0"]
    wanted += [f"{count:,} in 18 updates, 195 in the head and elsewhere"]
    for fact in wanted:
        assert fact in text
    assert "\x1b" not in text


def test_a_wide_terminal_has_every_column_and_a_narrow_one_the_telling_ones(directory: Path) -> None:
    wide, narrow, tiny = (printed(directory, width) for width in (160, 80, 50))
    for name in ("in → out", "rank", "parameters", "update", "dirs", "‖B‖", "v", "‖G‖", "Δbeta"):
        assert name in next(line for line in wide.splitlines() if line.startswith("layer"))
    assert "parameters" not in next(line for line in narrow.splitlines() if line.startswith("layer"))
    assert "‖G‖" in next(line for line in narrow.splitlines() if line.startswith("layer"))
    for text, width in ((wide, 160), (narrow, 80), (tiny, 50)):
        assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width
        rows = [line for line in text.splitlines() if line.startswith("blocks.")]
        assert len(rows) == 18 and all("…" not in line.split()[0] for line in rows)
    row = anatomy(directory).rows[0]
    assert f" {row.update_norm:.3g} " in tiny and row.path in tiny


def test_rows_can_be_put_together_by_role_and_by_block(directory: Path) -> None:
    rows = anatomy(directory).rows
    first_words = {
        by: [line.split()[0] for line in printed(directory, 120, by=by).splitlines() if line.strip()]
        for by in ("role", "block")
    }
    assert [w for w in first_words["block"] if w.startswith("blocks.")] == [f"blocks.{i}" for i in range(6)]
    lines = printed(directory, 120, by="role").splitlines()
    total = sum(row.update_norm**2 for row in rows if row.kind == "fc1") ** 0.5
    assert any(line.startswith("fc1 ") and f" {total:.3g} " in line for line in lines)


def test_bars_and_sparklines() -> None:
    assert [bar(x, 8) for x in (0, 4, 8)] == ["", "█" * 5, "█" * 10]
    assert bar(4, 8, ascii=True) == "#####" and bar(float("nan"), 8) == "" and bar(0, 0) == ""
    assert sparkline([0, 4, None, 8, float("nan")], 8) == "▁▅ █!"
    assert sparkline([0.0, 0.0], 0) == "▁▁" and sparkline([0, 8], 8, ascii=True) == "_#"


def test_a_terminal_without_unicode_gets_plain_bars(directory: Path) -> None:
    text = printed(directory, 140, encoding="ascii")
    assert "###" in text and "█" not in text


def test_an_untrained_adapter_says_so(tmp_path: Path) -> None:
    text = printed(saved(tmp_path, train=False), 100)
    assert "Every update is 0: these adapters have not been trained." in text and "█" not in text


def test_csv_and_json_hold_every_figure(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary_command(str(directory), csv=str(tmp_path / "a.csv"), json=str(tmp_path / "a.json"))
    assert "blocks.0.attn.qkv" in capsys.readouterr().out
    rows = anatomy(directory).rows
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["adapters"] == as_plain(rows)
    assert (
        content["config"] == nolora_vision.read_adapter_config(directory) and "rank 2" in content["summary"]["method"]
    )
    lines = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [line["path"] for line in lines] == [row.path for row in rows]
    assert [float(line["update_norm"]) for line in lines] == [row.update_norm for row in rows]
    assert [float(line["v_max"]) for line in lines] == [max(row.v or ()) for row in rows]
    summary_command(str(directory), json="-")
    assert json.loads(capsys.readouterr().out) == content


@pytest.mark.parametrize("config", [
    {}, {"targets": ("q", "v"), "nonlinearity": "aurora"}, {"nonlinearity": "gelu", "modulation": "none"},
    {"nonlinearity": "residual_tanh", "modulation": "vector", "targets": "all"},
], ids=lambda config: config.get("nonlinearity", "default"))  # fmt: skip
def test_the_picture_is_written_for_every_kind_of_adapter(tmp_path: Path, config: dict) -> None:
    from PIL import Image

    picture = tmp_path / "a.png"
    summary_command(str(saved(tmp_path, layers=[0, 5], **config)), picture=str(picture))
    with Image.open(picture) as image:
        assert min(image.size) > 500 and len(image.convert("RGB").getcolors(2**24) or ()) > 200
    assert picture.stat().st_size > 20_000


def test_without_matplotlib_a_picture_is_refused_before_anything_is_printed(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "pyplot", lambda: None)
    with pytest.raises(RunError, match=r"--picture needs matplotlib: pip install 'nolora-vision\[plots\]'"):
        summary_command(str(directory), picture=str(tmp_path / "a.png"))
    assert capsys.readouterr().out == "" and not (tmp_path / "a.png").exists()
    assert not adapter_picture(tmp_path / "a.png", anatomy(directory).rows, title="")


def test_a_head_alone_and_full_training_say_that_there_is_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    nolora_vision.freeze_backbone(model)
    summary_command(str(save_adapter(model, tmp_path / "linear")))
    assert "No adapters: only the head" in " ".join(capsys.readouterr().out.split())
    model.requires_grad_(True)
    full = save_adapter(model, tmp_path / "full")
    summary_command(str(full))
    assert "every weight was trained" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(RunError, match=r"--picture .* was not drawn. No adapters: every weight was trained"):
        summary_command(str(full), picture=str(tmp_path / "a.png"))


def test_damage_and_unusable_outputs_are_errors_of_the_user(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--picture writes a PNG file, got a\.pdf"):
        summary_command(str(directory), picture="a.pdf")
    with pytest.raises(RunError, match=r"--json .*missing/a.json: there is no folder .*missing. Create it first"):
        summary_command(str(directory), json=str(tmp_path / "missing" / "a.json"))
    with pytest.raises(RunError, match="both want stdout"):
        summary_command(str(directory), json="-", csv="-")
    broken = saved(tmp_path)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CorruptAdapterError, match="is not a whole safetensors file"):
        summary_command(str(broken))
