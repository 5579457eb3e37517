"""The table at the end of a run, and what can be done with what it left."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nolora_vision.adapters.backbone_weights import weights_of_file
from nolora_vision.methods.catalogue import METHODS
from nolora_vision.training.config_file import as_plain
from nolora_vision.training.outputs import NOT_FINITE
from nolora_vision.training.progress import print_table
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.timm_names import is_elsewhere

SELF_CONTAINED = ("ours", "selective", "whole")
"""Groups of methods whose adapters `nolora-vision` loads by itself."""
TEST_FIELDS = (
    *("dataset", "splits", "test_split", "max_eval_samples", "vtab_root", "image_key", "label_key", "revision"),
    *("on_bad_image", "amp_dtype"),
)
"""Fields of RunConfig that a test of the adapter must be told again; the rest lies in the adapter."""


def show(record: Mapping[str, Any], folder: Path) -> None:
    """The table at the end, and where things are."""
    metrics, parameters = record["metrics"], record["parameters"]
    rows = [
        ("test top-1", f"{metrics['test_top1_percent']:.2f} %"),
        *([("test top-5", f"{metrics['test_top5_percent']:.2f} %")] if record["dataset"]["num_classes"] > 5 else []),
        ("validation top-1", _validation(record)),
        ("trainable parameters", f"{parameters['trainable_without_head']:,} + head {parameters['head']:,}"),
        ("time", f"{metrics['total_seconds']:.0f} s, of it training {metrics['train_seconds']:.0f} s"),
        ("training speed", f"{metrics['train_images_per_s']:.0f} images/s"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB ({metrics['peak_memory_of']})"),
    ]
    if metrics["test_loss"] is None:
        print(f"warning: {NOT_FINITE}", file=sys.stderr)
    print_table(f"{record['method']} · {record['model']} · {record['dataset']['id']}", rows)
    print(f"{folder}: {', '.join(sorted(p.name + '/' * p.is_dir() for p in folder.iterdir()))}")
    if not record["config"]["pretrained"] and record["method"] != "full":
        print("Its frozen weights are random and in no file: it is of use with the model of this process alone.")
        return
    print(f"Use it: {_use(record, folder / 'adapter')}")
    print(f"Test it again: python train.py --eval-only --adapter {folder / 'adapter'} {_same_images(record['config'])}")


def _use(record: Mapping[str, Any], adapter: Path) -> str:
    """The command, or in Python where the layers of another method or a model that is not timm's are needed first."""
    config, path = record["config"], record["config"]["pretrained_path"]
    if METHODS[record["method"]].group in SELF_CONTAINED and not is_elsewhere(config["model"]):
        return f"nolora-vision predict {adapter} IMAGES…"
    arguments = {
        "pretrained": True,
        "num_classes": record["dataset"]["num_classes"],
        **({} if config["img_size"] is None else {"img_size": config["img_size"]}),
        **config["model_kwargs"],
        **({"pretrained_cfg_overlay": weights_of_file(path)} if path else {}),
    }
    model = f"timm.create_model({config['model']!r}, {', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    return f"nolora_vision.methods.load_trained({model}, {str(adapter)!r})"


def _validation(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    if "val_top1_percent" not in metrics:
        return "none: these images were trained on"
    return f"{metrics['val_top1_percent']:.2f} % (epoch {metrics['best_epoch']}, the one tested)"


def _same_images(config: Mapping[str, Any]) -> str:
    """The flags that choose the images of the test, and how they are looked at and computed."""
    usual = as_plain(asdict(RunConfig()))
    told = ("model", *TEST_FIELDS) if is_elsewhere(config["model"]) else TEST_FIELDS
    given = {name: config[name] for name in told if name == "dataset" or config[name] != usual[name]}
    return " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items())
