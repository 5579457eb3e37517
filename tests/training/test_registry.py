"""The datasets with short names, by their exact ids and columns, from a Hub on loopback with small files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from nolora_vision.training.registry import CORRUPTIONS, REGISTRY
from tests import hub_server

TABLE = {  # benchmark's table: id, image column, label column, classes; and what else the repository has
    "cifar10": ("uoft-cs/cifar10", "img", "label", 10, ()),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", 100, ("coarse_label",)),
    "pets": ("timm/oxford-iiit-pet", "image", "label", 37, ("image_id", "label_cat_dog")),
    "cars": ("tanganke/stanford_cars", "image", "label", 196, ()),
    "dtd": ("tanganke/dtd", "image", "label", 47, ()),
    "eurosat": ("timm/eurosat-rgb", "image", "label", 10, ("image_id",)),
    "aircraft": ("mteb/FGVCAircraft", "image", "variant", 100, ("family", "manufacturer", "label")),
    "resisc45": ("timm/resisc45", "image", "label", 45, ("image_id",)),
    "food101": ("ethz/food101", "image", "label", 101, ()),
    "flowers102": ("dpdl-benchmark/oxford_flowers102", "image", "label", 102, ()),
    "beans": ("AI-Lab-Makerere/beans", "image", "labels", 3, ("image_file_path",)),
}
ROWS = {"train": 40, "validation": 8, "test": 12} | {name: 14 + i for i, name in enumerate(CORRUPTIONS)}

LOAD = """
import json, sys
from nolora_vision.training.data import load_data
from nolora_vision.training.errors import RunError
answers = []
for name, options in json.loads(sys.argv[1]):
    try:
        data = load_data(name, **options)
        image = data.test.table.image(0)
        answers.append({"about": data.about, "pixel": image.getpixel((0, 0)), "mode": image.mode,
                        "labels": sorted(set(data.train.labels.tolist())), "classes": list(data.class_names)})
    except RunError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""
ASKED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TABLE),
    ("cars", {"test_split": "contrast"}),
    ("cars", {"test_split": "fog"}),
    ("beans", {"revision": "v0"}),
    ("beans", {"revision": "v9"}),
    ("cifar100", {"label_key": "coarse_label"}),
    ("tanganke/dtd", {}),
]


def parquet(rows: int, image: str, label: str, classes: int, others: tuple[str, ...], shade: int) -> bytes:
    """Two classes in turns; other columns hold ones and zeros. All images have one colour, `shade`."""
    stream = BytesIO()
    Image.fromarray(np.full((4, 4), shade, np.uint8)).save(stream, "PNG")
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
    features = {**dict.fromkeys(others, datasets.Value("int64")), image: datasets.Image(), label: names}
    columns: dict[str, Any] = {key: [1 - i % 2 for i in range(rows)] for key in others}
    columns |= {image: [{"bytes": stream.getvalue(), "path": None}] * rows, label: [i % 2 for i in range(rows)]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    out = BytesIO()
    table.to_parquet(out)
    return out.getvalue()


def commit(server: hub_server.HubServer, name: str, *, shade: int = 0) -> str:
    id, image, label, classes, others = TABLE[name]
    repo = server.repos.setdefault(f"datasets/{id}", hub_server.Repo())
    files = {}
    for i, split in enumerate(REGISTRY[name].splits):
        content = parquet(ROWS[split], image, label, classes, others, shade + 10 * i)
        files[f"data/{split}-00000-of-00001.parquet"] = content
    return repo.commit(files)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each of ASKED gave, by its JSON, and under `commit` the commits on the server."""
    with hub_server.hub_server() as server:
        first = commit(server, "beans", shade=100)
        server.repos["datasets/AI-Lab-Makerere/beans"].refs["v0"] = first
        commits = {name: commit(server, name) for name in TABLE}
        env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "0"}
        env = {**os.environ, **env, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", LOAD, json.dumps(ASKED)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        given = {json.dumps(asked): answer for asked, answer in zip(ASKED, json.loads(done.stdout), strict=True)}
        yield {**given, "commits": {**commits, "v0": first}}


def of(answers: dict[str, Any], name: str, **options: str) -> dict[str, Any]:
    return answers[json.dumps((name, options))]


def test_the_registry_is_the_benchmarks_table() -> None:
    known = {name: (d.id, d.image, d.label, d.num_classes) for name, d in REGISTRY.items()}
    assert known == {name: row[:4] for name, row in TABLE.items()}
    assert {name for name, d in REGISTRY.items() if d.crop_pct == 1.0} == {"cifar10", "cifar100"}
    assert len(CORRUPTIONS) == 7 and set(CORRUPTIONS) < set(REGISTRY["cars"].splits)


@pytest.mark.parametrize("name", TABLE)
def test_each_loads_by_its_short_name(answers: dict[str, Any], name: str) -> None:
    answer, (id, _, _, classes, _) = of(answers, name), TABLE[name]
    about = answer["about"]
    assert about["id"] == id and about["num_classes"] == classes and answer["classes"][1] == "class 1"
    assert about["revision"] == "main" and about["commit"] == answers["commits"][name]
    assert answer["labels"] == [0, 1] and answer["mode"] == "RGB"
    test = "test" if "test" in REGISTRY[name].splits else "validation"
    assert about["test_images"] == about["rows"][test] == ROWS[test]
    own = "validation" in REGISTRY[name].splits and test != "validation"
    assert about["train_images"] + (0 if own else about["val_images"]) == ROWS["train"]
    assert set(about["rows"]) == {"train", test, *(["validation"] if own else [])}  # no corruption among them


def test_a_corruption_by_its_name(answers: dict[str, Any]) -> None:
    answer = of(answers, "cars", test_split="contrast")
    assert answer["about"]["test_images"] == ROWS["contrast"] and answer["pixel"] == [20, 20, 20]
    wanted = "no split 'fog' to test on. Choose --test-split from: "
    error = of(answers, "cars", test_split="fog")["error"]
    assert wanted in error and all(name in error for name in CORRUPTIONS)


def test_another_revision(answers: dict[str, Any]) -> None:
    answer = of(answers, "beans", revision="v0")
    assert answer["about"]["commit"] == answers["commits"]["v0"] and answer["about"]["revision"] == "v0"
    assert answer["pixel"] == [120, 120, 120] and of(answers, "beans")["pixel"] == [20, 20, 20]
    error = of(answers, "beans", revision="v9")["error"]  # datasets 4.0 then turns to the cache, which has others
    assert "or has no revision 'v9'" in error or "the cache does not hold its revision 'v9'" in error


def test_the_id_and_other_columns_work_too(answers: dict[str, Any]) -> None:
    assert of(answers, "tanganke/dtd")["about"]["num_classes"] == 47
    assert of(answers, "cifar100", label_key="coarse_label")["classes"] == ["0", "1"]
