"""predict: the right probabilities in the right order, every kind of image, and what is said of those unreadable."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import nolora_vision
from nolora_vision.commands import classifier
from nolora_vision.commands.contact_sheet import contact_sheet
from nolora_vision.commands.images import find_images, natural_key
from nolora_vision.commands.main import main
from nolora_vision.commands.predictions import Prediction, print_table, printable, shorten_middle
from nolora_vision.training import figures
from nolora_vision.training.errors import RunError
from nolora_vision.training.images import UnreadableImageError, image_suffixes, read_image

NAMES = ["cat", "grey, wolf", "dog"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight is in the file, so that nothing is downloaded."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    model.get_classifier().weight.data *= 10  # probabilities that differ from image to image
    return nolora_vision.save_adapter(model, tmp_path_factory.mktemp("predict") / "adapter", class_names=NAMES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images whose natural order is not that of their letters, one of them in a folder below."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for name in ("img10.png", "img2.PNG", "img1.png", "sub/a.png", "z.png"):
        pixels = random.integers(0, 255, (40, 60, 3)) * random.random((1, 1, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


def lines(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def paths_of(text: str) -> list[str]:
    return [Path(row[0]).name for row in lines(text)]


def expected(adapter: Path, path: Path) -> dict[str, float]:
    """Computed without any of the code of the command."""
    model = nolora_vision.from_pretrained(adapter)
    x = nolora_vision.eval_transform(model)(Image.open(path).convert("RGB"))
    with torch.no_grad():
        shares = torch.softmax(model(x[None])[0], 0).tolist()
    return dict(zip(NAMES, shares, strict=True))


def test_probabilities_are_those_of_a_direct_computation(
    adapter: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(adapter), str(photos), "--batch-size", "2", "--workers", "3"]) == 0
    out, err = capsys.readouterr()
    assert paths_of(out) == ["img1.png", "img2.PNG", "img10.png", "a.png", "z.png"] and err == ""
    seen = set()
    for path, *pairs in lines(out):
        got = dict(zip(pairs[::2], map(float, pairs[1::2]), strict=True))
        assert got == pytest.approx(expected(adapter, Path(path)), rel=1e-4, abs=1e-6)  # batches round otherwise
        assert list(got.values()) == sorted(got.values(), reverse=True)
        seen.add(pairs[1])
    assert len(seen) == 5  # no image got another one's row by having the same


def test_csv_and_json_say_the_same(
    adapter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    table, tree = tmp_path / "p.csv", tmp_path / "p.json"
    outputs = ["--csv", str(table), "--json", str(tree), "--top-k", "2"]
    assert main(["predict", str(adapter), str(broken), str(photos), *outputs]) == 1
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    content = json.loads(tree.read_text())
    assert list(rows[0]) == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert content["skipped"] == [{"path": str(broken), "reason": "an empty file"}]
    assert [row["path"] for row in rows] == [row["path"] for row in content["predictions"]] and len(rows) == 5
    for row, item in zip(rows, content["predictions"], strict=True):
        for k, guess in enumerate(item["predictions"], 1):
            assert row[f"class_{k}"] == guess["class"] == NAMES[guess["index"]]
            assert float(row[f"probability_{k}"]) == guess["probability"]
    assert {row["class_1"] for row in rows} | {row["class_2"] for row in rows} >= {"grey, wolf"}  # a comma survives
    capsys.readouterr()


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_a_dash_is_stdout(adapter: Path, photos: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(adapter), str(photos / "z.png"), flag, "-"]) == 0
    out = capsys.readouterr().out
    if flag == "--json":
        assert [p["class"] for p in json.loads(out)["predictions"][0]["predictions"]]
    else:
        assert len(list(csv.reader(io.StringIO(out)))) == 2


def test_skipped_images_are_named_at_the_end(
    adapter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes((photos / "z.png").read_bytes()[:900])
    named = [str(p) for p in (cut, photos / "z.png", photos / "notes.txt", tmp_path / "none.png", tmp_path / "*.gif")]
    assert main(["predict", str(adapter), *named]) == 1
    out, err = capsys.readouterr()
    assert paths_of(out) == ["z.png"]
    assert "Skipped 4 of 5:" in err and f"{cut}: damaged (" in err and "none.png: does not exist" in err
    assert "notes.txt: no image of a kind that Pillow" in err and "*.gif: nothing matches" in err


def test_all_unreadable_is_no_crash(adapter: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(photos / "notes.txt"), "--grid", str(photos.parent / "empty.png")]
    assert main(["predict", str(adapter), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Skipped 1 of 1:" in err and "there is no image to draw" in err


def test_names_come_from_stdin_globs_and_folders(
    adapter: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{photos / 'z.png'}\n\n{photos / 'sub'}\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    again = str(photos / "sub" / ".." / "z.png")
    assert main(["predict", str(adapter), str(photos / "img*.[pP]*"), "-", again]) == 0
    out, err = capsys.readouterr()
    assert paths_of(out) == ["img1.png", "img2.PNG", "img10.png", "z.png", "a.png"]
    assert "1 file was named more than once, and predicted once." in err


def test_finding(photos: Path, tmp_path: Path) -> None:
    assert sorted(["b10", "b9", "B1", "a"], key=natural_key) == ["a", "B1", "b9", "b10"]
    assert sorted(["1a", "a", "²", "01"], key=natural_key)[0] == "01"  # '²' is a digit to str, but no number to int
    literal = tmp_path / "a[1].png"
    literal.write_bytes((photos / "z.png").read_bytes())
    assert find_images([str(literal)]).paths == [str(literal)]
    (tmp_path / "empty").mkdir()
    assert find_images([str(tmp_path / "empty")]).missing == [(str(tmp_path / "empty"), "a folder without images")]
    assert find_images([f"{tmp_path}/*"]).paths == [str(literal)]
    (tmp_path / "empty" / "loop").symlink_to(tmp_path)
    assert find_images([str(tmp_path)]).paths == [str(literal)]
    assert {".jpg", ".png", ".webp", ".tif"} <= image_suffixes() and ".eps" not in image_suffixes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}/nothing*"], "No images found:\n  {photos}/nothing*: nothing matches"),
        ([], "No images given"),
        (["{photos}", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["{photos}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["{photos}", "--workers", "0"], "--workers must be at least 1"),
        (["{photos}", "--csv", "-", "--json", "-"], "both want stdout"),
        (["{photos}", "--csv", "{photos}/no/p.csv"], "there is no folder {photos}/no. Create it first."),
        (["{photos}", "--json", "{photos}"], "is a folder. Name a file in it."),
        (["{photos}", "--grid", "sheet.jpg"], "--grid writes a PNG file, got sheet.jpg"),
        (["{photos}", "--amp-dtype", "float16", "--device", "cpu"], "--amp-dtype float16 needs a GPU"),
    ],
)
def test_bad_arguments_are_one_message(
    adapter: Path, photos: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(photos=photos) for argument in arguments]
    assert main(["predict", str(adapter), *filled]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nolora-vision: ") and message.format(photos=photos) in err


def test_an_empty_list_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert main(["predict", "any", "-"]) == 2
    assert "the list on stdin is empty" in capsys.readouterr().err


def test_a_missing_device_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match=r"--device cuda: this PyTorch finds none. Usable here: .*cpu"):
        classifier.load_model(str(adapter), device="cuda")


def test_a_grid_needs_matplotlib(
    adapter: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "pyplot", lambda: None)
    assert main(["predict", str(adapter), str(photos), "--grid", str(photos.parent / "g.png")]) == 2
    assert "--grid needs matplotlib: pip install" in capsys.readouterr().err


def test_adapters_are_folded_to_the_same_outputs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=3), modulation="vector", alpha=16).eval()
    for parameter in nolora_vision.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model(x)
        monkeypatch.setattr(nolora_vision, "from_pretrained", lambda source, revision, device: model.to(device))
        folded, _ = classifier.load_model("any", device="cpu")
        after = folded(x)
    assert torch.allclose(before, after, atol=1e-4)  # fp32, s and v multiplied in another order
    from nolora_vision.surgery.inject import injection_of

    assert injection_of(folded).config.modulation == "none"


def test_mixed_precision_is_near_and_not_the_same(adapter: Path, photos: Path) -> None:
    model, _ = classifier.load_model(str(adapter), device="cpu")
    both = [
        next(classifier.predict_images(model, [str(photos / "z.png")], amp_dtype=dtype))
        for dtype in ("none", "bfloat16")
    ]
    exact, rounded = (dict(zip(p.classes, p.probabilities, strict=True)) for (p,) in both)
    assert exact != rounded and exact == pytest.approx(rounded, abs=0.2)  # bf16 keeps 3 digits of logits around 10


def test_outputs_that_are_no_numbers_are_an_error(adapter: Path, photos: Path) -> None:
    model, _ = classifier.load_model(str(adapter), device="cpu")
    model.get_classifier().bias.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"outputs are not finite numbers. Try --amp-dtype"):
        next(classifier.predict_images(model, [str(photos / "z.png")]))


def test_a_missing_adapter_is_one_message(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(photos / "nowhere"), str(photos)]) == 2
    assert "nolora-vision: " in capsys.readouterr().err


def test_work_is_read_ahead_but_not_far() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = classifier.read_ahead(jobs(), lambda i: i * i, workers=3, ahead=5)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    assert len(taken) == 4 + 5
    assert list(results) == [i * i for i in range(4, 100)]


# Reading


def test_the_upright_picture_is_read(tmp_path: Path) -> None:
    upright = Image.new("RGB", (30, 20), "red")
    upright.paste("blue", (0, 0, 30, 10))  # blue above, red below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    image = read_image(str(tmp_path / "a.png"))
    assert image.size == (30, 20) and image.getpixel((15, 2)) == (0, 0, 255) and image.getpixel((15, 17)) == (255, 0, 0)


def _transparent_palette() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    return image


MODES = {
    "1.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L.png": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "LA.png": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
    "RGBA.png": (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
    "half.png": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
    "P.gif": (Image.new("RGB", (4, 4), (10, 200, 30)).quantize(), (10, 200, 30)),
    "clear.png": (_transparent_palette(), (255, 255, 255)),
    "16.png": (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),
    "16.tiff": (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),
    "32.tiff": (Image.new("I", (4, 4), 257 * 100), (100, 100, 100)),
    "float.tiff": (Image.new("F", (4, 4), 0.4), (102, 102, 102)),
    "float255.tiff": (Image.new("F", (4, 4), 102.0), (102, 102, 102)),
    "CMYK.tiff": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    "CMYK.jpg": (Image.new("CMYK", (16, 16), (0, 0, 0, 0)), (255, 255, 255)),
    "YCbCr.jpg": (Image.new("YCbCr", (16, 16), (128, 128, 128)), (128, 128, 128)),
    "LAB.tiff": (Image.new("LAB", (4, 4), (255, 128, 128)), (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name: str, tmp_path: Path) -> None:
    image, wanted = MODES[name]
    image.save(tmp_path / name)
    read = read_image(str(tmp_path / name))
    got = read.getpixel((1, 1))
    assert read.mode == "RGB" and isinstance(got, tuple)
    assert got == pytest.approx(wanted, abs=1)  # of JPEG and LAB, which round


def _png_of(width: int, height: int) -> bytes:
    """The header of a PNG that claims to be of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.filterwarnings("ignore:Image size")  # predict_images silences Pillow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png_of(50_000, 50_000), "more than 178,956,970 pixels"),
        (_png_of(3, 5000), "3 × 5000 pixels, too long a strip"),
        (_png_of(100, 100), "damaged"),
        (b"", "an empty file"),
        (b"GIF89a", "damaged|no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a kind"),
    ],
)
def test_what_is_no_whole_image_says_why(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=message):
        read_image(str(path))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    for name, message in (("pipe.png", "neither a file nor a folder"), ("lost.png", "no such file")):
        with pytest.raises(UnreadableImageError, match=message):
            read_image(str(tmp_path / name))


