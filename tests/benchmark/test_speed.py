"""The speed benchmark: what its rows are, what they keep and how many operations they take; no clock is tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import nolora_vision
from nolora_vision.benchmark import speed
from nolora_vision.benchmark.speed_rows import OURS, PEERS, ROWS, build_row
from nolora_vision.surgery.adapter import adapted_layers
from tests.families import FAMILIES

CPU = torch.device("cpu")
CONFIG = nolora_vision.AdapterConfig(rank=2)


def test_it_writes_tables_and_a_picture(tmp_path: Path, capsys) -> None:
    speed.main(models=("test_vit",), dtypes=("float32",), rank=2, batch_size=1, rounds=5, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [table["subject"] for table in record["tables"]] == ["qkv", "fc1", "fc2", "test_vit", "test_vit"]
    for table in record["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert {"frozen", *PEERS} <= rows.keys()
        assert len(rows) == (6 if table["part"] == "step" else 4) + 2 * len(OURS)
        assert rows["frozen"]["ratio_to_frozen"]["median"] == rows["peft lora"]["ratio_to_peft_lora"]["median"] == 1
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "× PEFT LoRA" in capsys.readouterr().out


@pytest.mark.parametrize("method", ROWS)
def test_rows_sit_on_the_same_layers_and_train_what_they_name(method: str) -> None:
    family = FAMILIES["swinv2"]
    model = build_row(family.build(), method, CONFIG).train()
    plain = nolora_vision.inject(family.build(), CONFIG)
    model(family.images(2)).square().sum().backward()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("head" in name for name in trains)
    if method in PEERS:
        layers = {
            name.rpartition(".lora_A")[0] or name.rpartition(".peanut_")[0] for name in trains if "head" not in name
        }
        found = {path for path in adapted_layers(plain) for layer in layers if layer.startswith(path)}
        assert found == set(adapted_layers(plain))
    learning = [p for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in learning), "a bypassed layer learns nothing"


def test_an_unknown_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"A row must be one of frozen, head, .*, got 'lora'"):
        build_row(timm.create_model("test_vit"), "lora", CONFIG)


def test_the_node_keeps_less_and_runs_fewer_large_operations() -> None:
    """Of a layer of ViT-B alone, whose input (1 × 197 × 3072 fp32) all keep."""
    kept = {}
    rows = [("peft lora", "eager"), ("ours linear", "autograd"), ("ours swish gate", "eager")]
    for method, backend in [*rows, ("ours swish gate", "autograd")]:
        job = speed._layer_job("fc2", method, backend, CONFIG, 1, CPU, "float32")
        job.run()
        kept[job.name] = speed.count(job)["saved_bytes"]
    assert kept["ours swish gate, autograd"] <= 4 * 197 * (3072 + 4 * 2)  # x, h, z and the two tanh, nothing else
    assert kept["ours swish gate, autograd"] < kept["ours swish gate, eager"]
    assert kept["ours linear, autograd"] <= kept["peft lora"]


def test_a_linear_layer_takes_fewer_operations_than_pefts() -> None:
    """On a GPU with a slow host, launching them is what a step takes its time for."""
    counts = {}
    for method in ("frozen", "peft lora", "ours linear", "ours swish gate"):
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.act, model.fc = torch.nn.GELU(), torch.nn.Linear(16, 16)
        only = nolora_vision.AdapterConfig(rank=2, targets=("fc",))
        build_row(model, method, only, example_input=torch.zeros(1, 16))
        x = torch.randn(3, 5, 16, requires_grad=True)

        def forward(model: torch.nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).sum()

        counts[method] = speed.count(speed.Job(method, lambda forward=forward: forward().backward(), forward, model))
    added = {method: found["operations"] - counts["frozen"]["operations"] for method, found in counts.items()}
    assert added["ours linear"] < added["peft lora"], added
    assert added["ours swish gate"] <= added["ours linear"] + 34, added  # f, v and the gate; no tanh is made twice
