"""`make demo`: the main job in minutes, without a network, on handwritten digits."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import tyro

from nolora_vision import AdapterConfig
from nolora_vision.training import figures
from nolora_vision.training.config_file import as_plain, dump_run_config
from nolora_vision.training.data import load_data
from nolora_vision.training.progress import RunsProgress, print_columns
from nolora_vision.training.record import environment, write_record
from nolora_vision.training.run import run
from nolora_vision.training.run_config import RunConfig

WHAT_THIS_IS = """\
Real handwritten digits (scikit-learn's, 8×8 pixels), no network. Pretrained weights cannot be downloaded here, so a
small timm ViT is first trained on the digits 0-4 (kept for the next time), then adapted to 5-9 by four methods.
A demonstration of the whole path, not a benchmark: {test} test images, so one image is {point:.1f} points."""

BASE = RunConfig(
    model="test_vit",
    model_kwargs={"patch_size": 4},
    adapter=AdapterConfig(rank=4),
    img_size=16,
    dataset="digits:5-9",
    epochs=20,
    warmup_epochs=1,
    batch_size=64,
    head_lr=1e-2,
    hflip=0.0,
    scale=(0.7, 1.0),
    workers=0,
)
PRETRAINING = replace(BASE, dataset="digits:0-4", method="full", pretrained=False, epochs=60, lr=1e-3, head_lr=1e-3)
LEARNING_RATES: Mapping[str, float] = {"linear": 3e-1, "lora": 1e-2, "nolora": 1e-2, "full": 1e-3}
"""Peak rates: the best by validation top-1 of seeds 100-102 among CANDIDATE_RATES (`--choose-rates`)."""


CANDIDATE_RATES: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(("lora", "nolora"), (1e-3, 3e-3, 1e-2, 3e-2)),
    "linear": (3e-2, 1e-1, 3e-1, 1.0),  # extended upwards and
    "full": (3e-4, 1e-3, 3e-3, 1e-2),  # downwards, where the best of 1e-3 to 3e-2 was at an edge
}


def main(*, seeds: int = 3, output: Path = Path("output/demo"), choose_rates: bool = False) -> None:
    """Adapt a small ViT from digits 0-4 to digits 5-9 by four methods and compare them.

    Args:
        seeds: Runs of each method.
        output: Parent of the demo's folder.
        choose_rates: Instead compare learning rates for each method, by validation and with seeds of their own.
    """
    if choose_rates:
        compare_rates(output)
    else:
        demo(seeds, output)


def compare_rates(output: Path, seeds: Sequence[int] = (100, 101, 102)) -> None:
    """Validation top-1 of each method at each candidate rate: where LEARNING_RATES comes from."""
    jobs = [(method, lr, seed) for method in LEARNING_RATES for lr in CANDIDATE_RATES[method] for seed in seeds]
    scores: dict[tuple[str, float], list[float]] = {}
    with RunsProgress(len(jobs) + 1) as progress:
        weights = pretrain(output, progress)
        for method, lr, seed in jobs:
            progress.begin(f"{method}, lr {lr:g}, seed {seed}")
            config = replace(adaptation(method, lr, seed, weights), output=output / "rates")
            scores.setdefault((method, lr), []).append(run(config, progress=progress)["metrics"]["val_top1_percent"])
    rows = [(method, f"{lr:g}", f"{statistics.mean(found):.2f}") for (method, lr), found in scores.items()]
    print_columns(f"mean of {len(seeds)} seeds", ("method", "lr", "validation top-1 (%)"), rows)


def demo(seeds: int, output: Path) -> dict[str, Any]:
    """The pretraining, every method with every seed, the table and the picture; returns what results.json holds."""
    folder = output / f"{datetime.now():%Y%m%d-%H%M%S}"
    jobs = [(method, seed) for seed in range(seeds) for method in LEARNING_RATES]
    records: dict[str, list[dict[str, Any]]] = {method: [] for method in LEARNING_RATES}
    with RunsProgress(len(jobs) + 1) as progress:
        test = len(load_data(BASE.dataset).test)
        progress.say(WHAT_THIS_IS.format(test=test, point=100 / test))
        weights = pretrain(output, progress)
        for method, seed in jobs:
            progress.begin(f"{method}, seed {seed}")
            config = adaptation(method, LEARNING_RATES[method], seed, weights)
            record = run(replace(config, output=folder, experiment=f"{method}-seed{seed}"), progress=progress)
            records[method].append(record)
            progress.say(f"{method:7} seed {seed}  test top-1 {record['metrics']['test_top1_percent']:.2f} %")
    results = [summarise(method, runs) for method, runs in records.items()]
    summary = {"base_config": as_plain(asdict(BASE)), "results": results, "environment": environment()}
    write_record(folder / "results.json", summary)
    show(results, folder)
    return {**summary, "folder": str(folder)}


def adaptation(method: str, lr: float, seed: int, weights: Path) -> RunConfig:
    """One run from digits 0-4 to 5-9; the linear probe has only a head, so its head takes the rate."""
    rate = {"head_lr" if method == "linear" else "lr": lr}
    return replace(BASE, method=method, seed=seed, pretrained_path=weights, **rate)


def pretrain(output: Path, progress: RunsProgress) -> Path:
    """Weights of the small ViT after digits 0-4; from the last time, if they were made by the same config."""
    key = hashlib.sha256(dump_run_config(PRETRAINING).encode()).hexdigest()[:8]
    for folder in sorted(output.glob(f"backbone-{key}*")):
        if (folder / "record.json").is_file():
            progress.begin("pretraining")
            progress.say(f"Pretrained weights of digits 0-4 from {folder}")
            return folder / "adapter" / "adapter_model.safetensors"
    progress.begin("pretraining on digits 0-4")
    record = run(replace(PRETRAINING, output=output, experiment=f"backbone-{key}"), progress=progress)
    progress.say(f"pretrained on digits 0-4: test top-1 {record['metrics']['test_top1_percent']:.2f} %")
    return Path(record["folder"]) / "adapter" / "adapter_model.safetensors"


def summarise(method: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one method, and what it costs."""
    scores = [r["metrics"]["test_top1_percent"] for r in runs]
    return {
        "method": method,
        "lr": LEARNING_RATES[method],
        "test_top1_percent": scores,
        "mean_percent": statistics.mean(scores),
        "std_percent": statistics.stdev(scores) if len(scores) > 1 else None,
        "trainable_without_head": runs[0]["parameters"]["trainable_without_head"],
        "head": runs[0]["parameters"]["head"],
        "train_seconds": statistics.mean(r["metrics"]["train_seconds"] for r in runs),
        "val_top1_percent_by_epoch": [[row["val_top1_percent"] for row in r["history"]] for r in runs],
    }


def show(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table and the pictures."""
    seeds = len(results[0]["test_top1_percent"])
    rows = [
        (
            r["method"],
            f"{r['mean_percent']:.2f}" + ("" if r["std_percent"] is None else f" ± {r['std_percent']:.2f}"),
            f"{r['trainable_without_head']:,}",
            f"{r['head']:,}",
            f"{r['train_seconds']:.1f}",
        )
        for r in results
    ]
    header = ("method", "test top-1 (%)", "trainable parameters", "+ head", "training (s)")
    print_columns(f"digits 0-4 → 5-9, mean ± standard deviation of {seeds} seeds", header, rows)
    if figures.method_comparison(folder / "comparison.png", results, title="test_vit, digits 0-4 → 5-9"):
        print(f"Pictures: {folder / 'comparison.png'}")
    print(f"Every run with its record, adapter and pictures: {folder}")
    print(f"One of them by hand: python train.py -c {folder / 'nolora-seed0' / 'args.yaml'}")


if __name__ == "__main__":
    tyro.cli(main)
