"""The serving benchmark runs and counts what it says; its times are not for tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from nolora_vision import active_adapter
from nolora_vision.benchmark import serving
from nolora_vision.benchmark.serving import main


def test_it_measures_and_records(tmp_path: Path, capsys) -> None:
    main(model="test_vit", adapters=4, rank=2, batch_size=4, repeats=2, output=tmp_path / "serving.json")
    record = json.loads((tmp_path / "serving.json").read_text())
    assert record["adapters"] == 4 and record["environment"]["versions"]["timm"]
    assert (
        all(t["low_ms"] <= t["median_ms"] <= t["high_ms"] for t in record["times"].values())
        and len(record["times"]) == 6
    )
    assert "swap (set_adapter)" in capsys.readouterr().out


def test_every_swap_that_is_counted_changes_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swaps = serving.set_adapter, []

    def told(model: Any, name: str) -> Any:
        swaps.append((active_adapter(model), name))
        return real(model, name)

    monkeypatch.setattr(serving, "set_adapter", told)
    main(model="test_vit", adapters=4, rank=2, batch_size=4, repeats=4, output=tmp_path / "serving.json")
    counted = swaps[-5 * 6 :: 6]  # five rounds, of a swap, four batches apart and the way back
    assert len(counted) == 5 and all(before != name for before, name in counted)
