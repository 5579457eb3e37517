"""run(config) → record: seed → data → model → fit → evaluate → save."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from nolora_vision import (
    CheckpointError,
    ConfigError,
    InjectionError,
)
from nolora_vision.methods import apply_method
from nolora_vision.training import outputs
from nolora_vision.training.backbone import (
    full_name,
    refuse_absent_weights,
    refuse_wrong_size,
    training_mode,
)
from nolora_vision.training.config_file import parse_run_config
from nolora_vision.training.data import ImageData
from nolora_vision.training.determinism import deterministic_algorithms
from nolora_vision.training.ending import show
from nolora_vision.training.engine import (
    Evaluation,
    NoCheckpoints,
    Progress,
    draw_apart,
    evaluate,
    fit,
    make_accelerator,
    precision_of,
    restore,
    seed_everything,
    slow_precision,
)
from nolora_vision.training.errors import Interrupted, RunError
from nolora_vision.training.fit_state import Fit
from nolora_vision.training.ingredients import (
    build_config_model,
    load_config_data,
    mixup_of,
    objective_of,
    preprocessing,
    refuse_few_images,
    run_loaders,
)
from nolora_vision.training.lost_loaders import lost_worker_explained
from nolora_vision.training.prepare import prepare
from nolora_vision.training.processes import from_main_process, leave_processes, on_main_process, processes
from nolora_vision.training.progress import LiveProgress, Silence, print_anything
from nolora_vision.training.record import code_state
from nolora_vision.training.resume import adopt_changes, finished_record, folder_to_resume
from nolora_vision.training.retest import run_eval_only
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.sharded import is_sharded
from nolora_vision.training.shelf import Shelf
from nolora_vision.training.snapshot import Snapshot
from nolora_vision.training.stopping import Checkpointer, StopRequest, saved_if_stopped
from nolora_vision.training.trackers import begin_trackers, end_trackers


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 2 after one message about what the user can mend; 130 or 143 if it was told to stop."""
    print_anything()
    code = run_and_tell(argv)
    leave_processes()  # not after an exception that nobody expects: then the others may be in the middle of talking
    return code


def run_and_tell(argv: Sequence[str] | None) -> int:
    """The command's exit code, after a message where it is not 0."""
    show_traceback = "--traceback" in (sys.argv if argv is None else argv)
    try:
        code_state()  # of what is in memory now
        run(parse_run_config(argv), checkpoints=True)
    except Interrupted as stopped:
        if on_main_process():
            what = " and saved." if stopped.saved else "; what it did since its last checkpoint will be done again."
            print(f"Stopped{what} Go on: python train.py --resume {stopped.folder}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("Stopped at once; nothing was saved since the last checkpoint, if there is one.", file=sys.stderr)
        return 130
    except (ConfigError, RunError, InjectionError, CheckpointError) as error:
        if show_traceback:
            raise
        if not getattr(error, "told_by_main", False):
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    shelf: Shelf | None = None,
    keep: bool = True,
    score_test: bool = True,
    checkpoints: bool = False,
) -> dict[str, Any]:
    """Train and test as the config says; returns the record that also lies in the run's folder.

    Args:
        progress: who is told how it goes instead of the terminal, which then gets no table either.
        shelf: what runs before this one have loaded already.
        keep: whether to leave a folder with record, adapter and pictures; only a run that is tested does.
        score_test: whether to look at the test images at all; runs that are compared to choose something must not.
        checkpoints: save the state of training now and then and on SIGTERM or SIGINT; needs `keep`.

    Raises:
        Interrupted: after saving, if it was told to stop.
        RunError: if something the user can mend is wrong; nothing is written before data and model are there.
    """
    if config.eval_only:
        return run_eval_only(config)
    config = config.resolved()
    refuse_unusable(config)
    old = from_main_process(lambda: folder_to_resume(config))
    if old is not None and (done := finished_record(old)) is not None:
        return done
    started = time.perf_counter()
    seed_everything(config.seed)
    data, model = load(config, shelf, quiet=progress is not None)
    images = preprocessing(config, model, data.about)
    refuse_wrong_size(model, images["input_size"])
    apply_method(model, config.method, config.adapter, options=config.method_options)
    name = full_name(model, pretrained=config.pretrained, pretrained_path=config.pretrained_path)
    new = partial(outputs.make_folder, config, name, images["input_size"][-1])
    folder = old or from_main_process(new) if keep and score_test else None
    changes = from_main_process(partial(adopt_changes, old, config)) if old is not None else []
    loaders = run_loaders(config, images, data, shelf and shelf.cache_for)
    options = {"score_test": score_test, "checkpoints": checkpoints and folder is not None}
    with deterministic_algorithms(config.deterministic), outputs.kept_on_failure(folder, config, data, images, model):
        result, test = train_and_test(config, data, loaders, model, folder, progress or LiveProgress(), **options)
    model = rebuilt(config, len(data.class_names), result) if is_sharded(model) else model
    record = outputs.make_record(config, data, model, result, test, name=name, started=started, changes=changes)
    if folder is not None and test is not None and on_main_process():
        outputs.save_outputs(folder, record, data, images, model, result, test)
        if progress is None:
            show(record, folder)
    return {**record, "folder": folder and str(folder), "history": result.history}


