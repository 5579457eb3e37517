"""The serving benchmark runs and counts what it says; its times are not for tests."""

import json
from pathlib import Path

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
