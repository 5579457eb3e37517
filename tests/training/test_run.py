"""The command from argv to files, on digits and a very small ViT."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nolora_vision
from nolora_vision.commands.main import main as nolora_vision_command
from nolora_vision.training import retest
from nolora_vision.training import run as run_module
from nolora_vision.training.config_file import load_run_config
from nolora_vision.training.ingredients import preprocessing
from nolora_vision.training.run import main
from nolora_vision.training.run_config import RunConfig

SMALL = ["--model", "test_vit", "--dataset", "digits:5-9", "--img-size", "16", "--model-kwargs", "patch_size", "4"]
SMALL += ["--workers", "0", "--max-train-samples", "64", "--max-eval-samples", "32", "--epochs", "2", "-b", "16"]
SCRATCH = [*SMALL, "--no-pretrained"]


def train(folder: Path, *args: str, base: list[str] = SCRATCH) -> dict:
    """Run the command in a new folder and return its record."""
    assert main([*base, "--output", str(folder), "--experiment", "run", *args]) == 0
    return json.loads((folder / "run" / "record.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    train(folder, "--method", "full", "--dataset", "digits:0-4")
    return folder / "run" / "adapter" / "adapter_model.safetensors"


def test_a_run_leaves_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = train(tmp_path)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"args.yaml", "record.json", "summary.csv", "splits.json", "adapter"}
    assert names >= {"learning_curve.png", "confusion_matrix.png"}
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = max(float(row["val_top1_percent"]) for row in rows)
    metrics = record["metrics"]
    assert metrics["val_top1_percent"] == best and metrics["peak_memory_bytes"] > 2**20
    assert metrics["train_images_per_s"] == pytest.approx(128 / metrics["train_seconds"])
    assert record["model"] == "test_vit.untrained" and record["dataset"]["train_images"] == 64
    assert record["environment"]["versions"]["timm"] and record["environment"]["device"]
    assert load_run_config(folder / "args.yaml").lr == record["config"]["lr"] == 2e-3
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and f"{metrics['test_top1_percent']:.2f} %" in out and "in no file" in out


def test_an_adapter_scores_the_same_when_it_is_loaded(tmp_path: Path, backbone: Path, capsys) -> None:
    record = train(tmp_path, "--pretrained-path", str(backbone), base=SMALL)
    assert record["model"] == "test_vit.adapter_model"
    tested = ["--eval-only", "--adapter", str(tmp_path / "run" / "adapter"), "--dataset", "digits:5-9", "-j", "0"]
    capsys.readouterr()
    assert main([*tested, "--max-eval-samples", "32"]) == 0
    assert f"{record['metrics']['test_top1_percent']:.2f} %" in capsys.readouterr().out
    assert main([*tested[:-4], "--dataset", "digits", "-j", "0"]) == 2
    assert "The adapter knows 5 classes, digits has 10" in capsys.readouterr().err


def test_an_adapter_of_a_run_is_rebuilt_with_its_weight_file(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from another folder, and `predict` with it; without its random weights an adapter is worth nothing."""
    from PIL import Image

    from nolora_vision.training.backbone import build_model

    monkeypatch.chdir(backbone.parent)
    crop = ["--crop-pct", "0.75", "--crop-mode", "squash"]
    train(tmp_path, "--pretrained-path", backbone.name, *crop, base=SMALL)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run" / "adapter"
    model = nolora_vision.from_pretrained(directory)
    other = build_model("test_vit", 5, pretrained_path=backbone, img_size=16, model_kwargs={"patch_size": 4})
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), nolora_vision.load_adapter(other, directory).eval()(x))
    assert nolora_vision.class_names(model) == tuple("56789")
    images = nolora_vision.preprocessing_of(model)
    assert (images["crop_pct"], images["crop_mode"]) == (0.75, "squash")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert nolora_vision_command(["predict", str(directory), str(tmp_path / "red.png")]) == 0
    assert "red.png" in capsys.readouterr().out
    train(tmp_path / "scratch", "--epochs", "1")
    with pytest.raises(nolora_vision.AdapterMismatchError, match="trained on a frozen backbone of random weights"):
        nolora_vision.from_pretrained(tmp_path / "scratch" / "run" / "adapter")


