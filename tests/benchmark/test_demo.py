"""The demo's path, with fewer epochs and seeds than `make demo`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nolora_vision.benchmark import demo


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"max_train_samples": 64, "max_eval_samples": 32, "epochs": 2, "warmup_epochs": 0}
    monkeypatch.setattr(demo, "BASE", replace(demo.BASE, **few))
    monkeypatch.setattr(demo, "PRETRAINING", replace(demo.PRETRAINING, **few))
    first = demo.demo(2, tmp_path)
    out = capsys.readouterr().out
    assert "digits 0-4" in out and "not a benchmark" in out and "pretrained on digits 0-4" in out
    assert [row["method"] for row in first["results"]] == ["linear", "lora", "nolora", "full"]
    for row in first["results"]:
        assert row["mean_percent"] == pytest.approx(sum(row["test_top1_percent"]) / 2)
        assert f"{row['mean_percent']:.2f}" in out
    folder = Path(first["folder"])
    assert (folder / "comparison.png").is_file() and (folder / "nolora-seed1" / "record.json").is_file()
    saved = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert saved["results"] == first["results"] and saved["environment"]["versions"]["torch"]
    backbones = list(tmp_path.glob("backbone-*"))
    weights = demo.pretrain(tmp_path, demo.RunsProgress(1))
    assert weights.is_file() and list(tmp_path.glob("backbone-*")) == backbones
