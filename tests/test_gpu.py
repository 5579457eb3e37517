"""What only a GPU shows: training, resuming and precision there, and that results go between devices.

Skipped without one. On a machine with a GPU: `python -m pytest tests/test_gpu.py tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import nolora_vision
from nolora_vision import AdapterConfig, use_backend
from nolora_vision.config import NONLINEARITIES
from nolora_vision.methods import METHODS, apply_method
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.training.consistency import Batch, Plain
from nolora_vision.training.engine import evaluate, make_accelerator
from nolora_vision.training.health import first_not_finite
from nolora_vision.training.progress import Silence
from nolora_vision.training.run import main, run
from tests.families import Family
from tests.training.test_resume import SMALL, VARIANTS, stopped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[1]
DIGITS = ["--model", "test_vit", "--dataset", "digits", "--no-pretrained", "--img-size", "16", "--model-kwargs"]
DIGITS += ["patch_size", "4", "-j", "0", "--epochs", "2", "-b", "32", "--lr", "5e-3", "--method", "nolora"]


def trained(folder: Path, *args: str) -> dict[str, Any]:
    """The record of a run on the GPU."""
    assert main([*DIGITS, "--output", str(folder), "--experiment", "run", *args]) == 0
    return json.loads((folder / "run" / "record.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> Mapping[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=7)


def trained_a_bit(model: nn.Module) -> nn.Module:
    """Adapters that do something: a fresh B is zero."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("precision", ["none", "bfloat16", "float16"])
def test_a_run_learns_and_says_where_it_ran(precision: str, tmp_path: Path) -> None:
    record = trained(tmp_path, "--amp-dtype", precision, "--epochs", "8")
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    assert record["metrics"]["peak_memory_of"] == "CUDA, allocated" and record["metrics"]["peak_memory_bytes"] > 2**20
    assert record["metrics"]["test_top1_percent"] > 20  # 10 is chance


def test_the_adapter_scores_alike_on_the_processor(tmp_path: Path) -> None:
    """All weights train and are saved, so that nothing random is lost; the images that differ are near ties."""
    record = trained(tmp_path, "--method", "full", "--lr", "1e-3", "--epochs", "4")
    tested = [sys.executable, "train.py", "--eval-only", "--adapter", str(tmp_path / "run" / "adapter"), "-j", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*tested, "--dataset", "digits"], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    found = float(done.stdout.split("test top-1")[1].split("%")[0].strip(" │\n"))
    assert abs(found - record["metrics"]["test_top1_percent"]) < 1


def test_deterministic_runs_repeat(tmp_path: Path) -> None:
    options = ["--deterministic", "--amp-dtype", "bfloat16"]
    for name in ("one", "two"):
        trained(tmp_path / name, *options)
    one, two = weights(tmp_path / "one" / "run"), weights(tmp_path / "two" / "run")
    assert {name for name, value in one.items() if not torch.equal(two[name], value)} == set()


