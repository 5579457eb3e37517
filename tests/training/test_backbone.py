"""How a model of a run computes: the type of its frozen weights, its attention, and what the saved adapter says."""

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import nolora_vision
from nolora_vision.surgery.frozen_dtype import held_in
from nolora_vision.training.backbone import build_model, set_compute
from nolora_vision.training.errors import RunError
from nolora_vision.training.run import main
from tests.families import FAMILIES, Family

AUTO = {"frozen_dtype": "auto", "fused_attn": "auto"}


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


@pytest.mark.parametrize(
    ("device", "amp_dtype", "options", "held", "fused"),
    [
        ("cpu", "none", {}, None, True),
        ("cpu", "bfloat16", {}, torch.bfloat16, False),
        ("cuda", "bfloat16", {}, torch.bfloat16, True),
        ("cuda", "float16", {}, torch.float16, True),
        ("cpu", "bfloat16", {"frozen_dtype": "float32", "fused_attn": "timm"}, None, True),
        ("cuda", "none", {"fused_attn": "never"}, None, False),
    ],
)
def test_what_auto_means(device: str, amp_dtype: str, options: dict, held: torch.dtype | None, fused: bool) -> None:
    model = nolora_vision.inject(FAMILIES["vit"].build(), rank=2)
    set_compute(model, device, amp_dtype=amp_dtype, **{**AUTO, **options})
    assert held_in(model) == held and attentions(model)
    assert all(attention.fused_attn is fused for attention in attentions(model))


def test_other_attention_computes_the_same(family: Family) -> None:
    """In fp32, where rounding does not hide a difference; and in bf16 a step runs."""
    model = nolora_vision.inject(family.build(), rank=2).eval()
    other, x = copy.deepcopy(model), family.images(2)
    set_compute(other, "cpu", amp_dtype="none", **{**AUTO, "fused_attn": "never"})
    assert not any(attention.fused_attn for attention in attentions(other))
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)  # another order of the same fp32 sums
    set_compute(other, "cpu", amp_dtype="bfloat16", **AUTO)
    with torch.autocast("cpu", torch.bfloat16):
        other.train()(x).float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in other.parameters())


def test_a_run_with_held_weights_scores_as_one_without_and_saves_a_plain_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same seed, same numbers to the last digit; the adapter loads onto the plain model that the run started from."""
    small = ["--model", "test_vit", "--dataset", "digits:5-9", "--img-size", "16", "--model-kwargs", "patch_size", "4"]
    small += ["--workers", "0", "--max-train-samples", "64", "--max-eval-samples", "32", "--epochs", "2", "-b", "16"]
    start = [*small, "--no-pretrained", "--method", "full", "--epochs", "1", "--output", str(tmp_path / "start")]
    assert main([*start, "--dataset", "digits:0-4", "--experiment", "run"]) == 0
    weights = tmp_path / "start" / "run" / "adapter" / "adapter_model.safetensors"
    records, configs, tested = [], [], []
    for dtype in ("auto", "float32"):
        args = [*small, "--pretrained-path", str(weights), "--amp-dtype", "bfloat16", "--frozen-dtype", dtype]
        assert main([*args, "--model-ema", "--output", str(tmp_path), "--experiment", dtype]) == 0
        folder = tmp_path / dtype
        records.append(json.loads((folder / "record.json").read_text())["metrics"])
        configs.append(nolora_vision.read_adapter_config(folder / "adapter"))
        capsys.readouterr()
        test = ["--eval-only", "--adapter", str(folder / "adapter"), "--dataset", "digits:5-9", "-j", "0"]
        assert main([*test, "--max-eval-samples", "32", "--amp-dtype", "bfloat16", "--frozen-dtype", dtype]) == 0
        tested.append([line for line in capsys.readouterr().out.splitlines() if "top-" in line])
    for name in ("test_top1_percent", "test_loss", "val_top1_percent", "best_epoch"):
        assert records[0][name] == records[1][name]
    assert tested[0] == tested[1] and f"{records[0]['test_top1_percent']:.2f} %" in "".join(tested[0])
    assert configs[0]["backbone"] == configs[1]["backbone"] != {}
    assert configs[0]["metadata"]["frozen_dtype"] == "bfloat16" and "frozen_dtype" not in configs[1]["metadata"]
    model = nolora_vision.from_pretrained(tmp_path / "auto" / "adapter")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_own_weights_are_no_npz_though_timms_were(tmp_path: Path) -> None:
    """timm before 1.0.30 gave them to the loader of the model's original format otherwise."""
    name, small = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"depth": 1, "embed_dim": 24, "num_heads": 2}
    assert timm.models.get_pretrained_cfg(name).custom_load
    weights = {k: v + 1 for k, v in timm.create_model(name, pretrained=False, **small).state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    model = build_model(name, 7, pretrained_path=tmp_path / "weights.safetensors", model_kwargs=small)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert all(torch.equal(v, weights[k]) for k, v in own.items()) and not model.pretrained_cfg["custom_load"]


def test_weights_that_are_not_there_are_told_of_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=5).state_dict()
    of = {"pretrained_path": tmp_path / "w.safetensors", "img_size": 16}
    part = {name: value for name, value in whole.items() if not name.startswith("blocks.1.")}
    save_file(part, of["pretrained_path"])
    build_model("test_vit", 3, **of, model_kwargs={"patch_size": 4})
    assert "The others stay random: matrices blocks.1.attn.qkv.weight, " in capsys.readouterr().err
    for name, kwargs, message in (
        ("other names", {"patch_size": 4}, "are of another model: none of its"),
        (
            "other sizes",
            {"patch_size": 4, "mlp_ratio": 2},
            "do not fit test_vit with {'patch_size': 4, 'mlp_ratio': 2, 'img_size': 16}: ",
        ),
        ("no file", {"patch_size": 4}, "could not be read as weights"),
    ):
        save_file({f"encoder.{k}" if name == "other names" else k: v for k, v in whole.items()}, of["pretrained_path"])
        if name == "no file":
            of["pretrained_path"].write_bytes(b"no weights at all")
        with pytest.raises(RunError, match=f"^--pretrained-path .*{re.escape(message)}"):
            build_model("test_vit", 3, **of, model_kwargs=kwargs)
    save_file(whole, of["pretrained_path"])
    build_model("test_vit", 3, **of, model_kwargs={"patch_size": 4})
    assert not capsys.readouterr().err
