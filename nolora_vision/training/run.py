"""run(config) → record: seed → data → model → fit → evaluate → save; the story of the project."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from nolora_vision import (
    CheckpointError,
    ConfigError,
    InjectionError,
    load_adapter,
    param_groups,
    read_adapter_config,
    save_adapter,
    summary,
)
from nolora_vision.training import figures
from nolora_vision.training.backbone import apply_method, build_model, data_config, full_name, training_mode
from nolora_vision.training.data import ImageData, Split, load_data, make_loader
from nolora_vision.training.engine import Evaluation, Fit, evaluate, fit, make_accelerator, restore
from nolora_vision.training.errors import RunError
from nolora_vision.training.progress import LiveProgress, print_table
from nolora_vision.training.record import environment, peak_memory, write_atomic, write_record
from nolora_vision.training.run_config import RunConfig, as_plain, dump_run_config, parse_run_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after one message about what the user can mend."""
    show_traceback = "--traceback" in (sys.argv if argv is None else argv)
    try:
        config = parse_run_config(argv)
        run(config)
    except (ConfigError, RunError, InjectionError, CheckpointError) as error:
        if show_traceback:
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: RunConfig) -> dict[str, Any]:
    """Train and test as the config says; returns the record that also lies in the run's folder.

    Raises:
        RunError: if something the user can mend is wrong; nothing is written before data and model are there.
    """
    if config.eval_only:
        return run_eval_only(config)
    started = time.perf_counter()
    set_seed(config.seed)
    data = load_config_data(config)
    model = build_model(
        config.model,
        len(data.class_names),
        pretrained=config.pretrained,
        img_size=config.img_size,
        drop_path=config.drop_path,
        grad_checkpointing=config.grad_checkpointing,
    )
    apply_method(model, config.method, config.adapter)
    folder = make_folder(config, full_name(model, pretrained=config.pretrained))
    result, test = train_and_test(config, data, model, folder)
    record = make_record(config, data, model, result, test, seconds=time.perf_counter() - started)
    save_outputs(folder, record, data, model, result, test)
    show(record, folder)
    return record


def load_config_data(config: RunConfig) -> ImageData:
    """The dataset that the config names, split."""
    return load_data(
        config.dataset,
        seed=config.seed,
        val_split=config.val_split,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples,
        image_key=config.image_key,
        label_key=config.label_key,
        revision=config.revision,
    )