def rebuilt(config: RunConfig, num_classes: int, result: Fit) -> nn.Module:
    """The trained model once more, with whole parameters: one process cannot save those that FSDP has split."""
    model = build_config_model(config, num_classes)
    apply_method(model, config.method, config.adapter, options=config.method_options)
    restore(model, result.best_state)
    return model


def load(config: RunConfig, shelf: Shelf | None, *, quiet: bool) -> tuple[ImageData, nn.Module]:
    """The images and the pretrained model; what is odd about the images is said, unless quiet."""
    data = shelf.data(config) if shelf else load_config_data(config)
    if not quiet and on_main_process():
        outputs.warn(data, slow_precision(config.amp_dtype))
    refuse_few_images(config, len(data.train), processes().num_processes)
    return data, (shelf.model if shelf else build_config_model)(config, len(data.class_names))


def refuse_unusable(config: RunConfig) -> None:
    """Check what only this machine knows, before anything is loaded.

    Raises:
        RunError: if it lacks a precision, a tracker, an optimizer, the weights, or a place for results.
    """
    precision_of(config.amp_dtype)
    if config.report_to != "none" and find_spec(config.report_to) is None:
        raise RunError(f"--report-to {config.report_to} needs a package: pip install {config.report_to}.")
    if config.output.exists() and not config.output.is_dir():
        raise RunError(f"--output {config.output} is not a folder. Choose another.")
    if config.pretrained_path is not None:
        refuse_absent_weights(config.pretrained_path)
    try:
        create_optimizer_v2([nn.Parameter(torch.zeros(1, 1))], opt=config.opt, lr=config.lr)
    except Exception as error:  # timm raises many kinds
        raise RunError(f"--opt {config.opt}: {str(error).rstrip('.')}.") from error


def train_and_test(
    config: RunConfig,
    data: ImageData,
    loaders: tuple[Any, Any, Any],
    model: nn.Module,
    folder: Path | None,
    progress: Progress,
    *,
    score_test: bool = True,
    checkpoints: bool = False,
) -> tuple[Fit, Evaluation | None]:
    """Fit, go back to the epoch to keep, and score the test split once, or not at all.

    Args:
        loaders: of `run_loaders`: training, validation, test.
        checkpoints: save the state in the folder, and go on from there if it holds any.
    """
    accelerator = make_accelerator(
        config.amp_dtype, grad_accum_steps=config.grad_accum_steps, report_to=config.report_to, folder=folder
    )
    parts = prepare(config, model, loaders, accelerator)
    draw_apart(config.seed, accelerator.process_index)
    objective = objective_of(config, images=len(data.train), gather=accelerator.gather)
    snapshot = Snapshot(model, parts.optimizer, objective, ema=parts.ema, accelerator=accelerator)
    shown = progress if on_main_process() else Silence()
    with lost_worker_explained(), StopRequest(listen=checkpoints) as stop, shown as told:
        keeper = make_checkpointer(config, folder, snapshot, stop) if checkpoints and folder else NoCheckpoints()
        begin_trackers(accelerator, config, folder, keeper.begin()[0].history)
        with saved_if_stopped(keeper):
            result = fit(
                *parts[:5],
                accelerator=accelerator,
                epochs=config.epochs,
                progress=told,
                set_training_mode=training_mode,
                objective=objective,
                mixup=mixup_of(config, len(data.class_names)),
                clip_grad=config.clip_grad,
                ema=parts.ema,
                keep_epoch=config.keep_epoch,
                validate_every=config.validate_every,
                checkpointer=keeper,
            )
        restore(model, result.best_state)
        scores = None
        if score_test:
            scores = evaluate(parts.model, parts.test, accelerator=accelerator, poll=keeper.poll)
            accelerator.log({"test_top1_percent": scores.top1_percent}, step=config.epochs)
    end_trackers(accelerator)
    return result, scores


def make_checkpointer(config: RunConfig, folder: Path, snapshot: Snapshot, stop: StopRequest) -> Checkpointer:
    """Who saves a run as its config says."""
    return Checkpointer(
        folder,
        snapshot,
        stop,
        steps=config.checkpoint_steps,
        minutes=config.checkpoint_minutes,
        keep=config.keep_checkpoints,
    )