def test_a_saved_adapter_is_tested_with_its_own_crop(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another one is asked for; digits have no crop of their own, timm's is the middle."""
    real, seen = retest.loader, []

    def spy(config: RunConfig, images: dict, split: Any, **options: Any) -> Any:
        seen.append(images)
        return real(config, images, split, **options)

    monkeypatch.setattr(retest, "loader", spy)
    train(tmp_path, "--pretrained-path", str(backbone), "--crop-mode", "border", "--epochs", "1", base=SMALL)
    tested = ["--eval-only", "--adapter", str(tmp_path / "run" / "adapter"), "--dataset", "digits:5-9", "-j", "0"]
    assert main(tested) == 0 and main([*tested, "--crop-mode", "center"]) == 0
    assert [images["crop_mode"] for images in seen] == ["border", "center"]


def test_what_an_adapter_says_of_its_images_holds_for_a_test() -> None:
    own = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}
    model = timm.create_model("test_vit")
    found = preprocessing(RunConfig(img_size=32), model, {**own, "crop_pct": 1.0, "input_size": (3, 8, 8)})
    assert {name: found[name] for name in own} == own
    assert found["crop_pct"] == 1.0 and found["input_size"] == (3, 32, 32)
    assert preprocessing(RunConfig(), model, {})["mean"] == (0.5, 0.5, 0.5)


def test_pretrained_path_loads_all_but_the_classifier(backbone: Path) -> None:
    from safetensors.torch import load_file

    from nolora_vision.training.backbone import build_model

    model = build_model("test_vit", 3, pretrained_path=backbone, img_size=16, model_kwargs={"patch_size": 4})
    saved, own = load_file(backbone), model.state_dict()
    same = [name for name, value in saved.items() if name in own and torch.equal(own[name], value)]
    assert len(same) == len(saved) - 2 and own["head.weight"].shape == (3, 64)


def test_methods_train_what_they_name(tmp_path: Path) -> None:
    counts = {}
    for method in ("nolora", "lora", "linear", "full"):
        counts[method] = train(tmp_path / method, "--method", method, "--epochs", "1")["parameters"]
    assert counts["linear"]["trainable_without_head"] == 0 and counts["linear"]["head"] == 5 * 65
    assert counts["full"]["trainable_without_head"] + 325 == counts["full"]["total"]
    gates = 18 * (8 * 8 + 8 + 8 + 8)  # G, c, v and β of 18 layers at rank 8
    assert counts["nolora"]["adapter"] - counts["lora"]["adapter"] == gates


def test_the_same_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    def losses(name: str, seed: str) -> list[str]:
        train(tmp_path / name, "--seed", seed)
        lines = (tmp_path / name / "run" / "summary.csv").read_text().splitlines()
        return [row["train_loss"] for row in csv.DictReader(lines)]

    first = losses("a", "3")
    assert losses("b", "3") == first and losses("c", "4") != first


def test_the_same_images_again_by_the_split_file(tmp_path: Path) -> None:
    """Also from another seed, and from the packed form of the dataset."""
    from nolora_vision.training.pack import pack

    packed = pack("digits:5-9", tmp_path / "digits.safetensors")
    whole = ["--max-train-samples", "None", "--max-eval-samples", "None", "--epochs", "1"]
    first = train(tmp_path / "a", *whole, "--shots", "4", "--val-split", "0.3", "--seed", "3")
    assert first["dataset"]["train_images"] == 20 and first["config"]["shots"] == 4
    saved = tmp_path / "a" / "run" / "splits.json"
    again = train(tmp_path / "b", *whole, "--splits", str(saved), "--seed", "3")
    third = train(tmp_path / "c", *whole, "--splits", str(saved), "--seed", "3", "--dataset", str(packed))
    other = train(tmp_path / "d", *whole, "--splits", str(saved), "--seed", "4")
    for record, name in ((again, "b"), (third, "c"), (other, "d")):
        assert (tmp_path / name / "run" / "splits.json").read_bytes() == saved.read_bytes()
        assert (record["metrics"]["test_loss"] == first["metrics"]["test_loss"]) is (name != "d")
    assert third["dataset"]["id"] == "digits:5-9" and third["config"]["dataset"] == str(packed)


def test_a_final_run_has_no_validation_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = train(tmp_path, "--train-on", "train_val", "--keep-epoch", "last")
    assert record["dataset"]["train_images"] == 96 and record["dataset"]["val_held_out"] is False
    assert "val_top1_percent" not in record["metrics"] and record["metrics"]["best_epoch"] == 2
    assert "none: these images were trained on" in capsys.readouterr().out