def train_and_test(config: RunConfig, data: ImageData, model: nn.Module, folder: Path | None) -> tuple[Fit, Evaluation]:
    """Fit, go back to the best epoch by validation, and score the test split once."""
    accelerator = make_accelerator(
        config.amp_dtype, grad_accum_steps=config.grad_accum_steps, report_to=config.report_to, folder=folder
    )
    if config.report_to != "none":
        accelerator.init_trackers("nolora-vision", config={"config": json.dumps(as_plain(asdict(config)))})
    groups = param_groups(model, lr=config.lr, head_lr=config.head_lr, weight_decay=config.weight_decay)
    optimizer = create_optimizer_v2(groups, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
    train, val = (loader(config, data, model, split, training=split is data.train) for split in (data.train, data.val))
    steps = -(-len(train) // config.grad_accum_steps)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=0.0,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
    runnable = torch.compile(model) if config.torchcompile else model
    runnable, optimizer, train, val = accelerator.prepare(runnable, optimizer, train, val)
    mixup = mixup_of(config, len(data.class_names))
    soft = mixup is not None
    with LiveProgress() as progress:
        result = fit(
            runnable,
            optimizer,
            scheduler,
            train,
            val,
            accelerator=accelerator,
            epochs=config.epochs,
            progress=progress,
            set_training_mode=training_mode,
            loss_function=SoftTargetCrossEntropy() if soft else nn.CrossEntropyLoss(label_smoothing=config.smoothing),
            mixup=mixup,
            clip_grad=config.clip_grad,
            ema=ema,
        )
    restore(model, result.best_state)
    test = accelerator.prepare(loader(config, data, model, data.test, training=False))
    scores = evaluate(runnable, test, accelerator=accelerator)
    accelerator.log({"test_top1_percent": scores.top1_percent}, step=config.epochs)
    accelerator.end_training()
    return result, scores


def loader(config: RunConfig, data: ImageData, model: nn.Module, split: Split, *, training: bool) -> Any:
    """Batches of one split, as the model wants its images."""
    augmentation = {"scale": config.scale, "hflip": config.hflip, "auto_augment": config.aa, "re_prob": config.reprob}
    return make_loader(
        split,
        data_config(model, config.img_size),
        batch_size=config.batch_size,
        training=training,
        workers=config.workers,
        seed=config.seed,
        augmentation={**augmentation, "color_jitter": None} if training else None,
    )


def mixup_of(config: RunConfig, num_classes: int) -> Any | None:
    """timm's Mixup and CutMix, or None where both are off."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes
    )


def make_folder(config: RunConfig, model_name: str) -> Path:
    """A new folder for the run, `output/<time>-<model>-<size>` or the experiment's name; never one that exists."""
    size = config.img_size or "own"
    stem = config.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{model_name}-{size}"
    for n in range(1000):
        folder = config.output / (stem if n == 0 else f"{stem}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        write_atomic(folder / "args.yaml", dump_run_config(config))
        return folder
    raise RunError(f"{config.output / stem} and its numbered successors exist already. Choose another --experiment.")


def make_record(
    config: RunConfig, data: ImageData, model: nn.Module, result: Fit, test: Evaluation, *, seconds: float
) -> dict[str, Any]:
    """Everything that the run says of itself."""
    counts = summary(model)
    return {
        "method": config.method,
        "model": full_name(model, pretrained=config.pretrained),
        "dataset": dict(data.about),
        "metrics": {
            "test_top1_percent": test.top1_percent,
            "test_top5_percent": test.top5_percent,
            "test_loss": test.loss,
            "val_top1_percent": result.best_val_top1_percent,
            "best_epoch": result.best_epoch,
            "train_seconds": result.train_seconds,
            "test_seconds": test.seconds,
            "total_seconds": seconds,
            "images_per_s": result.images_per_s,
            **peak_memory(),
        },
        "parameters": {
            "trainable_without_head": counts.trainable_params - counts.head_params,
            "adapter": counts.adapter_params,
            "head": counts.head_params,
            "total": counts.total_params,
        },
        "config": as_plain(asdict(config)),
        "environment": environment(),
    }


def save_outputs(
    folder: Path, record: dict[str, Any], data: ImageData, model: nn.Module, result: Fit, test: Evaluation
) -> None:
    """Record, history, adapter and pictures."""
    write_record(folder / "record.json", record)
    write_atomic(folder / "summary.csv", history_csv(result.history))
    facts = {"class_names": list(data.class_names), "dataset": record["dataset"]["id"], "metrics": record["metrics"]}
    save_adapter(model, folder / "adapter", metadata={**facts, "model": record["model"], "method": record["method"]})
    title = f"{record['method']}, {record['model']}, {record['dataset']['id']}"
    drawn = figures.learning_curve(
        folder / "learning_curve.png", result.history, best_epoch=result.best_epoch, title=title
    )
    drawn = drawn and figures.confusion_matrix(
        folder / "confusion_matrix.png", test.labels.numpy(), test.predictions.numpy(), data.class_names, title=title
    )
    if not drawn:
        print("No pictures: pip install 'nolora-vision[plots]' for matplotlib.")


def history_csv(history: Sequence[dict[str, float]]) -> str:
    """One line for each epoch."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return stream.getvalue()


def show(record: dict[str, Any], folder: Path) -> None:
    """The table at the end."""
    metrics, parameters = record["metrics"], record["parameters"]
    rows = [
        ("test top-1", f"{metrics['test_top1_percent']:.2f} %"),
        ("validation top-1", f"{metrics['val_top1_percent']:.2f} % (epoch {metrics['best_epoch']})"),
        ("trainable parameters", f"{parameters['trainable_without_head']:,} + head {parameters['head']:,}"),
        ("time", f"{metrics['total_seconds']:.0f} s, training at {metrics['images_per_s']:.0f} images/s"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB ({metrics['peak_memory_of']})"),
        ("run folder", str(folder)),
        ("adapter", str(folder / "adapter")),
    ]
    print_table(f"{record['method']} · {record['model']} · {record['dataset']['id']}", rows)


def run_eval_only(config: RunConfig) -> dict[str, Any]:
    """Score a saved adapter on the dataset's test split."""
    assert config.adapter_dir is not None
    saved = read_adapter_config(config.adapter_dir)
    data = load_config_data(config)
    if saved["num_classes"] != len(data.class_names):
        got = len(data.class_names)
        raise RunError(f"The adapter knows {saved['num_classes']} classes, {config.dataset} has {got}.")
    name = saved["architecture"] + (f".{saved['pretrained_tag']}" if saved["pretrained_tag"] else "")
    model = build_model(name, saved["num_classes"], pretrained=config.pretrained, img_size=config.img_size)
    load_adapter(model, config.adapter_dir)
    accelerator = make_accelerator(config.amp_dtype)
    batches = loader(config, data, model, data.test, training=False)
    scores = evaluate(*accelerator.prepare(model, batches), accelerator=accelerator)
    rows = [
        ("test top-1", f"{scores.top1_percent:.2f} %"),
        ("test top-5", f"{scores.top5_percent:.2f} %"),
        ("images", f"{len(data.test):,} in {scores.seconds:.0f} s"),
    ]
    print_table(f"{config.adapter_dir} · {name} · {config.dataset}", rows)
    return {"model": name, "test_top1_percent": scores.top1_percent, "dataset": dict(data.about)}
