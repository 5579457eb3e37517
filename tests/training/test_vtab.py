"""VTAB-1k: its tasks, both averages, and the community's layout on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from nolora_vision.training import vtab
from nolora_vision.training.data import load_data
from nolora_vision.training.errors import RunError
from nolora_vision.training.ingredients import load_config_data, loader, preprocessing
from nolora_vision.training.pack import pack
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.vtab import VTAB_GROUPS, VTAB_TASKS, vtab_averages


def make_task(root: Path, task: str = "svhn", classes: int = 10) -> Path:
    """20 training, 10 validation and 30 test images, each of its own colour."""
    folder = root / task
    lists = {"train800": range(20), "val200": range(20, 30), "test": range(30, 60), "train800val200": range(30)}
    for part in ("train", "test"):
        (folder / "images" / part).mkdir(parents=True)
    for name, numbers in lists.items():
        lines = []
        for i in numbers:
            file = Path("images") / ("test" if name == "test" else "train") / f"{i:06d}.png"
            Image.new("RGB", (6, 4), (i, 100, 0)).save(folder / file)
            lines.append(f"{file.as_posix()} {i % classes}\n")
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_there_are_19_tasks_in_groups_of_7_4_and_8() -> None:
    assert [len(group) for group in VTAB_GROUPS.values()] == [7, 4, 8] and len(VTAB_TASKS) == 19
    assert sum(VTAB_TASKS.values()) == 940


def test_a_report_gets_them_without_torch() -> None:
    script = "import runpy, sys; sys.modules['torch'] = None; print(runpy.run_path(sys.argv[1])['vtab_averages'])"
    done = subprocess.run([sys.executable, "-c", script, vtab.__file__], capture_output=True, text=True)
    assert done.returncode == 0 and "function vtab_averages" in done.stdout, done.stderr


def test_both_averages() -> None:
    of_group = {"natural": 80.0, "specialized": 85.0, "structured": 60.0}
    scores = {task: of_group[group] for group, tasks in VTAB_GROUPS.items() for task in tasks}
    groups, sets = vtab_averages(scores)
    assert groups == pytest.approx(75.0) and sets == pytest.approx((7 * 80 + 4 * 85 + 8 * 60) / 19)
    with pytest.raises(ValueError, match="missing: cifar; unknown: cifar100"):
        vtab_averages({"cifar100" if task == "cifar" else task: score for task, score in scores.items()})


@pytest.mark.parametrize("by_name", [True, False])
def test_a_task_by_name_or_by_its_folder(tmp_path: Path, by_name: bool) -> None:
    folder = make_task(tmp_path)
    data = load_data("vtab:svhn", vtab_root=tmp_path) if by_name else load_data(str(folder))
    assert (len(data.train), len(data.val), len(data.test)) == (20, 10, 30)
    assert data.about["id"] == "vtab:svhn" and data.about["num_classes"] == 10
    assert (data.about["crop_pct"], data.about["crop_mode"]) == (1.0, "squash")
    assert data.about["splits"] == {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    assert data.val.table.image(3).getpixel((0, 0)) == (23, 100, 0) and data.val.labels[3] == 3


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("crop_mode", "borders"), [(None, True), ("squash", True), ("center", False)])
def test_the_whole_width_of_an_image_is_looked_at(
    tmp_path: Path, split: str, crop_mode: str | None, borders: bool
) -> None:
    """A green image with a red left and a blue right border, three times as wide as high."""
    folder = make_task(tmp_path)
    for file in folder.rglob("*.png"):
        image = Image.new("RGB", (90, 30), "lime")
        image.paste("red", (0, 0, 20, 30))
        image.paste("blue", (70, 0, 90, 30))
        image.save(file)
    config = RunConfig(
        dataset="vtab:svhn", vtab_root=tmp_path, no_aug=True, crop_mode=crop_mode, workers=0, batch_size=4
    )
    data, model = load_config_data(config), timm.create_model("test_vit")
    images = preprocessing(config, model, data.about) | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    batch, _ = next(iter(loader(config, images, getattr(data, split), training=split == "train")))
    height, width = batch.shape[2:]
    middle, sides = batch[:, :, height // 2, width // 2], batch[:, :, height // 2, [3, width - 4]]
    assert torch.allclose(middle, torch.tensor([0.0, 1.0, 0.0]), atol=0.02)
    wanted = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]] if borders else [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert torch.allclose(sides, torch.tensor(wanted), atol=0.02)


def test_a_packed_task_is_looked_at_in_the_same_way(tmp_path: Path) -> None:
    about = load_data(str(pack(str(make_task(tmp_path)), tmp_path / "svhn.safetensors"))).about
    assert (about["id"], about["crop_pct"], about["crop_mode"]) == ("vtab:svhn", 1.0, "squash")


def test_the_final_run_trains_on_all_1000(tmp_path: Path) -> None:
    make_task(tmp_path)
    data = load_data("vtab:svhn", vtab_root=tmp_path, train_on="train_val")
    seen = {data.train.table.image(int(row)).getpixel((0, 0))[0] for row in data.train.rows}
    assert seen == set(range(30)) and len(data.train) == 30 and not data.val_held_out and len(data.val) == 10


def test_the_validation_list_can_be_the_test(tmp_path: Path) -> None:
    data = load_data(str(make_task(tmp_path)), test_split="val200", val_split=0.5)
    assert (
        len(data.test) == 10 and data.about["splits"]["test"] == "val200.txt" and len(data.val) + len(data.train) == 20
    )


def spoil(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.txt", "images/test/000030.png 10\n", r"should have 10 classes, 0 to 9; its labels go to 10"),
        ("train800.txt", "images/train/000000.png\n", r"train800\.txt, line 1: wanted a path and a label, got"),
        ("val200.txt", "\n\n", r"val200\.txt lists no images"),
        ("val200.txt", "nowhere.png 3\n", r"lists .*nowhere\.png, which is not there\. Paths are relative to"),
        ("train800val200.txt", "images/train/000000.png 0\n", r"does not list the images of train800\.txt and val200"),
    ],
)
def test_what_is_wrong_in_a_list_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = make_task(tmp_path)
    spoil(folder, name, text)
    with pytest.raises(RunError, match=message):
        load_data(str(folder))


def test_what_is_no_task_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"VTAB-1k has no task 'shvn'\. Did you mean 'svhn'\? Wanted one of cifar"):
        load_data("vtab:shvn", vtab_root=tmp_path)
    with pytest.raises(RunError, match=r"vtab:svhn needs the folder that holds VTAB-1k's tasks.*--vtab-root DIR"):
        load_data("vtab:svhn")
    with pytest.raises(RunError, match=r"svhn is no task of VTAB-1k: wanted train800\.txt, val200\.txt, test\.txt"):
        load_data("vtab:svhn", vtab_root=tmp_path)
