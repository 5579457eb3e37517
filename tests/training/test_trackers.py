"""Curves of a run that was stopped have each epoch once, with the value that the history has."""

import csv
import shutil
from pathlib import Path

from nolora_vision.training.progress import Silence
from nolora_vision.training.run import run
from nolora_vision.training.run_config import RunConfig
from tests.training.test_resume import stopped


def curve(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (home,) = {path.parent for path in folder.glob("nolora-vision/events.out.tfevents.*")}
    events = EventAccumulator(str(home))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars(name)]
    assert len({step for step, _ in found}) == len(found), found
    return dict(found)


def test_each_epoch_is_there_once_after_going_back_to_an_old_checkpoint(tmp_path: Path) -> None:
    small = {"max_train_samples": 32, "max_eval_samples": 32, "batch_size": 8, "workers": 0, "lr": 0.02}
    model = {"model": "test_vit", "pretrained": False, "img_size": 16, "model_kwargs": {"patch_size": 4}}
    config = RunConfig(
        dataset="digits",
        epochs=5,
        report_to="tensorboard",
        output=tmp_path,
        experiment="run",
        resume="auto",
        checkpoint_steps=4,
        keep_checkpoints=9,
        **small,  # type: ignore[arg-type]
        **model,  # type: ignore[arg-type]
    )
    folder = stopped(config, 15)
    written = {path.name for path in folder.rglob("events.out.tfevents.*")}
    for late in [f for f in (folder / "checkpoints").iterdir() if f.name > "step-00000008"]:
        shutil.rmtree(late)  # as if it had been killed before them
    record = run(config, progress=Silence(), checkpoints=True)
    assert record["resumed_at_updates"] == [8]
    assert written < {path.name for path in folder.rglob("events.out.tfevents.*")}
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    losses = curve(folder, "train_loss")
    assert {step: round(value, 4) for step, value in losses.items()} == {
        int(row["epoch"]): round(float(row["train_loss"]), 4) for row in rows
    }
    assert curve(folder, "test_top1_percent").keys() == {5}
