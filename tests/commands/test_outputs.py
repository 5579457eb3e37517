"""What commands write: nothing in another's place, links and pipes as they are, and what there is if they end early."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import nolora_vision
from nolora_vision.commands import predict
from nolora_vision.commands.images import find_images, read_names
from nolora_vision.commands.main import main
from nolora_vision.training.errors import RunError
from nolora_vision.training.progress import RunsProgress, print_table

NAMES = ["cat", "猫", "dög"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight is in the file, so that nothing is downloaded."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    return nolora_vision.save_adapter(model, tmp_path_factory.mktemp("outputs") / "adapter", class_names=NAMES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--csv", "same", "--json", "same"], "--csv and --json both want same"),
        (["--csv", "same", "--json", "./photos/../same"], "--csv and --json both want"),
        (["--csv", "-", "--json", "-"], "--csv and --json both want stdout"),
        (["--grid", "photos/1.png"], "--grid photos/1.png would replace an image that is to be read"),
        (["--csv", "photos/1.png"], "--csv photos/1.png would replace an image"),
    ],
)
def test_no_output_takes_the_place_of_another_or_of_an_image(
    flags: list[str],
    message: str,
    adapter: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    before = (photos / "1.png").read_bytes()
    assert main(["predict", str(adapter), "photos", *flags]) == 2
    assert message in capsys.readouterr().err and (photos / "1.png").read_bytes() == before
    assert not Path("same").exists()


def test_a_summary_takes_no_file_twice_and_a_picture_is_no_stdout(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["summary", str(adapter), "--csv", "same", "--json", "same"]) == 2
    assert main(["summary", str(adapter), "--picture", "-"]) == 2
    assert "--picture writes a PNG file, got -" in capsys.readouterr().err and not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links")
def test_links_stay_links_and_pipes_are_written_to(adapter: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    target, link, pipe = tmp_path / "results" / "1.csv", tmp_path / "latest.csv", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text("utf-8")), daemon=True)
    reader.start()
    assert main(["predict", str(adapter), str(photos), "--csv", str(link), "--json", str(pipe)]) == 0
    reader.join(30)
    assert link.is_symlink() and len(target.read_text("utf-8").splitlines()) == 5
    assert pipe.is_fifo() and len(json.loads(got[0])["predictions"]) == 4
    assert main(["predict", str(adapter), str(photos), "--json", os.devnull]) == 0
    assert not Path(os.devnull).is_file()
    picture = tmp_path / "pipe.png"
    pipe.rename(picture)
    assert main(["predict", str(adapter), str(photos), "--grid", str(picture)]) == 2 and picture.is_fifo()
    picture.unlink()
    picture.symlink_to(tmp_path / "results" / "1.png")
    assert main(["predict", str(adapter), str(photos), "--grid", str(picture)]) == 0
    assert picture.is_symlink() and (tmp_path / "results" / "1.png").read_bytes().startswith(b"\x89PNG")


def test_errors_of_the_system_are_one_message(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = tmp_path / ("a" * 250 + ".csv")
    assert main(["summary", str(adapter), "--csv", str(too_long)]) == 2
    assert "could not be written: File name too long" in capsys.readouterr().err
    too_long = too_long.with_suffix(".pt2")
    assert main(["export", str(adapter), str(too_long), "--format", "torch", "--input-size", "32"]) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError("a batch is not finite")])
def test_what_was_predicted_until_it_ended_is_kept(
    error: Any,
    adapter: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = predict.predict_images

    def ends(*args: Any, **options: Any) -> Iterator[Any]:
        for i, batch in enumerate(whole(*args, **options)):
            if i == 2:
                raise error
            yield batch

    monkeypatch.setattr(predict, "predict_images", ends)
    table, tree = tmp_path / "p.csv", tmp_path / "p.json"
    flags = ["--batch-size", "1", "--csv", str(table), "--json", str(tree)]
    assert main(["predict", str(adapter), str(photos), *flags]) == (130 if error is KeyboardInterrupt else 2)
    assert not table.exists() and not tree.exists()
    rows = list(csv.DictReader(io.StringIO(Path(f"{table}.partial").read_text("utf-8"))))
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png"]
    assert len(json.loads(Path(f"{tree}.partial").read_text("utf-8"))["predictions"]) == 2
    assert f"Kept the first 2 outcomes in {table}.partial." in capsys.readouterr().err


def test_a_table_of_no_predictions_has_its_columns(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert main(["predict", str(adapter), str(tmp_path / "empty.png"), "--csv", str(tmp_path / "p.csv")]) == 1
    assert (tmp_path / "p.csv").read_text() == "path,class_1,probability_1\n"


def test_where_nothing_was_predicted_nothing_is_kept(adapter: Path, photos: Path, tmp_path: Path) -> None:
    flags = [str(photos), str(photos / "missing.png"), "--csv", str(tmp_path / "p.csv")]
    assert main(["predict", str(tmp_path / "no-adapter"), *flags]) == 2
    assert not list(tmp_path.glob("p.csv*"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["predict"], "\\u732b"),
        (["predict", "--csv", "-"], "猫"),
        (["summary"], "\\u732b"),
        (["summary", "--json", "-"], "猫"),
    ],
)
def test_a_pipe_with_an_old_encoding_is_written_to(args: list[str], expected: str, adapter: Path, photos: Path) -> None:
    """As Windows gives one; what is for programs is UTF-8 there, too."""
    name, *flags = args
    command = [sys.executable, "-m", "nolora_vision", name, str(adapter), *([str(photos)] if name == "predict" else [])]
    done = subprocess.run([*command, *flags], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr.decode()
    assert expected in done.stdout.decode("utf-8" if flags else "cp1252")


def test_a_class_that_is_no_unicode_is_written_with_escapes(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text("utf-8"))
    config = {**config, "class_names": ["c\ud800t", "b", "c"]}
    del config["sha256"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    for flag in ("--json", "--csv"):
        assert main(["summary", str(copy), flag, "-"]) == 0
    assert "c\\ud800t" in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_told_of(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "locked").mkdir()
    scandir = os.scandir

    def refuses(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    found = find_images([str(photos)])
    why = f"could not be read: {photos / 'locked'} (Permission denied)"
    assert len(found.paths) == 4 and found.missing == [(str(photos), why)]
    assert find_images([f"{photos.parent}/phot*"]).missing == [(f"{photos.parent}/phot*", why)]
    assert find_images([str(photos / "locked")]).missing == [(str(photos / "locked"), why)]


def test_a_list_may_begin_with_the_mark_of_utf_8() -> None:
    assert read_names([b"\xef\xbb\xbfa.png\r\n", b"\n", b"b.png"]) == ["a.png", "b.png"]


def test_square_brackets_are_letters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("runs[v1] → m[bold].pt2", [("file", "a[/b].pt2")])
    out = capsys.readouterr().out
    assert "runs[v1] → m[bold].pt2" in out and "a[/b].pt2" in out
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RunsProgress(1, terminal) as progress:  # elsewhere there is no bar
        progress.begin("label [/x]")
        progress.say("lr [1e-3, 2e-3] [/y]")
    assert "label [/x]" in terminal.file.getvalue() and "lr [1e-3, 2e-3] [/y]" in terminal.file.getvalue()
