"""The loading benchmark: its rows and its record; no clock is tested."""

import json
from pathlib import Path

import pytest

from nolora_vision.benchmark import loading


@pytest.mark.parametrize("dataset", ["photos", "digits"])
def test_it_writes_a_record_of_every_row(tmp_path: Path, dataset: str) -> None:
    loading.main(dataset=dataset, model="test_vit", images=6, photo_size=(50, 40), batch_size=2, workers=(0,), rounds=2,
                 output=tmp_path)  # fmt: skip
    record = json.loads((tmp_path / "loading.json").read_text())
    rows = [(row["what"], row["cached"]) for row in record["rows"]]
    loaders = [(f"{kind} loader", cached) for kind in ("training", "evaluation") for cached in (False, True)]
    assert rows == [("decoding", False), *loaders, ("training step", False), ("evaluation step", False)]
    assert all(row["lowest_images_per_s"] <= row["images_per_s"] for row in record["rows"])
    assert [row["time_percent_of_step"] for row in record["rows"][-2:]] == pytest.approx([100, 100])
    assert ("photo_size" in record) == (dataset == "photos")


def test_photos_are_as_asked_for(tmp_path: Path) -> None:
    from nolora_vision.training.data import load_data

    data = load_data(str(loading.make_photos(tmp_path, 4, (60, 40))), val_split=0.5)
    assert data.train.table.image(0).size == (60, 40) and len(data.train) == len(data.val) == len(data.test) == 4
