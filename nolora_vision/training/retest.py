"""A saved adapter on a test split, on the model and at the image size that it was trained with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nolora_vision import read_adapter_config
from nolora_vision.adapters.hub import find_adapter
from nolora_vision.methods import load_trained
from nolora_vision.training.backbone import full_name, set_compute
from nolora_vision.training.engine import evaluate, make_accelerator
from nolora_vision.training.errors import RunError
from nolora_vision.training.ingredients import (
    build_config_model,
    compute_options,
    load_config_data,
    loader,
    preprocessing,
)
from nolora_vision.training.processes import on_main_process
from nolora_vision.training.progress import print_table
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.splits import Split

MOST_NAMES = 5
"""Class names that a message shows."""


def run_eval_only(config: RunConfig) -> dict[str, Any]:
    """Score a saved adapter on the test split of a dataset, and say which images that is.

    Raises:
        RunError: if its backbone is lost, or it knows another number of classes than the dataset has.
    """
    assert config.adapter_dir is not None
    directory = find_adapter(config.adapter_dir if config.adapter_dir.exists() else str(config.adapter_dir))
    saved = read_adapter_config(directory)
    data = load_config_data(replace(config, check_shared="never"))  # nothing is trained on
    if saved["num_classes"] != len(data.class_names):
        known, got, its_own = saved["num_classes"], len(data.class_names), saved["metadata"].get("dataset")
        trained = f" It was trained on {its_own}." if its_own else ""
        raise RunError(
            f"The adapter knows {known} classes, {config.dataset} has {got}.{trained} Choose a --dataset that fits."
        )
    _refuse_lost_backbone(saved)
    test, complaint = numbered_as(data.test, saved["class_names"])
    if complaint is not None and on_main_process():
        print(f"warning: {complaint}", file=sys.stderr)
    config = config.for_adapter(saved)
    model = load_trained(build_config_model(config, saved["num_classes"]), directory)
    accelerator = make_accelerator(config.amp_dtype)
    set_compute(model, accelerator.device.type, **compute_options(config))
    images = preprocessing(config, model, saved["preprocessing"])
    batches = loader(config, images, test, training=False)
    scores = evaluate(*accelerator.prepare(model, batches), accelerator=accelerator)
    name = full_name(model, pretrained=config.pretrained, pretrained_path=config.pretrained_path)
    rows = [
        ("test top-1", f"{scores.top1_percent:.2f} %"),
        ("test top-5", f"{scores.top5_percent:.2f} %"),
        ("images", f"{len(test):,} in {scores.seconds:.0f} s"),
        ("which are", data.about["splits"]["test"]),
    ]
    if on_main_process():
        print_table(f"{name} · {config.dataset}", rows)
    return {"model": name, "test_top1_percent": scores.top1_percent, "dataset": dict(data.about)}


def numbered_as(split: Split, names: Sequence[str] | None) -> tuple[Split, str | None]:
    """The split with the numbers that an adapter gives to its classes, and a complaint where the names say nothing.

    Args:
        names: the adapter's, as many as the split has; None: it knows none.
    """
    own = split.table.class_names
    if names is None or tuple(names) == own:
        return split, None
    if sorted(names) != sorted(own):
        here, there = (", ".join(some[:MOST_NAMES]) + ", …" * (len(some) > MOST_NAMES) for some in (own, names))
        complaint = f"the adapter's classes are called {there}; the images' {here}. They are compared by their numbers."
        return split, complaint
    numbers = [list(names).index(name) for name in own]
    return replace(split, table=replace(split.table, labels=[numbers[label] for label in split.table.labels])), None


def _refuse_lost_backbone(saved: Mapping[str, Any]) -> None:
    """An adapter is only worth something on the frozen weights that it was trained on."""
    facts = saved["metadata"]
    if not facts.get("pretrained", True) and facts.get("method") != "full":
        raise RunError(
            "This adapter was trained on a frozen backbone of random weights (--no-pretrained), which no file holds, "
            "so it cannot be tested again."
        )
