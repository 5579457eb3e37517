"""Which run `--resume` goes on with, and whether the config is still the one that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nolora_vision.config import ConfigError
from nolora_vision.training.checkpoints import has_checkpoint
from nolora_vision.training.config_file import as_plain, dump_run_config, load_run_config
from nolora_vision.training.errors import RunError
from nolora_vision.training.neutral import NEUTRAL
from nolora_vision.training.record import write_atomic
from nolora_vision.training.run_config import RunConfig

ARGS, RECORD, CHANGES = "args.yaml", "record.json", "changes.txt"


def folder_to_resume(config: RunConfig) -> Path | None:
    """The folder of the run to go on with; None: there is none, so a new one starts.

    Raises:
        RunError: if the folder that was named is none of a run, or is of one with another config.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        return _named(Path(config.resume), config)
    if config.experiment is not None:
        folder = config.output / config.experiment
        return _named(folder, config) if (folder / ARGS).is_file() else None
    folders = [path.parent for path in config.output.glob(f"*/{ARGS}")]
    for folder in sorted(folders, key=lambda f: (f / ARGS).stat().st_mtime, reverse=True):
        if not (folder / RECORD).exists() and has_checkpoint(folder) and not _differences(folder, config):
            return folder
    return None


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run that is done, which is said; None if it is not."""
    if not (folder / RECORD).exists():
        return None
    print(f"{folder} is done already; its {RECORD} says how it went.")
    return {**json.loads((folder / RECORD).read_text(encoding="utf-8")), "folder": str(folder)}


def adopt_changes(folder: Path, config: RunConfig) -> list[str]:
    """Let the run go on with this config from now on, if it was begun with another one.

    Returns:
        A line for each field that was changed in this way, ever.
    """
    said = folder / CHANGES
    lines = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
    if now := _differences(folder, config):
        lines += now
        write_atomic(said, "".join(f"{line}\n" for line in lines))
        write_atomic(folder / ARGS, dump_run_config(replace(config, resume=None, resume_changed=False)))
    return lines


def _named(folder: Path, config: RunConfig) -> Path:
    if not (folder / ARGS).is_file():
        raise RunError(f"--resume {folder}: no folder of a run, which holds {ARGS}. Give auto or a run's own folder.")
    differences = _differences(folder, config)
    if differences and not config.resume_changed:
        raise RunError(
            f"{folder} was begun with another config:\n  "
            + "\n  ".join(differences)
            + "\nGive the same values, or --resume-changed to go on with the new ones."
        )
    return folder


def _differences(folder: Path, config: RunConfig) -> list[str]:
    """A line for each field that decides about results and is another one now."""
    try:
        then = load_run_config(folder / ARGS).resolved()
    except ConfigError as error:
        return [f"its {ARGS} cannot be read any more: {error}"]
    before, now = (_flat(as_plain(asdict(c))) for c in (then, config.resolved()))
    changed = [name for name in now if name.split(".")[0] not in NEUTRAL and before.get(name) != now[name]]
    return [f"{name}: {before.get(name)} then, {now[name]} now" for name in changed]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    adapter = {f"adapter.{name}": value for name, value in values["adapter"].items()}
    return {**{name: value for name, value in values.items() if name != "adapter"}, **adapter}