@pytest.mark.parametrize("precision", ["none", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, deterministic=True, amp_dtype=precision, **VARIANTS[name])
    whole = run(replace(config, experiment="whole"), progress=Silence(), checkpoints=True)
    part = replace(config, experiment="part", resume="auto")
    stopped(part, 3)
    record = run(part, progress=Silence(), checkpoints=True)
    one, two = weights(Path(whole["folder"])), weights(Path(record["folder"]))
    assert {name for name, value in one.items() if not torch.equal(two[name], value)} == set()
    assert record["metrics"]["test_top1_percent"] == whole["metrics"]["test_top1_percent"]


@pytest.mark.parametrize("method", ["nolora", "lora", "dora"])
def test_a_compiled_run_learns(method: str, tmp_path: Path) -> None:
    record = trained(tmp_path, "--torchcompile", "--amp-dtype", "bfloat16", "--method", method, "--epochs", "6")
    assert record["metrics"]["test_top1_percent"] > 20


@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_one_process_of_many(launch: str, tmp_path: Path) -> None:
    """NCCL and the wrappers of accelerate, with the one GPU that there is sure to be."""
    fsdp = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "fsdp.yaml")]
    fsdp += ["--num_processes", "1"]
    ddp = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [sys.executable, "-m", *(fsdp if launch == "fsdp" else ddp), str(ROOT / "train.py"), *DIGITS]
    command += ["--output", str(tmp_path), "--experiment", "run", "--amp-dtype", "bfloat16", "--epochs", "6"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["metrics"]["test_top1_percent"] > 20


def test_the_layer_of_a_number_that_went_wrong_is_named() -> None:
    model = nolora_vision.inject(small_vit()).cuda().train()
    assert "blocks.1" in dict(model.named_modules())
    model.get_submodule("blocks.1.mlp").register_forward_hook(lambda m, given, output: output * torch.inf)
    batch = Batch(torch.randn(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda"), None, 0)
    assert first_not_finite(model, Plain(), batch) == "blocks.1.mlp makes of finite numbers some that are not"


# ------------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("precision", ["none", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, precision: str) -> None:
    options = {"fourierft": {"n_frequency": 50}, "c3a": {"block_size": 16}, "oft": {"block_size": 16}}.get(method)
    model = apply_method(small_vit(), method, AdapterConfig(rank=4), options=options)
    accelerator = make_accelerator(precision)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    x, labels = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda") % 7
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(prepared(x).float(), labels)
        accelerator.backward(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------ kernels


def gradients(model: nn.Module, x: Tensor, backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Logits, and the gradients of all that trains."""
    model.zero_grad()
    with use_backend(backend), torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(x).float()
    F.cross_entropy(logits, torch.arange(len(x), device="cuda") % 7).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("modulation", ["none", "vector", "gate"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_backends_agree_in_fp32_and_are_as_near_as_the_definition_in_bf16(nonlinearity: str, modulation: str) -> None:
    """Against fp64 on the processor; in bf16 the definition itself is off, and no backend may be twice as far."""
    config = AdapterConfig(rank=8, nonlinearity=nonlinearity, modulation=modulation)
    exact = trained_a_bit(nolora_vision.inject(small_vit(), config))
    model, x = copy.deepcopy(exact).cuda(), torch.randn(7, 3, 32, 32)
    exact.double()
    F.cross_entropy(exact(x.double()), torch.arange(7)).backward()
    wanted = {name: p.grad.cuda() for name, p in exact.named_parameters() if p.grad is not None}
    errors: dict[str, dict[str, float]] = {}
    for backend in ("eager", "autograd", "custom_op", "triton", "triton_rank"):
        for dtype in (None, torch.bfloat16):
            found = gradients(model, x.cuda(), backend, dtype)
            assert found.keys() - {"logits"} == wanted.keys()
            off = sum((found[k].double() - v).square().sum().item() for k, v in wanted.items())
            size = sum(v.square().sum().item() for v in wanted.values())
            errors.setdefault(str(dtype), {})[backend] = (off / size) ** 0.5
    for dtype, limit in (("None", 1e-5), ("torch.bfloat16", 0.0)):
        of_eager = errors[dtype]["eager"]
        assert max(errors[dtype].values()) <= max(2 * of_eager, limit), errors


def test_what_the_node_keeps_is_less_than_the_definition() -> None:
    peaks = {}
    for backend in ("eager", "autograd"):
        model = trained_a_bit(nolora_vision.inject(timm.create_model("vit_tiny_patch16_224", num_classes=7))).cuda()
        x = torch.randn(16, 3, 224, 224, device="cuda")
        gradients(model, x, backend, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        gradients(model, x, backend, torch.bfloat16)
        peaks[backend] = torch.cuda.max_memory_allocated()
        del model, x
    assert peaks["autograd"] < 0.9 * peaks["eager"], peaks


# ------------------------------------------------------------------------------------------------------------ surgery


def test_fresh_and_folded_adapters_change_no_more_than_rounding(family: Family) -> None:
    torch.manual_seed(0)
    bare, x = family.build().eval().cuda(), family.images(2).cuda()
    before = bare(x)
    model = nolora_vision.inject(bare)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5 * before.abs().max().item())
    trained_a_bit(model)
    unfolded = model(x)
    assert not torch.allclose(unfolded, before, rtol=1e-3, atol=1e-3)
    nolora_vision.fold(model)
    torch.testing.assert_close(model(x), unfolded, rtol=1e-4, atol=1e-4 * unfolded.abs().max().item())


def test_adapters_go_between_devices(tmp_path: Path) -> None:
    model = trained_a_bit(nolora_vision.inject(small_vit(), AdapterConfig(modulation="gate"))).cuda().eval()
    nolora_vision.save_adapter(model, tmp_path / "adapter")
    here = nolora_vision.load_adapter(small_vit(), tmp_path / "adapter").eval()
    there = nolora_vision.load_adapter(small_vit().cuda(), tmp_path / "adapter").eval()
    assert {p.device.type for layer in adapted_layers(there).values() for p in layer.parameters()} == {"cuda"}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(there(x.cuda()), model(x.cuda()))
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-4, atol=1e-4)


def test_evaluation_counts_each_image_once() -> None:
    accelerator = make_accelerator("bfloat16")
    data = torch.utils.data.TensorDataset(torch.randn(61, 3, 32, 32), torch.arange(61) % 7)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=16, pin_memory=True))
    scores = evaluate(accelerator.prepare(small_vit()), loader, accelerator=accelerator)
    assert torch.equal(scores.labels, torch.arange(61) % 7) and scores.predictions.shape == (61,)