# Showing


def _shown(width: int, predictions: list[Prediction]) -> str:
    stream = io.StringIO()
    print_table(predictions, "title", Console(file=stream, width=width))
    return stream.getvalue()


def test_a_table_fits_any_terminal() -> None:
    path = "a/very/long/folder/of/photographs/from/the/summer/IMG_0001.jpeg"
    guesses = Prediction(path, ("cat", "犬", "x" * 60, "[bold]"), (0, 1, 2, 3), (0.9, 0.06, 0.03, 0.01))
    for width in (40, 60, 80, 120, 200):
        text = _shown(width, [guesses, Prediction("b", skipped="gone")])
        rows = [line for line in text.splitlines() if line.startswith(("│", "┃", "┏"))]
        assert all(Console(width=width).measure(row).maximum <= width for row in rows) and "cat  90.0 %" in text
        assert "IMG_0001.jpeg" in text and "gone" not in text
        assert ("of 4 classes are shown" in text) == ("[bold]" not in text)
    assert path in text and "[bold]" in text and "top-1" in text and "4th" in text
    assert _shown(80, [Prediction("b", skipped="gone")]) == ""


def test_names_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\tc\n\udcffé犬") == r"a\x1b[2Jb\tc\n\udcffé犬"
    assert shorten_middle("abcdefghij", 7) == "ab…ghij" and shorten_middle("abc", 3) == "abc"


def test_a_terminal_gets_a_table(
    adapter: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["predict", str(adapter), str(photos / "z.png"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "1 images" not in out and "1 image in" in out and "top-1" in out and "z.png" in out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_unicode_are_written_with_escapes(
    adapter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Path(name).write_bytes((photos / "z.png").read_bytes())
    assert (
        main(["predict", str(adapter), name, "--csv", str(tmp_path / "p.csv"), "--json", str(tmp_path / "p.json")]) == 0
    )
    assert r"\udcff.png" in capsys.readouterr().out
    assert r"\udcff.png" in (tmp_path / "p.csv").read_text() and json.loads((tmp_path / "p.json").read_text())


def test_a_contact_sheet_shows_the_images(
    adapter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nolora_vision.commands.predict.GRID_IMAGES", 2)
    Image.new("RGB", (50, 50), (250, 0, 250)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 50), (0, 250, 250)).save(tmp_path / "b.png")
    sheet = tmp_path / "sheet.png"
    assert main(["predict", str(adapter), str(tmp_path), str(photos / "z.png"), "--grid", str(sheet)]) == 0
    pixels = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3)
    shares = [float((pixels == colour).all(1).mean()) for colour in ((250, 0, 250), (0, 250, 250))]
    assert shares[0] == pytest.approx(shares[1], rel=0.05) and shares[0] > 0.2
    assert "shows the first 2 of 3 images" in capsys.readouterr().err


def test_contact_sheets_of_any_number_and_odd_names(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20), "red")
    sizes = []
    for n in (1, 2, 100):
        cells = [(image, "$x_$ 犬 tench, Tinca tinca", i / n, "a_long_$name$\n.png") for i in range(n)]
        assert contact_sheet(tmp_path / "s.png", cells, title="t" * 200, left_out=n)
        with Image.open(tmp_path / "s.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[0][0] >= 200 and max(sizes[2]) <= 2600
    assert os.listdir(tmp_path) == ["s.png"]
