"""predict: the likeliest classes of images by a saved adapter, for `nolora-vision predict`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from nolora_vision.commands.classifier import load_model, predict_images
from nolora_vision.commands.images import Found, find_images, read_names
from nolora_vision.commands.outputs import refuse_inputs, refuse_unwritable, to_stdout, writing
from nolora_vision.commands.predictions import Prediction, as_csv, as_json, as_lines, print_table, printable
from nolora_vision.training.errors import RunError
from nolora_vision.training.record import is_special, write_atomic

GRID_IMAGES = 100


def predict_command(
    source: Annotated[Positional[str], arg(metavar="DIR_OR_ID")],
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES", help_behavior_hint="")] = (),
    /,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    revision: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    amp_dtype: Literal["none", "bfloat16", "float16"] = "none",
    workers: int = min(8, os.cpu_count() or 1),
    csv: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    grid: Annotated[str | None, arg(metavar="PNG", help_behavior_hint="")] = None,
) -> int:
    """Classify images with a saved adapter.

    On a terminal the result is a table; elsewhere a line for each image: path, class, probability, class, probability,
    …, separated by tabs. Exits with 0, with 1 if an image could not be read, with 2 if nothing could be done. Where it
    ends early, what there is of each file is kept as FILE.partial.

    Args:
        source: the adapter: a directory that training wrote, or its id on the Hugging Face Hub.
        images: files, folders (with all images below them), quoted globs; - reads a list of paths on stdin, one a line.
        top_k: how many classes to name for each image.
        batch_size: images that go through the model at once.
        revision: branch, tag or commit, where the source is on the Hub.
        device: where to compute; auto takes a GPU if there is one.
        amp_dtype: type of mixed precision.
        workers: threads that read images.
        csv: also write path, class_1, probability_1, … to this file; - is stdout, instead of the table.
        json: also write predictions and skipped images to this file; - is stdout, instead of the table.
        grid: also draw the first 100 images with their classes into this PNG.
    """
    outputs = {"csv": csv, "json": json, "grid": grid}
    refuse_unusable({"top-k": top_k, "batch-size": batch_size, "workers": workers}, outputs)
    found = find_all(images)
    refuse_inputs(outputs, found.paths)
    outcomes = [Prediction(name, skipped=why) for name, why in found.missing]
    words = predict_with_bar(
        found.paths,
        outcomes,
        outputs=outputs,
        model={"source": source, "device": device, "revision": revision, "amp_dtype": amp_dtype},
        options={"top_k": top_k, "batch_size": batch_size, "amp_dtype": amp_dtype, "workers": workers},
    )
    write_files(outcomes, outputs, title=source)
    if "-" not in outputs.values() and sys.stdout.isatty():
        print_table(outcomes, f"{printable(source)} · {words}", Console(highlight=False))
    return report(outcomes, found.repeated)


def predict_with_bar(
    paths: Sequence[str],
    outcomes: list[Prediction],
    *,
    outputs: Mapping[str, str | None],
    model: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """In words how many images there were in what time; the outcome for each is appended.

    Args:
        outputs: files by flag; what there is for them is kept where this ends early. Without stdout among them each
            outcome is printed, too, but on a terminal.
        model: arguments of `load_model`.
        options: of `predict_images`.
    """
    known, thumbnails = len(outcomes), GRID_IMAGES if outputs["grid"] else 0
    lines = "-" not in outputs.values() and not sys.stdout.isatty()
    with progress_bar(len(paths)) as bar, kept_if_interrupted(outcomes, outputs):
        loaded, device_name = load_model(**model)
        bar.update(bar.task_ids[0], description="predicting")
        started = time.perf_counter()
        for batch in predict_images(loaded, paths, thumbnails=thumbnails, **options):
            if lines:
                print(as_lines(batch), end="", flush=True)
            outcomes += batch
            bar.advance(bar.task_ids[0], len(batch))
        seconds = time.perf_counter() - started
    count = sum(not p.skipped for p in outcomes[known:])
    return f"{count:,} image{'' if count == 1 else 's'} in {seconds:.1f} s on {device_name}"


def refuse_unusable(numbers: Mapping[str, int], outputs: Mapping[str, str | None]) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        RunError: if a number is below 1, or an output cannot be written.
    """
    for name, value in numbers.items():
        if value < 1:
            raise RunError(f"--{name} must be at least 1, got {value}.")
    refuse_unwritable(outputs, pictures="grid")


