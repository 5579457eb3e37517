"""From paths to predictions: the adapted model on a device, and images read ahead of it by threads."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from nolora_vision.commands.predictions import Prediction
from nolora_vision.training.errors import RunError
from nolora_vision.training.images import UnreadableImageError, read_image

if TYPE_CHECKING:
    import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

THUMBNAIL_PIXELS = 256


def load_model(
    source: str, *, revision: str | None = None, device: str = "auto", amp_dtype: str = "none"
) -> tuple[torch.nn.Module, str]:
    """The adapted model, folded, on the device; and the device's name.

    Raises:
        RunError: if the device is not there or cannot compute in that type, or the model has no classes.
        CheckpointError: if the adapter cannot be loaded.
    """
    import torch

    from nolora_vision import class_names, fold, from_pretrained
    from nolora_vision.surgery.inject import is_injected

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind]) if device == "auto" else device
    if not there[name]:
        usable = ", ".join(kind for kind, usable in there.items() if usable)
        raise RunError(f"--device {name}: this PyTorch finds none. Usable here: {usable}.")
    if name == "cpu" and amp_dtype == "float16":
        raise RunError("--amp-dtype float16 needs a GPU. Use bfloat16, which also runs on this processor, or none.")
    model = from_pretrained(source, revision=revision, device=name)
    if not class_names(model):
        raise RunError(f"{source} has no classes: its model has no classifier, so it gives features.")
    return fold(model) if is_injected(model) else model, name


def predict_images(
    model: torch.nn.Module,
    paths: Sequence[str],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    amp_dtype: str = "none",
    workers: int = 1,
    thumbnails: int = 0,
) -> Iterator[list[Prediction]]:
    """Predictions in the order of the paths, a batch at a time; what cannot be read is there as skipped.

    Args:
        model: of `from_pretrained`, which knows its transform and class names.
        thumbnails: so many images, the first ones, come with a small picture.

    Raises:
        RunError: if the device's memory is too small for a batch, or outputs are not finite.
    """
    from nolora_vision import class_names, eval_transform

    transform, names = eval_transform(model), class_names(model)

    def read(job: tuple[int, str]) -> tuple[Prediction, Any]:
        index, path = job
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            return Prediction(path, skipped=str(error)), None
        return Prediction(path, thumbnail=_thumbnail(image) if index < thumbnails else None), transform(image)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; what is unreadable is named in any case
        pairs = read_ahead(enumerate(paths), read, workers=workers, ahead=batch_size + 2 * workers)
        for start in range(0, len(paths), batch_size):
            batch = [next(pairs) for _ in paths[start : start + batch_size]]
            tensors = [x for _, x in batch if x is not None]
            rows = iter(_classify(model, tensors, top_k=top_k, amp_dtype=amp_dtype) if tensors else ())
            yield [p if p.skipped else _with_classes(p, *next(rows), names) for p, _ in batch]


def read_ahead(jobs: Iterable[Job], work: Callable[[Job], Result], *, workers: int, ahead: int) -> Iterator[Result]:
    """Results in the order of the jobs, made in threads, at most `ahead` of them before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _thumbnail(image: Any) -> Any:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return small


def _classify(
    model: torch.nn.Module, tensors: Sequence[torch.Tensor], *, top_k: int, amp_dtype: str
) -> list[tuple[list[int], list[float]]]:
    """Indices and probabilities of the top_k classes of each image, of all classes if there are fewer."""
    import torch

    device = next(model.parameters()).device
    dtype = None if amp_dtype == "none" else getattr(torch, amp_dtype)
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(torch.stack(list(tensors)).to(device))
        shares, indices = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{len(tensors)} images at once need more memory than the GPU has. Lower --batch-size."
        ) from error
    if not shares.isfinite().all():
        raise RunError("The model's outputs are not finite numbers. Try --amp-dtype bfloat16 or none.")
    return list(zip(indices.tolist(), shares.tolist(), strict=True))


def _with_classes(p: Prediction, indices: list[int], shares: list[float], names: Sequence[str]) -> Prediction:
    return replace(p, classes=tuple(names[i] for i in indices), indices=tuple(indices), probabilities=tuple(shares))
