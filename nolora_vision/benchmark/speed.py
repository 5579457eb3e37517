"""What an adapter costs against the frozen layer and against PEFT: time, memory, operations; as a record."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nolora_vision import AdapterConfig, fold, use_backend
from nolora_vision.benchmark.memory import model_tensors, peak_bytes, saved_bytes
from nolora_vision.benchmark.speed_rows import OURS, PEERS, build_row, let_gradients_flow
from nolora_vision.surgery.inject import is_injected
from nolora_vision.training import figures
from nolora_vision.training.backbone import set_compute
from nolora_vision.training.progress import RunsProgress, print_columns
from nolora_vision.training.record import environment, write_record

REFERENCE, PEER = "frozen", "peft lora"
LAYERS: Mapping[str, tuple[int, int]] = {"qkv": (768, 2304), "fc1": (768, 3072), "fc2": (3072, 768)}
"""The layers of ViT-B/16, (in_features, out_features)."""
TOKENS = 197
Part = Literal["layer", "step", "inference"]
Mode = Literal["eager", "autograd", "custom_op", "triton", "triton_rank", "tuned", "compiled", "compiled_op"]
"""How adapters are computed: a backend; or the usual one with what train.py sets under bfloat16 (the frozen weights
held in it, the attention that is faster there); or that compiled, of the definition or with the operator."""
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Job:
    """One row of a table: a method on one backend, and what to run of it."""

    name: str
    run: Callable[[], object]
    forward: Callable[[], Tensor]
    """The part of it that keeps tensors for the backward pass."""
    model: nn.Module


def main(
    *,
    parts: tuple[Part, ...] = ("layer", "step", "inference"),
    models: tuple[str, ...] = ("vit_tiny_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"),
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    modes: tuple[Mode, ...] = ("eager", "autograd", "tuned"),
    methods: tuple[str, ...] = tuple(OURS),
    rank: int = 8,
    batch_size: int = 8,
    rounds: int = 11,
    output: Path = Path("output/speed"),
) -> None:
    """Time adapters against the frozen model and PEFT's, all of one table in turn, and count what they keep.

    Args:
        parts: One layer of ViT-B, a whole training step, inference.
        models: timm models for step and inference; their weights are random.
        dtypes: bfloat16 is autocast.
        modes: Backends of our adapters; `tuned` is train.py's setting under bfloat16, here also of frozen and LoRA;
            `compiled` takes a minute for each row.
        methods: Which of ours.
        rank: Of every adapter, on qkv, fc1 and fc2.
        batch_size: Images.
        rounds: Of each job; the first two warm up.
        output: Folder for speed.json and the picture.
    """
    config = AdapterConfig(rank=rank)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [("layer", name) for name in LAYERS] if "layer" in parts else []
    subjects += [(part, name) for part in parts if part != "layer" for name in models]
    facts = {"rank": rank, "batch_size": batch_size, "rounds": rounds, "device": str(device)}
    output.mkdir(parents=True, exist_ok=True)
    tables = []
    with RunsProgress(len(subjects) * len(dtypes)) as progress:
        for part, name in subjects:
            for dtype in dtypes:
                progress.begin(f"{part}, {name}, {dtype}")
                jobs = make_jobs(part, name, config, batch_size, device, dtype, modes=modes, methods=methods)
                rows = measure(jobs, rounds, device)
                tables.append({"part": part, "subject": name, "dtype": dtype, "rows": rows})
                write_record(output / "speed.json", {**facts, "tables": tables, "environment": environment()})
    for table in tables:
        show(table)
    figures.speed_ratios(output / "speed.png", tables, title=f"rank {rank}, batch {batch_size}, {device}")
    print(f"{output}: " + ", ".join(sorted(path.name for path in output.iterdir())))


# ------------------------------------------------------------------------------------------------------------ the jobs


def make_jobs(
    part: str,
    subject: str,
    config: AdapterConfig,
    batch_size: int,
    device: torch.device,
    dtype: str,
    *,
    modes: Sequence[str] = ("eager", "autograd"),
    methods: Sequence[str] = tuple(OURS),
) -> list[Job]:
    """Every method on a subject; ours once for each mode."""
    rows = [(method, "eager") for method in ("frozen", *(("head", "full") if part == "step" else ()), *PEERS)]
    apart = ("tuned", "compiled", "compiled_op") if part == "layer" else () if dtype == "bfloat16" else ("tuned",)
    modes = [mode for mode in modes if mode not in apart]
    rows += [(method, mode) for mode in modes if mode in ("tuned", "compiled") for method in (REFERENCE, PEER)]
    rows += [(method, mode) for method in methods for mode in modes]
    make = {"layer": _layer_job, "step": _step_job, "inference": _inference_job}[part]
    return [make(subject, method, mode, config, batch_size, device, dtype) for method, mode in rows]


def _named(method: str, mode: str) -> str:
    return f"{method}, {mode}" if method in OURS or mode in ("tuned", "compiled") else method


def _backend(mode: str) -> str:
    return {"tuned": "auto", "compiled": "auto", "compiled_op": "custom_op"}.get(mode, mode)


def _amp(device: torch.device, dtype: str) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def _layer_job(
    subject: str, method: str, mode: str, config: AdapterConfig, batch: int, device: torch.device, dtype: str
) -> Job:
    """Forward and backward of one layer, its input requiring a gradient."""
    d, e = LAYERS[subject]
    name = f"layer_{subject}"  # one that is no role
    model: nn.Module = nn.Sequential(OrderedDict([(name, nn.Linear(d, e))]))
    example = torch.zeros(1, d)
    only = AdapterConfig(rank=config.rank, targets=(name,))
    model = build_row(model, method, only, example_input=example).to(device)
    x = torch.randn(batch, TOKENS, d, device=device, requires_grad=True)
    dy = torch.randn(batch, TOKENS, e, device=device, dtype=getattr(torch, dtype))

    def forward() -> Tensor:
        with use_backend(_backend(mode)), _amp(device, dtype):
            return model(x)

    def run() -> None:
        x.grad = None
        forward().backward(dy)

    return Job(_named(method, mode), run, forward, model)


def _model(
    subject: str, method: str, mode: str, config: AdapterConfig, device: torch.device, dtype: str
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model, and what to call."""
    model = build_row(timm.create_model(subject, num_classes=100), method, config)
    if method == "frozen" and mode != "compiled":  # the compiler does not take the hook that this sets
        let_gradients_flow(model)
    if mode in ("tuned", "compiled", "compiled_op"):
        amp_dtype = "none" if dtype == "float32" else dtype
        set_compute(model, device.type, amp_dtype=amp_dtype, frozen_dtype="auto", fused_attn="auto")
    model.to(device)
    return model, torch.compile(model) if mode.startswith("compiled") else model


