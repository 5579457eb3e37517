"""The real commands on real weights and real images, from the Hub whose address is in NOLORA_TEST_HUB."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked_train import Terminal, emptied, terminal

pytestmark = pytest.mark.hub

ROOT = Path(__file__).parents[2]

TINY = ["--model", "vit_tiny_patch16_224", "--max-train-samples", "16", "--max-eval-samples", "16", "--epochs", "1"]
TINY += ["-b", "8", "--workers", "0", "--output", "out", "--experiment", "run", "--amp-dtype", "bfloat16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of both terminals."""
    return tmp_path_factory.mktemp("hub") / "hf"


@pytest.fixture(scope="module")
def online(hub_env, home: Path) -> Iterator[Terminal]:
    with terminal(**{**hub_env, "HF_HOME": str(home)}) as typed:
        yield typed


@pytest.fixture(scope="module")
def offline(home: Path) -> Iterator[Terminal]:
    """Where a Hub that is asked all the same does not answer."""
    with terminal(HF_HOME=str(home), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") as typed:
        yield typed


def test_a_run_on_the_hubs_weights_and_images(online: Terminal, offline: Terminal, tmp_path: Path) -> None:
    done = online.train(*TINY, "--img-size", "32", "--dataset", "cifar10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["model"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert record["dataset"]["id"] == "uoft-cs/cifar10" and record["dataset"]["num_classes"] == 10
    assert record["parameters"]["adapter"] == 12 * (3 * 8 * (8 + 3) + 8 * (4 * 192 + 2 * 5 * 192))
    config = json.loads((tmp_path / "out" / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["class_names"][0] == "airplane" and config["preprocessing"]["crop_pct"] == 1.0

    scored = f"{record['metrics']['test_top1_percent']:.2f} %"
    adapter = str(tmp_path / "out" / "run" / "adapter")
    args = ["--eval-only", "--adapter", adapter, "--dataset", "cifar10", "--max-eval-samples", "16", "-b", "8"]
    again = offline.train(*args, "--workers", "0", "--amp-dtype", "bfloat16", cwd=tmp_path)  # the cache is warm now
    assert again.returncode == 0 and scored in again.stdout, again.stderr


CIFAR = """
import json, sys
from pathlib import Path
import numpy as np
from nolora_vision.training.data import load_data
from nolora_vision.training.pack import pack
cifar, file = load_data("cifar10"), Path("cifar10.safetensors")
pack("cifar10", file, max_train_samples=300, max_eval_samples=100)
plain = load_data("cifar10", max_train_samples=300, max_eval_samples=100)
packed = load_data(str(file))
pixels = [[np.asarray(getattr(data, role).table.image(int(row))) for role in ("train", "val", "test")
           for row in getattr(data, role).rows] for data in (plain, packed)]
labels = [[getattr(data, role).labels.tolist() for role in ("train", "val", "test")] for data in (plain, packed)]
same = labels[0] == labels[1] and all(map(np.array_equal, *pixels)) and len(pixels[0]) == 500
counts = np.bincount(cifar.train.labels).tolist() + np.bincount(cifar.test.labels).tolist()
print(json.dumps({"about": cifar.about, "counts": counts, "same": same, "raw": packed.train.table.in_memory}))
"""


def test_the_real_cifar10_whole_and_packed(online: Terminal, tmp_path: Path) -> None:
    (tmp_path / "cifar.py").write_text(CIFAR, encoding="utf-8")
    done = online.python(tmp_path / "cifar.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["about"]["rows"] == {"train": 50_000, "test": 10_000} and found["about"]["crop_pct"] == 1.0
    assert len(found["about"]["commit"]) == 40 and found["about"]["val_images"] == 5_000
    assert found["counts"] == [4_500] * 10 + [1_000] * 10
    assert found["same"] and found["raw"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "nobody/nothing"], "Dataset 'nobody/nothing' does not exist on the Hub"),
        (["--dataset", "uoft-cs/cifar10", "--label-key", "x"], "no label column 'x'. Columns: img, label"),
        (["--dataset", "digits", "--model", "test_vit"], "The weights of test_vit could not be loaded"),
    ],
)
def test_what_the_hub_lacks_is_said(online: Terminal, tmp_path: Path, args: list[str], message: str) -> None:
    done = online.train(*TINY, *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--dataset", "cifar10"], ["--dataset", "digits"]])
def test_offline_says_what_to_do(offline: Terminal, home: Path, tmp_path: Path, args: list[str]) -> None:
    with emptied(home):
        done = offline.train(*TINY, *args, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "HF_ENDPOINT" in done.stderr and "HF_HUB_OFFLINE=1" in done.stderr and "In the cache: no " in done.stderr
    wanted = "--dataset digits (needs no network) or a local folder" if "cifar10" in args else "--no-pretrained"
    assert wanted in done.stderr


SAVE_AND_REBUILD = """
import sys, timm, torch, nolora_vision
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(2, 3, 224, 224)
if sys.argv[1] == "save":
    model = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=10).eval()
    nolora_vision.inject(model)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02)
    nolora_vision.save_adapter(model, "adapter", class_names=[f"class {i}" for i in range(10)])
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=0).eval()(x), "bare.pt")
else:
    model = nolora_vision.from_pretrained("adapter")
    assert nolora_vision.class_names(model)[9] == "class 9"
    assert nolora_vision.preprocessing_of(model)["mean"] == (0.5, 0.5, 0.5)
with torch.no_grad():
    torch.save((model(x), model.forward_head(model.forward_features(x), pre_logits=True)), sys.argv[1] + ".pt")
"""


def test_from_pretrained_gives_the_same_logits_in_another_process(
    hub_env, home: Path, online: Terminal, offline: Terminal, tmp_path: Path
) -> None:
    import torch

    script = tmp_path / "save_and_rebuild.py"
    script.write_text(SAVE_AND_REBUILD, encoding="utf-8")
    with emptied(home):
        done = online.python(script, "save", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    env = {**os.environ, **hub_env, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "rebuild")}  # downloads anew
    command = [sys.executable, str(script), "rebuild"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (before, features), (after, _) = (torch.load(tmp_path / f"{step}.pt") for step in ("save", "rebuild"))
    assert torch.equal(before, after) and before.shape == (2, 10) and before.std() > 0
    assert not torch.equal(features, torch.load(tmp_path / "bare.pt"))  # the adapters do something

    with emptied(home):
        done = offline.python(script, "rebuild", cwd=tmp_path)
    said = "adapter is sound, but the weights of its backbone vit_tiny_patch16_224.augreg_in21k_ft_in1k could not be"
    assert done.returncode != 0 and said in done.stderr and "HF_ENDPOINT" in done.stderr
