"""The real commands on real weights and real images, from the Hub whose address is in NOLORA_TEST_HUB."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.hub

TINY = ["--model", "vit_tiny_patch16_224", "--max-train-samples", "16", "--max-eval-samples", "16", "--epochs", "1"]
TINY += ["-b", "8", "--workers", "0", "--output", "out", "--experiment", "run", "--amp-dtype", "bfloat16"]


def test_a_run_on_the_hubs_weights_and_images(train_py, hub_env, tmp_path: Path) -> None:
    done = train_py(*TINY, "--dataset", "cifar10", env=hub_env)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["model"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert record["dataset"]["id"] == "uoft-cs/cifar10" and record["dataset"]["num_classes"] == 10
    assert record["parameters"]["adapter"] == 12 * (3 * 8 * (8 + 3) + 8 * (4 * 192 + 2 * 5 * 192))
    config = json.loads((tmp_path / "out" / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["metadata"]["class_names"][0] == "airplane" and config["preprocessing"]["crop_pct"] == 1.0

    offline = {**hub_env, "HF_HUB_OFFLINE": "1"}  # the cache is warm now
    scored = f"{record['metrics']['test_top1_percent']:.2f} %"
    adapter = str(tmp_path / "out" / "run" / "adapter")
    args = ["--eval-only", "--adapter", adapter, "--dataset", "cifar10", "--max-eval-samples", "16", "-b", "8"]
    again = train_py(*args, "--workers", "0", "--amp-dtype", "bfloat16", env=offline)
    assert again.returncode == 0 and scored in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "nobody/nothing"], "Dataset 'nobody/nothing' does not exist on the Hub"),
        (["--dataset", "uoft-cs/cifar10", "--label-key", "x"], "no label column 'x'. Columns: img, label"),
        (["--dataset", "digits", "--model", "test_vit"], "The weights of test_vit could not be loaded"),
    ],
)
def test_what_the_hub_lacks_is_said(train_py, hub_env, tmp_path: Path, args: list[str], message: str) -> None:
    done = train_py(*TINY, *args, env=hub_env)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--dataset", "cifar10"], ["--dataset", "digits"]])
def test_offline_says_what_to_do(train_py, tmp_path: Path, args: list[str]) -> None:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = train_py(*TINY, *args, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "HF_ENDPOINT" in done.stderr and "HF_HUB_OFFLINE=1" in done.stderr and "In the cache: no " in done.stderr
    wanted = "--dataset digits (needs no network) or a local folder" if "cifar10" in args else "--no-pretrained"
    assert wanted in done.stderr
