"""A saved adapter is tested on the classes that it knows, and the images that it is tested on are named."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nolora_vision.training.retest import numbered_as
from nolora_vision.training.run import main
from nolora_vision.training.splits import Split
from nolora_vision.training.table import Table
from tests.training.test_run import SCRATCH, train


def split(names: tuple[str, ...], labels: list[int]) -> Split:
    return Split(Table(lambda i: Image.new("RGB", (1, 1)), labels, names), np.arange(len(labels)))


def test_classes_are_told_by_their_names_and_else_it_is_said() -> None:
    own = split(("ant", "bee", "cat"), [0, 1, 2, 2])
    assert numbered_as(own, None) == (own, None) and numbered_as(own, ["ant", "bee", "cat"]) == (own, None)
    other, complaint = numbered_as(own, ["cat", "ant", "bee"])
    assert other.labels.tolist() == [1, 2, 0, 0] and complaint is None
    same, complaint = numbered_as(own, ["a", "b", "c"])
    assert same is own
    assert (
        complaint
        == "the adapter's classes are called a, b, c; the images' ant, bee, cat. They are compared by their numbers."
    )


def test_the_command_that_a_run_prints_tests_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(tmp_path, "--method", "full", "--max-eval-samples", "20")
    out = capsys.readouterr().out
    command = shlex.split(out.split("Test it again: python train.py ")[1].splitlines()[0])
    assert main([*command, "-j", "0"]) == 0
    again = capsys.readouterr()
    assert f"{record['metrics']['test_top1_percent']:.2f} %" in again.out and "20 in " in again.out
    assert "the dataset's own" in again.out and not again.err
    command[command.index("digits:5-9")] = "digits:0-4"
    assert main([*command, "-j", "0"]) == 0
    assert "warning: the adapter's classes are called 5, 6, 7, 8, 9; the images' 0, 1" in capsys.readouterr().err


def test_a_run_on_random_frozen_weights_names_no_command_that_would_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "--max-eval-samples", "20")
    out = capsys.readouterr().out
    assert "Its frozen weights are random and in no file" in out and "Use it" not in out and "Test it again" not in out
    run = next(tmp_path.rglob("record.json")).parent
    assert main(["--eval-only", "--adapter", str(run), "--dataset", "digits"]) == 2
    assert f"Did you mean {run / 'adapter'}?" in capsys.readouterr().err


def test_an_odd_batch_is_not_mixed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--mixup", "0.2", "--max-train-samples", "13", "--output", str(tmp_path / "out")]
    assert main([*SCRATCH, *few]) == 2
    assert "The 13 training images make one batch" in capsys.readouterr().err and not (tmp_path / "out").exists()
