"""The model card of an adapter directory: what it is, how to use it, how it scored."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_CLASSES = 20
MOST_LETTERS = 80
METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "val": "validation"}
UNITS = {"percent": "%", "seconds": "s", "ms": "ms", "bytes": "bytes"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN_NAME = re.compile(r"[\w.:-]{1,80}")
IN_DIRECTORY = "path/to/this/directory"


def model_card(config: Mapping[str, Any], *, peft_flags: Sequence[str] | None = None) -> str:
    """Markdown with the Hub's metadata, from the fields of `adapter_config.json`.

    Of `metadata` only the dataset's name is shown, and of a local one only the last part of its path.

    Args:
        peft_flags: the directory is in PEFT's format; paths of the attentions whose bypass PEFT's user must cure.
    """
    name, method = full_name(config), method_name(config["adapter"], config.get("method"))
    usage = _usage(config, name) if peft_flags is None else _peft_usage(config, name, peft_flags)
    return "\n".join(
        [
            f"---\n{_hub_metadata(config, name, library='nolora-vision' if peft_flags is None else 'peft')}\n---",
            f"# {method} for {_plain(name)}\n",
            *_facts(config),
            *_results(config["metrics"]),
            *usage,
            "",
        ]
    )


def full_name(config: Mapping[str, Any]) -> str:
    """Architecture and pretrained tag, as timm spells them."""
    return config["architecture"] + (f".{config['pretrained_tag']}" if config["pretrained_tag"] else "")


def method_name(adapter: Mapping[str, Any] | None, method: Mapping[str, Any] | None = None) -> str:
    """What the adapters are, in words: NoLoRA (swish, gate), rank 8."""
    if method is not None:
        return f"Adapters by the method {_plain(str(method.get('name')))}"
    if adapter is None:
        return "Trained weights"
    linear = adapter["nonlinearity"] == "identity" and adapter["modulation"] != "gate"
    name = "LoRA" if linear else f"NoLoRA ({adapter['nonlinearity']}, {adapter['modulation']})"
    return f"{name}, rank {adapter['rank']},"


def _hub_metadata(config: Mapping[str, Any], name: str, *, library: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    dataset, hub_id = _dataset(config["metadata"].get("dataset"))
    top1, results = config["metrics"].get("test_top1_percent"), None
    if dataset is not None and _is_number(top1):
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=hub_id or "imagefolder",
                dataset_name=dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(top1 / 100, 6),
                metric_name="test top-1",
            )
        ]
    base = f"timm/{name}"
    known = bool(config["pretrained_tag"]) and HUB_ID.fullmatch(base) is not None
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        base_model=base if known else None,
        base_model_relation=("finetune" if config["adapter"] is None else "adapter") if known else None,
        datasets=[hub_id] if hub_id else None,
        tags=["timm", "lora" if library == "peft" else "nolora", "adapter"],
        model_name=f"{name} adapter" if results else None,
        eval_results=results,
    )
    return data.to_yaml().strip()


def _dataset(said: object) -> tuple[str | None, str | None]:
    """A dataset's name as it may be shown, and its id if the Hub has it; never the path of a local one."""
    if not isinstance(said, str) or not said.strip():
        return None, None
    if HUB_ID.fullmatch(said) and not Path(said).exists():
        return said, said
    last = re.split(r"[\\/]+", said.rstrip("\\/"))[-1]
    return (last if PLAIN_NAME.fullmatch(last) and last.strip(".") else "local images"), None


def _facts(config: Mapping[str, Any]) -> Iterable[str]:
    images, names, classes = config["preprocessing"], config["class_names"], config["num_classes"]
    if classes is not None:
        yield f"- {classes:,} classes" + (f": {_shorten(names)}" if names else "")
    size = "×".join(str(n) for n in images.get("input_size", ())[1:])
    numbers = [f"{key} {', '.join(f'{n:.4g}' for n in images[key])}" for key in ("mean", "std") if images.get(key)]
    if size:
        yield f"- images of {size} pixels" + (f", normalised by {' and '.join(numbers)}" if numbers else "")
    dataset, hub_id = _dataset(config["metadata"].get("dataset"))
    if dataset is not None:
        shown = f"[{_plain(hub_id)}](https://huggingface.co/datasets/{hub_id})" if hub_id else _plain(dataset)
        yield f"- trained on {shown}"
    yield "- written by " + ", ".join(f"{_plain(key)} {version}" for key, version in config["versions"].items()) + "\n"