def _images(model: nn.Module, batch: int, device: torch.device) -> Tensor:
    size: Any = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return torch.randn(batch, *size, device=device)


def _step_job(
    subject: str, method: str, mode: str, config: AdapterConfig, batch: int, device: torch.device, dtype: str
) -> Job:
    """Forward, loss, backward and AdamW of a whole model."""
    model, call = _model(subject, method, mode, config, device, dtype)
    images, labels = _images(model.train(), batch, device), torch.arange(batch, device=device) % 100
    images.requires_grad_(method == "frozen" and mode == "compiled")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def forward() -> Tensor:
        with use_backend(_backend(mode)), _amp(device, dtype):
            logits = call(images)
        return F.cross_entropy(logits.float(), labels)

    def run() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Job(_named(method, mode), run, forward, model)


def _inference_job(
    subject: str, method: str, mode: str, config: AdapterConfig, batch: int, device: torch.device, dtype: str
) -> Job:
    """A forward pass, the adapters folded; PEFT's LoRA as it is (it could be merged, ours if linear too)."""
    model, call = _model(subject, method, mode, config, device, dtype)
    model.eval()
    if is_injected(model):
        fold(model)
    images = _images(model, batch, device)

    def forward() -> Tensor:
        with torch.inference_mode(), use_backend(_backend(mode)), _amp(device, dtype):
            return call(images)

    return Job(_named(method, mode), forward, forward, model)


# ------------------------------------------------------------------------------------------------------- the measuring


def measure(jobs: Sequence[Job], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Every job in turn, round after round; ratios are those within a round, so that drift cancels."""
    times: dict[str, list[float]] = {job.name: [] for job in jobs}
    for turn in range(rounds):
        for job in jobs:
            _synchronise(device)
            started = time.perf_counter()
            job.run()
            _synchronise(device)
            if turn >= 2:
                times[job.name].append(1000 * (time.perf_counter() - started))
    rows = []
    for job in jobs:
        own = times[job.name]
        row = {"name": job.name, "step_time_ms": quartiles(own)}
        for key, other in (("ratio_to_frozen", REFERENCE), ("ratio_to_peft_lora", PEER)):
            row[key] = quartiles([a / b for a, b in zip(own, times[other], strict=True)])
        rows.append({**row, **count(job), "peak_memory_bytes": peak_bytes(job.run, device)})
    return rows


def count(job: Job) -> dict[str, int]:
    """Bytes that the forward pass keeps for the backward pass, parameters apart, and operations of one run."""
    kept = saved_bytes(job.forward(), besides=model_tensors(job.model))
    with _Operations() as operations:
        job.run()
    return {"saved_bytes": kept, "operations": operations.count}


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the device; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view and "detach" not in function.name()
        return function(*args, **(kwargs or {}))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": median, "high": high}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def show(table: Mapping[str, Any]) -> None:
    """One table on the terminal."""

    def spread(q: Mapping[str, float], digits: int) -> str:
        return f"{q['median']:.{digits}f} ({q['low']:.{digits}f}–{q['high']:.{digits}f})"

    rows = [
        (
            row["name"],
            f"{row['step_time_ms']['median']:.1f}",
            spread(row["ratio_to_frozen"], 2),
            spread(row["ratio_to_peft_lora"], 2),
            f"{row['saved_bytes'] / 2**20:.0f}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['operations']:,}",
        )
        for row in table["rows"]
    ]
    header = ("method", "ms", "× frozen", "× PEFT LoRA", "saved", "peak", "ops")
    print_columns(f"{table['part']} · {table['subject']} · {table['dtype']} (memory in MiB)", header, rows)


if __name__ == "__main__":
    tyro.cli(main)
