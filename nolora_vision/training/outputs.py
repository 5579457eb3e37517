"""What a run leaves behind: folder, record, history, adapter, pictures."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from nolora_vision import save_adapter, summary
from nolora_vision.adapters.checkpoint import adapter_bytes
from nolora_vision.training import figures
from nolora_vision.training.checkpoints import has_checkpoint, remove_checkpoints
from nolora_vision.training.config_file import as_plain, dump_run_config
from nolora_vision.training.data import ImageData
from nolora_vision.training.engine import Evaluation, restore
from nolora_vision.training.errors import NotFiniteError, RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.processes import on_main_process
from nolora_vision.training.record import environment, peak_memory, write_atomic, write_record
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.sharded import is_sharded

FAILURE = "failure.json"
NOT_FINITE = "The test loss is no finite number, as some logits are none."
MOST_SHOWN = 10
"""Images left out that the terminal names."""


def make_folder(config: RunConfig, model_name: str, size: int) -> Path:
    """A new folder for the run, `output/<time>-<model>-<size>` or the experiment's name; never one that exists.

    Raises:
        RunError: if it cannot be made.
    """
    stem = config.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{model_name}-{size}"
    for n in range(1000):
        folder = config.output / (stem if n == 0 else f"{stem}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not config.output.is_dir():
                raise RunError(f"--output {config.output} is not a folder. Choose another.") from None
            continue
        except OSError as error:
            raise RunError(
                f"The run's folder {folder} cannot be made ({error.strerror}). Choose an --output."
            ) from error
        write_atomic(folder / "args.yaml", dump_run_config(config))
        return folder
    raise RunError(f"{config.output / stem} and its numbered successors exist already. Choose another --experiment.")


def warn(data: ImageData, slow: str | None) -> None:
    """Say what is odd about the images, and what makes training slow, before anything is trained."""
    for warning in [*data.about["warnings"], *([slow] if slow else [])]:
        print(f"warning: {warning}", file=sys.stderr)
    for split, problems in data.about["skipped_images"].items():
        print(f"warning: {len(problems)} images of the {split} split are left out:", file=sys.stderr)
        for problem in problems[:MOST_SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        if len(problems) > MOST_SHOWN:
            print(f"  … and {len(problems) - MOST_SHOWN} more; record.json lists all.", file=sys.stderr)


def make_record(
    config: RunConfig,
    data: ImageData,
    model: nn.Module,
    result: Fit,
    test: Evaluation | None,
    *,
    name: str,
    started: float,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that the run says of itself; units are in the names, rates count validation apart."""
    counts = summary(model)
    tested = {} if test is None else _tested(test)
    warnings = [*result.warnings, *([NOT_FINITE] if test is not None and not isfinite(test.loss) else [])]
    return {
        "method": config.method,
        "model": name,
        "dataset": dict(data.about),
        "metrics": {
            **tested,
            **({"val_top1_percent": result.best_val_top1_percent} if data.val_held_out else {}),
            "best_epoch": result.best_epoch,
            "train_seconds": result.train_seconds,
            "total_seconds": time.perf_counter() - started,
            "train_images_per_s": result.images_per_s,
            "train_forward_images": result.forward_images,
            "adapter_bytes": adapter_bytes(model),
            **peak_memory(),
        },
        "parameters": {
            "trainable_without_head": counts.trainable_params - counts.head_params,
            "adapter": counts.adapter_params,
            "head": counts.head_params,
            "total": counts.total_params,
        },
        "config": as_plain(asdict(config)),
        **({"warnings": warnings} if warnings else {}),
        **({"resumed_at_updates": result.resumed_at} if result.resumed_at else {}),
        **({"config_changes": list(changes)} if changes else {}),
        "environment": environment(),
    }


def _tested(test: Evaluation) -> dict[str, Any]:
    return {
        "test_top1_percent": test.top1_percent,
        "test_top5_percent": test.top5_percent,
        "test_loss": test.loss if isfinite(test.loss) else None,
        "test_seconds": test.seconds,
        "test_images_per_s": len(test.labels) / test.seconds,
    }