def find_all(names: Sequence[str]) -> Found:
    """The images that the command line names.

    Raises:
        RunError: if there is none.
    """
    listed: list[str] = []
    for name in names:
        listed += read_names(sys.stdin.buffer) if name == "-" else [name]
    found = find_images(listed)
    if found.paths:
        return found
    if "-" in names and not listed:
        raise RunError("No images: the list on stdin is empty. Write one path a line.")
    if not names:
        raise RunError("No images given. Name files, folders or quoted globs, or - for a list on stdin.")
    missing = "\n".join(f"  {printable(name)}: {why}" for name, why in found.missing[:20])
    raise RunError(f"No images found:\n{missing}")


def write_files(outcomes: Sequence[Prediction], outputs: Mapping[str, str | None], *, title: str) -> None:
    """Write what was asked for: each file whole or not at all.

    Raises:
        RunError: if one cannot be written.
    """
    good = [p for p in outcomes if not p.skipped]
    for name, path in outputs.items():
        if path is None:
            continue
        with writing(name, path):
            if name == "grid":
                write_grid(Path(os.path.realpath(path)), good, title=title)
            elif path == "-":
                to_stdout(_as_text(name, outcomes))
            else:
                write_atomic(Path(path), _as_text(name, outcomes))


def _as_text(name: str, outcomes: Sequence[Prediction]) -> str:
    return as_json(outcomes) if name == "json" else as_csv(outcomes, max([1, *(len(p.classes) for p in outcomes)]))


@contextmanager
def kept_if_interrupted(outcomes: Sequence[Prediction], outputs: Mapping[str, str | None]) -> Iterator[None]:
    """What was predicted until an interruption or an error is not lost: it is written beside each file's place."""
    try:
        yield
    except BaseException:
        if any(not p.skipped for p in outcomes):
            _keep(outcomes, outputs)
        raise


def _keep(outcomes: Sequence[Prediction], outputs: Mapping[str, str | None]) -> None:
    for name in ("csv", "json"):
        path = outputs[name]
        if path is None or path == "-" or is_special(Path(path)):
            continue
        partial = Path(f"{path}.partial")
        with suppress(OSError):
            write_atomic(partial, _as_text(name, outcomes))
            print(f"Kept the first {len(outcomes):,} outcomes in {partial}.", file=sys.stderr)


def report(outcomes: Sequence[Prediction], repeated: int) -> int:
    """Say on stderr what was skipped and why; the exit code."""
    sys.stdout.flush()
    if repeated:
        files = "1 file was" if repeated == 1 else f"{repeated:,} files were"
        print(f"{files} named more than once, and predicted once.", file=sys.stderr)
    skipped = [p for p in outcomes if p.skipped]
    if skipped:
        print(f"Skipped {len(skipped):,} of {len(outcomes):,}:", file=sys.stderr)
        for p in skipped:
            print(f"  {printable(p.path)}: {printable(p.skipped)}", file=sys.stderr)
    return 1 if skipped else 0


def progress_bar(images: int) -> Progress:
    """A bar on stderr, on a terminal only; its one task first says that the model is loaded."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    bar.add_task("loading the model", total=images)
    return bar


def write_grid(path: Path, predictions: Sequence[Prediction], *, title: str) -> None:
    """Draw those that have a thumbnail, and say on stderr how many have not."""
    from nolora_vision.commands.contact_sheet import contact_sheet

    shown = [p for p in predictions if p.thumbnail is not None]
    if not shown:
        print(f"{path} was not written: there is no image to draw.", file=sys.stderr)
        return
    cells = [(p.thumbnail, p.classes[0], p.probabilities[0], Path(p.path).name) for p in shown]
    left_out = len(predictions) - len(shown)
    contact_sheet(path, cells, title=title, left_out=left_out)
    if left_out:
        print(f"{path} shows the first {len(shown)} of {len(predictions):,} images.", file=sys.stderr)
