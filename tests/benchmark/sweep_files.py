"""Result folders as a sweep leaves them, written from a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL, CIFAR10 = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "uoft-cs/cifar10"


class SweepFiles:
    """A results folder that grows run by run."""

    def __init__(self, folder: Path, **sweep: Any) -> None:
        self.folder, self.count = folder, 0
        (folder / "runs").mkdir(parents=True)
        self.sweep = {
            "name": "first",
            "description": "What was asked.",
            "baseline": "lora",
            "choose": {"axes": ["lr", "head_lr"]},
            "chosen": {},
            **sweep,
        }
        self.save_sweep()

    def save_sweep(self) -> None:
        (self.folder / "sweep.json").write_text(json.dumps(self.sweep), encoding="utf-8")

    def choice(self, label: str, point: dict[str, Any], cell: dict[str, Any], *, at_edge: bool = False) -> None:
        """An entry of `chosen`."""
        entry = {"label": label, "cell": cell, "point": point, "val_top1_percent": 80.0, "at_edge": at_edge}
        self.sweep["chosen"][f"{label} {len(self.sweep['chosen'])}"] = entry
        self.save_sweep()

    def write(self, record: Any) -> Path:
        """A run's file as given."""
        self.count += 1
        path = self.folder / "runs" / f"{self.count:04x}.json"
        path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
        return path

    def done(
        self,
        label: str,
        seed: int,
        *,
        test: float | None = None,
        val: float = 80.0,
        dataset: str = CIFAR10,
        model: str = MODEL,
        parameters: int = 1000,
        train_images: int = 1000,
        metrics: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
        **point: Any,
    ) -> Path:
        """A run that is done; final if it has a test accuracy."""
        final = {} if test is None else {"test_top1_percent": test, "test_loss": (100 - test) / 40}
        known = {"train_seconds": 10.0, "total_seconds": 12.0, "peak_memory_bytes": 2**30}
        sizes = {"train_images": train_images, "val_images": 100, "test_images": 2000}
        git = {"commit": "0123456789abcdef", "dirty": False}
        versions = {"torch": "2.10.0", "timm": "1.0.31"}
        return self.write({
            "key": f"{self.count:04x}",
            "label": label,
            "phase": "choose" if test is None else "final",
            "point": {name.replace("__", "."): value for name, value in point.items()},
            "seed": seed,
            "status": "done",
            "error": None,
            "method": "nolora",
            "model": model,
            "dataset": {"id": dataset, "num_classes": 10, **sizes},
            "metrics": {"val_top1_percent": val, **final, **(known if metrics is None else metrics)},
            "parameters": {"trainable_without_head": parameters, "adapter": parameters, "head": 50, "total": 5_000_000},
            "config": {"epochs": 5, "method": "nolora", "seed": seed, **(config or {})},
            "environment": {
                "time_utc": f"2026-02-0{1 + seed % 9}T10:00:00+00:00",
                "python": "3.11.7",
                "versions": versions,
                "device": "a processor",
                "git": git,
                **(environment or {}),
            },
            "history": [{"train_loss": 0.9}, {"train_loss": 0.25, "train_top1_percent": 96.0, "val_loss": 0.5}],
        })  # fmt: skip

    def failed(self, label: str, seed: int, error: str, *, phase: str = "final", **point: Any) -> Path:
        """A run that failed, of which nothing is known but what was asked."""
        asked = {name.replace("__", "."): value for name, value in point.items()}
        return self.write({
            "key": f"{self.count:04x}",
            **{"label": label, "phase": phase, "point": asked, "seed": seed, "status": "failed", "error": error},
        })  # fmt: skip
