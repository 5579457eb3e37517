"""A live bar on a terminal, plain lines elsewhere; and the pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nolora_vision.training import figures
from nolora_vision.training.progress import LiveProgress, RunsProgress

ROW = {"epoch": 1, "train_loss": 0.5, "train_top1_percent": 80.0, "val_top1_percent": 75.25, "images_per_s": 99.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, force_terminal=terminal, width=120)) as progress:
        progress.start_epoch(0, 2, 4)
        progress.step(loss=0.5, top1=80.0, images_per_s=99.0)
        progress.bar.refresh()
        progress.end_epoch(ROW)
    text = stream.getvalue()
    assert "epoch 1/2" in text and "val top-1 75.25 %" in text
    assert ("\x1b[" in text) == terminal and ("1/8" in text) == terminal and ("99 images/s" in text)


def test_several_runs_share_one_bar() -> None:
    progress = RunsProgress(2, Console(file=io.StringIO()))
    for run in range(2):
        with progress:
            progress.begin(f"run {run}")
            for epoch in range(3):
                progress.start_epoch(epoch, 3, 5)
                for _ in range(5):
                    progress.step(loss=1.0, top1=0.0, images_per_s=1.0)
        assert progress.bar.tasks[0].completed == pytest.approx(run + 1)


def test_pictures_show_the_numbers(tmp_path: Path) -> None:
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e} for e in (1, 2, 3)]
    history = [{**row, "train_top1_percent": 50.0, "val_top1_percent": 40.0} for row in history]
    del history[0]["val_loss"], history[0]["val_top1_percent"]  # an epoch that was not validated
    assert figures.learning_curve(tmp_path / "a.png", history, best_epoch=2, title="t")
    labels = np.array([0, 0, 1, 1, 2, 2])
    right, wrong = (tmp_path / f"{name}.png" for name in ("right", "wrong"))
    assert figures.confusion_matrix(right, labels, labels, ["a", "b", "c"], title="t")
    assert figures.confusion_matrix(wrong, labels, (labels + 1) % 3, ["a", "b", "c"], title="t")
    pictures = [np.asarray(Image.open(path).convert("L")) for path in (right, wrong)]
    assert pictures[0].shape[0] > 300 and not np.array_equal(*pictures)
    result = {"method": "lora", "trainable_without_head": 10, "head": 5, "test_top1_percent": [1.0, 2.0]}
    result["val_top1_percent_by_epoch"] = [[1, 2, 3], [2, 3, 4]]
    assert figures.method_comparison(tmp_path / "c.png", [result], title="t")