def test_every_switch_together(tmp_path: Path) -> None:
    args = "--mixup 0.2 --cutmix 0.5 --smoothing 0.1 --model-ema --model-ema-decay 0.5 --grad-accum-steps 2"
    args += " --drop-path 0.1 --grad-checkpointing --amp-dtype bfloat16 --report-to tensorboard --aa rand-m3"
    args += " --reprob 0.2 --clip-grad 0.5 --opt sgd --sched step --warmup-epochs 0 --adapter.dropout 0.1"
    record = train(tmp_path, *args.split())
    assert record["config"]["cutmix"] == 0.5
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_compiled_training_saves_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_without_codegen(model: torch.nn.Module) -> torch.nn.Module:
        compiled.append(model)
        return original(model, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_codegen)
    train(tmp_path, "--torchcompile", "--epochs", "1")
    from safetensors.torch import load_file

    names = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert compiled and names and not any("_orig_mod" in name for name in names)


def test_a_second_run_of_the_same_name_gets_its_own_folder(tmp_path: Path) -> None:
    train(tmp_path, "--epochs", "1")
    before = (tmp_path / "run" / "record.json").read_bytes()
    train(tmp_path, "--epochs", "1")
    assert (tmp_path / "run" / "record.json").read_bytes() == before and (tmp_path / "run-1" / "record.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "vit_tiny_patch15_224"], r"has no model 'vit_tiny_patch15_224'\. Nearest: vit_tiny_patch16_224"),
        (["--model", "test_vit.nope", "--pretrained"], r"test_vit has no weights 'nope' in timm\. Tags: r160_in1k"),
        (["--dataset", "cifar11"], "Unknown dataset 'cifar11'"),
        (["--opt", "adamv"], r"opt must be the name of a timm optimizer, got 'adamv'.*Did you mean 'adamw?'"),
        (["--sched", "cosin"], r"sched must be one of cosine, .*, got 'cosin'\. Did you mean 'cosine'"),
        (["--aa", "nope"], r"aa must be one of timm's policies, .*got 'nope' \(Unknown AA policy nope"),
        (["--img-size", "17"], r"does not take images of 17×17 pixels \(Input height \(17\) should be divisible"),
        (["--model-kwargs", "patch_sice", "4"], "test_vit does not take img_size, patch_sice|does not take patch_sice"),
        (["--model", "resnet10t", "--model-kwargs", "--img-size", "None"], "ResNet has no layer to adapt for targets="),
        (["--adapter.rank", "65"], "rank 65 is larger than the layer"),
        (["--pretrained", "--pretrained-path", "no.safetensors"], r"--pretrained-path no\.safetensors is no file"),
        (["--pretrained", "--pretrained-path", "no.safetensors", "--dataset", "cifar11"], "is no file"),
        (["--amp-dtype", "float16"], "needs a GPU"),
        (["--report-to", "wandb"], "--report-to wandb needs a package: pip install wandb"),
    ],
)
def test_mistakes_get_one_message_and_leave_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    if "float16" in args and torch.cuda.is_available():
        pytest.skip("float16 works on this machine's GPU")
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    output = tmp_path / "out"
    assert main([*SCRATCH, "--output", str(output), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and re.search(message, error) and "Traceback" not in error
    assert not output.exists()


def test_traceback_is_there_when_asked_for() -> None:
    with pytest.raises(nolora_vision.InjectionError, match="rank 65"):
        main([*SCRATCH, "--adapter.rank", "65", "--traceback"])


def test_an_adapter_of_lost_random_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--epochs", "1")
    args = ["--eval-only", "--adapter", str(tmp_path / "run" / "adapter"), "--dataset", "digits:5-9"]
    assert main(args) == 2
    assert "frozen backbone of random weights" in capsys.readouterr().err
    assert main(["--eval-only", "--adapter", str(tmp_path / "nothing"), "--dataset", "digits:5-9"]) == 2
    assert "nothing does not exist. Wanted a directory" in capsys.readouterr().err


def test_without_matplotlib_the_run_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_module.outputs.figures, "pyplot", lambda: None)
    train(tmp_path, "--epochs", "1")
    assert "No pictures: pip install 'nolora-vision[plots]'" in capsys.readouterr().out
