"""summary: what a saved adapter is and what training did to it, layer by layer, for `nolora-vision summary`."""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from nolora_vision.adapters.anatomy import Anatomy, anatomy, as_plain
from nolora_vision.adapters.card import full_name, method_name
from nolora_vision.adapters.hub import find_adapter
from nolora_vision.commands.adapter_table import print_updates
from nolora_vision.commands.outputs import refuse_unwritable, to_stdout, writing
from nolora_vision.commands.predictions import printable, valid_unicode
from nolora_vision.training.errors import RunError
from nolora_vision.training.record import write_atomic

MANY_CLASSES = 12


def summary_command(
    source: Annotated[Positional[str], arg(metavar="DIR_OR_ID")],
    /,
    *,
    by: Literal["layer", "role", "block"] = "layer",
    revision: str | None = None,
    picture: Annotated[str | None, arg(metavar="PNG", help_behavior_hint="")] = None,
    csv: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Show what a saved adapter is, and what training did to it: needs neither the backbone nor images.

    Args:
        source: the adapter: a directory that training wrote, or its id on the Hugging Face Hub.
        by: a row of the table for each layer (or part of it), or for all of a role or of a block together.
        revision: branch, tag or commit on the Hub.
        picture: also draw updates, v, gates and the learned f into this PNG.
        csv: also write a line for each layer to this file; - is stdout, instead of the table.
        json: also write everything to this file, the values of v and θ included; - is stdout, instead of the table.
    """
    outputs = {"csv": csv, "json": json, "picture": picture}
    refuse_unwritable(outputs, pictures="picture")
    directory = find_adapter(source, revision=revision)
    found, console = anatomy(directory), Console(highlight=False)
    facts = header(found, directory)
    if "-" not in (csv, json):
        show(found, facts, console, title=source, by=by)
    for name, path in outputs.items():
        if path is None:
            continue
        with writing(name, path):
            if name == "picture":
                _draw(found, Path(path), title=f"{facts['method']} · {facts['model']}")
                continue
            text = valid_unicode(as_csv(found) if name == "csv" else as_json(found, facts))
            to_stdout(text) if path == "-" else write_atomic(Path(path), text)


def header(found: Anatomy, directory: Path) -> dict[str, str]:
    """What the adapter is, in words, by name."""
    config = found.config
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    images = config["preprocessing"].get("input_size")
    metrics = [f"{name} {value:,.6g}" for name, value in config["metrics"].items() if isinstance(value, (int, float))]
    updates = f"{found.adapter_parameters:,} in {len(found.rows)} updates, " if found.rows else ""
    facts = {
        "method": method_name(config["adapter"], config.get("method")).rstrip(","),
        "model": full_name(config),
        "classes": _classes(config),
        "images": "" if not isinstance(images, (list, tuple)) else " × ".join(map(str, images[1:])) + " pixels",
        "dataset": str(config["metadata"].get("dataset") or ""),
        "metrics": ", ".join(metrics),
        "parameters": f"{updates}{found.other_parameters:,} in the head and elsewhere",
        "size": f"{size:,} bytes on disk",
        "written by": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
    }
    return {name: printable(text) for name, text in facts.items() if text}


def show(found: Anatomy, facts: Mapping[str, str], console: Console, *, title: str, by: str = "layer") -> None:
    """Print facts, table, the profile of each role over the blocks, and what the columns mean."""
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    names = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        names.add_row(Text(name, style="dim"), Text(text))
    console.print(names)
    if not found.rows:
        console.print(Text(nothing_to_show(found)), soft_wrap=False)
        return
    print_updates(found.rows, console, by=by)


def nothing_to_show(found: Anatomy) -> str:
    """Why there are no updates: a method with layers of its own, a head alone, or all weights trained."""
    if method := found.config.get("method"):
        return f"No adapters of ours: {method['name']} was trained, whose updates are not laid out here."
    if found.config["backbone"]:
        return "No adapters: only the head (and what else is named above) was trained, so there is no update to show."
    return (
        "No adapters: every weight was trained and is in the file. What training did to them can't be told without the "
        "pretrained weights, so there is no update to show."
    )


def as_csv(found: Anatomy) -> str:
    """A header, and a line for each update; of v, slopes and gate the mean, smallest and largest."""
    plain = [_flat(row) for row in as_plain(found.rows)]
    text = io.StringIO()
    writer = csv_module.DictWriter(
        text, list(dict.fromkeys(name for row in plain for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


def as_json(found: Anatomy, facts: Mapping[str, str]) -> str:
    """Facts in words, the config as saved, and every figure of every update."""
    content = {"summary": facts, "config": found.config, "adapters": as_plain(found.rows)}
    return json_module.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {name: value for name, value in row.items() if not isinstance(value, (list, dict))}
    for name in ("v", "slopes", "gate_open"):
        values = row[name] if row[name] and None not in row[name] else None
        for what, function in (("mean", _mean), ("min", min), ("max", max)):
            flat[f"{name}_{what}"] = function(values) if values else None
    return {name: value for name, value in flat.items() if name not in ("v", "slopes", "gate_open")}


def _draw(found: Anatomy, path: Path, *, title: str) -> None:
    if not found.rows:
        raise RunError(f"--picture {path} was not drawn. {nothing_to_show(found)}")
    from nolora_vision.commands.adapter_picture import adapter_picture

    adapter_picture(path, found.rows, title=title)


def _classes(config: Mapping[str, Any]) -> str:
    names = config["class_names"] or []
    shown = ", ".join(names[:MANY_CLASSES]) + (f" and {len(names) - MANY_CLASSES} more" if names[MANY_CLASSES:] else "")
    return "" if config["num_classes"] is None else f"{config['num_classes']}" + (f": {shown}" if names else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