def save_outputs(
    folder: Path,
    record: Mapping[str, Any],
    data: ImageData,
    images: Mapping[str, Any],
    model: nn.Module,
    result: Fit,
    test: Evaluation,
) -> None:
    """Adapter, history, when they are there the record, then the pictures; the checkpoints go."""
    (folder / FAILURE).unlink(missing_ok=True)
    save_trained(folder, record["config"], data, images, model, metrics=record["metrics"])
    write_atomic(folder / "summary.csv", history_csv(result.history))
    write_atomic(folder / "splits.json", json.dumps(data.split_file, indent=2, ensure_ascii=False) + "\n")
    write_record(folder / "record.json", dict(record))
    title = f"{record['method']}, {record['model']}, {record['dataset']['id']}"
    drawn = figures.learning_curve(
        folder / "learning_curve.png", result.history, best_epoch=result.best_epoch, title=title
    )
    drawn = drawn and figures.confusion_matrix(
        folder / "confusion_matrix.png", test.labels.numpy(), test.predictions.numpy(), data.class_names, title=title
    )
    if not drawn:
        print("No pictures: pip install 'nolora-vision[plots]' for matplotlib.")
    remove_checkpoints(folder)


def save_trained(
    folder: Path,
    config: Mapping[str, Any],
    data: ImageData,
    images: Mapping[str, Any],
    model: nn.Module,
    *,
    metrics: Mapping[str, Any],
) -> None:
    """The adapter, or whatever trained, with what it takes to use it.

    Args:
        config: as it is in a record.
        images: preprocessing of evaluation.
    """
    kwargs = {**({} if config["img_size"] is None else {"img_size": config["img_size"]}), **config["model_kwargs"]}
    save_adapter(
        model,
        folder / "adapter",
        class_names=data.class_names,
        metrics=metrics,
        preprocessing=images,
        model_kwargs=kwargs,
        metadata={
            "method": config["method"],
            "dataset": data.about["id"],
            "pretrained": config["pretrained"],
            "pretrained_path": config["pretrained_path"] and str(Path(config["pretrained_path"]).absolute()),
        },
    )


@contextmanager
def kept_on_failure(
    folder: Path | None, config: RunConfig, data: ImageData, images: Mapping[str, Any], model: nn.Module
) -> Iterator[None]:
    """Where the numbers of training go wrong, what was good of it is saved in the folder, if there is one."""
    try:
        yield
    except NotFiniteError as error:
        if not on_main_process():
            error.told_by_main = error.of == "gradient"  # it is of all processes; a loss is of the one that has it
        elif folder is not None:
            save_failure(folder, config, data, images, model, error)
        raise


def save_failure(
    folder: Path,
    config: RunConfig,
    data: ImageData,
    images: Mapping[str, Any],
    model: nn.Module,
    error: NotFiniteError,
) -> None:
    """What a run whose numbers went wrong leaves: its last good adapter, its history, and failure.json.

    Args:
        error: is told what is kept, for its message.
    """
    fit: Fit = error.fit
    if is_sharded(model):  # the other processes are leaving, and hold parts of it
        kept = None
    elif fit.best_state:
        restore(model, fit.best_state)
        kept = f"the adapter of epoch {fit.best_epoch} (validation top-1 {fit.best_val_top1_percent:.2f} %)"
    elif error.weights_kept and (error.epoch, error.step) > (1, 1):
        kept = "the adapter as it was before that step"
    else:
        kept = None
    if kept is not None:
        save_trained(folder, as_plain(asdict(config)), data, images, model, metrics={})
        error.kept = f"Kept in {folder / 'adapter'}: {kept}."
    if has_checkpoint(folder):
        go_on = f"python train.py --resume {folder} --resume-changed"
        error.kept = f"{error.kept or ''} Go on from the last checkpoint with other rates: {go_on} --lr …".strip()
    if fit.history:
        write_atomic(folder / "summary.csv", history_csv(fit.history))
    facts = {name: getattr(error, name) for name in ("of", "step", "epoch", "rates", "where")}
    failure = {"error": str(error), **facts, "kept": kept, "config": as_plain(asdict(config))}
    write_record(folder / FAILURE, {**failure, "environment": environment()})


def history_csv(history: Sequence[Mapping[str, float]]) -> str:
    """One line for each epoch; validation is empty where there was none."""
    stream = io.StringIO()
    names = list(dict.fromkeys(name for row in sorted(history, key=len, reverse=True) for name in row))
    writer = csv.DictWriter(stream, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return stream.getvalue()
