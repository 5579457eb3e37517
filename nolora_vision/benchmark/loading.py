"""Whether loading images keeps up with training: images per second of each, with and without the image cache."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from torch import nn
from torch.nn import functional as F

from nolora_vision import inject
from nolora_vision.training.backbone import data_config
from nolora_vision.training.data import ImageData, cache_need, load_data, make_loader
from nolora_vision.training.engine import make_accelerator, seed_everything
from nolora_vision.training.progress import RunsProgress, print_columns
from nolora_vision.training.record import environment, write_record

PHOTOS = "photos"
AUGMENTATION = {"scale": (0.5, 1.0), "hflip": 0.5, "color_jitter": None}
"""That of `train.py` by default."""


@dataclass(frozen=True)
class Job:
    """One row of the table: something that goes through images, in one round."""

    what: str
    workers: int
    cached: bool
    images: int
    run: Callable[[], object]


def main(
    *,
    dataset: str = PHOTOS,
    model: str = "vit_tiny_patch16_224",
    images: int = 400,
    photo_size: tuple[int, int] = (500, 375),
    batch_size: int = 50,
    amp_dtype: Literal["none", "bfloat16", "float16"] = "none",
    workers: tuple[int, ...] = (0, 2),
    rounds: int = 5,
    output: Path = Path("output/loading"),
) -> None:
    """Time decoding, the loaders of training and evaluation, and the model itself, all in turn.

    Args:
        dataset: What --dataset of train.py takes, or photos: JPEG files made for this, of --photo-size.
        model: timm model with adapters; its weights are random.
        images: Of the training and of the evaluation split, at most.
        photo_size: Width and height of the made JPEG files.
        batch_size: Images in a batch.
        amp_dtype: Of the model's steps.
        workers: Numbers of loader processes.
        rounds: Of each job; the first fills the caches and warms up.
        output: Folder for loading.json.
    """
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        name = str(make_photos(Path(folder), images, photo_size)) if dataset == PHOTOS else dataset
        data = load_data(name, val_split=0.5, max_train_samples=images, max_eval_samples=images)
        network = inject(timm.create_model(model, num_classes=len(data.class_names)))
        jobs = [*loading_jobs(data, data_config(network), batch_size, workers)]
        jobs += model_jobs(network, batch_size, amp_dtype)
        rows = measure(jobs, rounds)
    show(f"{dataset} · {model} · batch {batch_size}, {amp_dtype}", rows)
    facts = {"dataset": dataset, "model": model, "batch_size": batch_size, "amp_dtype": amp_dtype, "rounds": rounds}
    facts |= {"images": images} | ({"photo_size": photo_size} if dataset == PHOTOS else {})
    output.mkdir(parents=True, exist_ok=True)
    write_record(output / "loading.json", {**facts, "rows": rows, "environment": environment()})
    print(output / "loading.json")


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEG files for `count` training and `count` test images, detailed enough to be as large as photographs.

    Args:
        size: width and height in pixels.
    """
    random = np.random.default_rng(0)
    for split, many in (("train", 2 * count), ("test", count)):  # half of the training images go to validation
        for i in range(many):
            place = folder / split / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            grain = random.normal(0, 8, (size[1], size[0], 1))
            pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.jpg", quality=85)
    return folder


# ------------------------------------------------------------------------------------------------------------ the jobs


def loading_jobs(
    data: ImageData, preprocessing: Mapping[str, Any], batch_size: int, workers: Sequence[int]
) -> list[Job]:
    """Decoding alone, and each loader alone: without a cache, and with one that holds every image."""

    def decode() -> None:
        for row in data.train.rows:
            data.train.table.image(int(row))

    jobs = [Job("decoding", 0, False, len(data.train), decode)]
    room = sum(3 * int(np.prod(data.train.table.image(int(row)).size)) for row in data.train.rows)
    for training, split in ((True, data.train), (False, data.val)):
        what = "training loader" if training else "evaluation loader"
        needed = room if training else int(cache_need(split, preprocessing["input_size"], augmented=False))
        for count in workers:
            for cached in (False, True):
                batches = make_loader(
                    split,
                    preprocessing,
                    batch_size=batch_size,
                    training=training,
                    workers=count,
                    augmentation=AUGMENTATION if training else None,
                    cache_bytes=needed if cached else 0,
                )
                jobs.append(Job(what, count, cached, len(split), lambda batches=batches: exhaust(batches)))
    return jobs


def exhaust(batches: Any) -> None:
    """One pass over a loader; the batches are thrown away."""
    for _ in batches:
        pass


def model_jobs(model: nn.Module, batch_size: int, amp_dtype: str) -> list[Job]:
    """One training step and one evaluation batch, on an image batch that is there already."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    accelerator = make_accelerator(amp_dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    size = data_config(accelerator.unwrap_model(model))["input_size"]
    images = torch.randn(batch_size, *size, device=accelerator.device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=accelerator.device)

    def step() -> None:
        model.train()
        loss = F.cross_entropy(model(images).float(), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def evaluation() -> None:
        model.eval()
        with torch.inference_mode(), accelerator.autocast():
            model(images).sum().item()

    return [Job("training step", 0, False, batch_size, step), Job("evaluation step", 0, False, batch_size, evaluation)]


# ------------------------------------------------------------------------------------------------------- the measuring


def measure(jobs: Sequence[Job], rounds: int) -> list[dict[str, Any]]:
    """Images per second of every job, round after round, and the share of a model's step that loading would take."""
    rates: dict[int, list[float]] = {i: [] for i in range(len(jobs))}
    with RunsProgress(rounds) as progress:
        for turn in range(rounds):
            progress.begin(f"round {turn + 1}")
            for i, job in enumerate(jobs):
                started = time.perf_counter()
                job.run()
                if turn:
                    rates[i].append(job.images / (time.perf_counter() - started))
    medians = [statistics.median(rates[i]) for i in rates]
    step = {job.what.split()[0]: rate for job, rate in zip(jobs, medians, strict=True) if job.what.endswith("step")}
    rows = []
    for i, job in enumerate(jobs):
        row = {"what": job.what, "workers": job.workers, "cached": job.cached, "images_per_s": medians[i]}
        row |= {"lowest_images_per_s": min(rates[i]), "highest_images_per_s": max(rates[i])}
        row["time_percent_of_step"] = 100 * step.get(job.what.split()[0], step["training"]) / medians[i]
        rows.append(row)
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table on the terminal."""
    lines = [
        (
            row["what"],
            str(row["workers"]),
            "yes" if row["cached"] else "no",
            f"{row['images_per_s']:,.0f} ({row['lowest_images_per_s']:,.0f}–{row['highest_images_per_s']:,.0f})",
            f"{row['time_percent_of_step']:.1f}",
        )
        for row in rows
    ]
    print_columns(title, ("what", "workers", "cached", "images/s", "time in % of the step"), lines)


if __name__ == "__main__":
    tyro.cli(main)