def _shorten(names: Sequence[str]) -> str:
    separator = "; " if any("," in name for name in names) else ", "
    shown = separator.join(_plain(name) for name in names[:SHOWN_CLASSES])
    return shown + (f" and {len(names) - SHOWN_CLASSES:,} more" if len(names) > SHOWN_CLASSES else "")


def _plain(text: str) -> str:
    """One line of Markdown that shows this text and does nothing else."""
    line = "".join(" " if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} else c for c in text)
    line = " ".join(line.split())
    if len(line) > MOST_LETTERS:
        line = line[: MOST_LETTERS - 1] + "…"
    return re.sub(r"([\\`*\[\]<>|&#~$!]|(?<!\w)_|_(?!\w))", r"\\\1", line)  # an underscore inside a word is harmless


def _results(metrics: Mapping[str, Any]) -> Iterable[str]:
    rows = {key: value for key, value in metrics.items() if _is_number(value)}
    if not rows:
        return
    yield "| result | value |\n| --- | ---: |"
    for key, value in rows.items():
        yield f"| {_metric_name(key)} | {_shown(value)} |"
    yield ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _metric_name(key: str) -> str:
    """`test_top1_percent` → test top-1 (%), `images_per_s` → images per second."""
    stem, _, unit = key.rpartition("_")
    if key.endswith("_per_s"):
        stem, unit = key.removesuffix("s") + "second", ""
    elif unit not in UNITS or not stem:
        stem, unit = key, ""
    words = " ".join(METRIC_NAMES.get(word, word) for word in stem.split("_"))
    return _plain(words) + (f" ({UNITS[unit]})" if unit else "")


def _usage(config: Mapping[str, Any], name: str) -> Iterable[str]:
    if "method" in config:
        yield f"""```python
import timm
from nolora_vision.methods import load_trained

model = {_create_model(config, name)}
load_trained(model, "{IN_DIRECTORY}")
```"""
        return
    yield f"""```python
import nolora_vision
import torch
from PIL import Image

model = nolora_vision.from_pretrained("{IN_DIRECTORY}")  # or its id on the Hub; ready for evaluation
transform = nolora_vision.eval_transform(model)
image = Image.open("image.jpg").convert("RGB")
with torch.inference_mode():
    logits = model(transform(image).unsqueeze(0))
print(nolora_vision.class_names(model)[int(logits.argmax())])
```

or onto a model that you have:

```python
import nolora_vision
import timm

model = {_create_model(config, name)}
nolora_vision.load_adapter(model, "{IN_DIRECTORY}")
```"""


def _peft_usage(config: Mapping[str, Any], name: str, flags: Sequence[str]) -> Iterable[str]:
    cure = ""
    if flags:
        cure = f"""for path in {json.dumps(list(flags))}:
    model.get_submodule(path).qkv_bias_separate = True  # else timm never calls qkv, and its LoRA has no effect
"""
    yield f"""In PEFT's own format, for PEFT:

```python
import peft
import timm

model = {_create_model(config, name)}
{cure}model = peft.PeftModel.from_pretrained(model, "{IN_DIRECTORY}").eval()
```

or for nolora_vision:

```python
import nolora_vision
import timm

model = {_create_model(config, name)}
nolora_vision.load_adapter(model, "{IN_DIRECTORY}").eval()
```"""


def _create_model(config: Mapping[str, Any], name: str) -> str:
    arguments = [json.dumps(name)] + (["pretrained=True"] if config["pretrained_tag"] else [])
    if config["num_classes"] is not None:
        arguments.append(f"num_classes={config['num_classes']}")
    return f"timm.create_model({', '.join([*arguments, *_own_arguments(config['model_kwargs'])])})"


def _own_arguments(kwargs: Mapping[str, Any]) -> Iterable[str]:
    """Arguments as Python; only numbers and plain names, as others may be paths and are not needed to understand it."""
    for key, value in kwargs.items():
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        plain = all(isinstance(item, (bool, int, float)) or PLAIN_NAME.fullmatch(str(item)) for item in items)
        if key.isidentifier() and plain:
            yield f"{key}={tuple(value) if isinstance(value, list) else value!r}"
