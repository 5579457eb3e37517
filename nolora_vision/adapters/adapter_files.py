"""The files of an adapter directory: written whole or not at all, read only if they are what they say."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nolora_vision.adapters.whole_directory import whole_directory, write_directory

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_MAGIC = (b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
MOST_CONFIG_BYTES = 16 * 2**20  # class names of ImageNet-21k take 0.5 MB


class CheckpointError(ValueError):
    """An adapter that cannot be read, or does not belong to this model; the model is unchanged."""


class AdapterNotFoundError(CheckpointError):
    """There is no adapter, or not all of its files, where one was looked for."""


class CorruptAdapterError(CheckpointError):
    """The files are not what an adapter's files are: damaged, truncated, of another kind, or altered."""


class AdapterVersionError(CheckpointError):
    """The directory was written in a newer format."""


class AdapterMismatchError(CheckpointError):
    """A sound adapter, but of another model than this one."""


# The type of each field of adapter_config.json; None is allowed where the tuple names it.
_TEXT, _NUMBER = (str,), (int, float)
FIELDS: Mapping[str, tuple[type, ...]] = {
    "format_version": (int,),
    "adapter": (dict, type(None)),
    "architecture": _TEXT,
    "pretrained_tag": _TEXT,
    "num_classes": (int, type(None)),
    "class_names": (list, type(None)),
    "preprocessing": (dict,),
    "model_kwargs": (dict,),
    "backbone": (dict,),
    "metrics": (dict,),
    "metadata": (dict,),
    "versions": (dict,),
    "tensors": (int,),
    "dtype": _TEXT,
    "weights_sha256": _TEXT,
}
OPTIONAL_FIELDS: Mapping[str, tuple[type, ...]] = {"sha256": _TEXT, "method": (dict,)}
"""`method`: adapters that `inject` does not make: name, adapter and options, see `nolora_vision.methods`."""


def write_adapter_files(
    directory: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], card: str
) -> Path:
    """Write the three files in one step, see `write_adapter_directory`.

    Args:
        config: the fields of `adapter_config.json` but for the checksums.
        state: tensors on the CPU, contiguous, by name.
        card: text of the README.

    Raises:
        CheckpointError: if the directory has files by these names that are no adapter's; nothing is written.
    """
    from safetensors.torch import save

    weights = save(dict(state), metadata={"format": "pt"})
    config = {**config, "tensors": len(state), "weights_sha256": hashlib.sha256(weights).hexdigest()}
    text = json.dumps({**config, "sha256": config_digest(config)}, indent=2, ensure_ascii=False, allow_nan=False)
    return write_adapter_directory(
        directory, {WEIGHTS_FILE: weights, CONFIG_FILE: f"{text}\n".encode(), CARD_FILE: card.encode()}
    )


def write_adapter_directory(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write an adapter's files; killed at any moment, the old or the new ones are there whole. Other files stay.

    Raises:
        CheckpointError: if the directory has files by these names that are no adapter's; nothing is written.
    """
    there = whole_directory(directory)
    taken = [] if os.path.lexists(there / CONFIG_FILE) else [name for name in files if os.path.lexists(there / name)]
    if taken:
        raise CheckpointError(
            f"{directory} has a {taken[0]} but no {CONFIG_FILE}, so it is no adapter's directory, and that file would "
            f"be overwritten. Choose a new directory, such as {str(Path(directory) / 'adapter')!r}."
        )
    return write_directory(directory, files)


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`, every field of the right type.

    Raises:
        AdapterNotFoundError: if it is absent.
        CorruptAdapterError: if it is not the JSON of an adapter, or was altered.
        AdapterVersionError: if it is of a newer format.
    """
    path = whole_directory(directory) / CONFIG_FILE
    config = read_json(path)
    version = config.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise AdapterVersionError(
            f"{path} has format version {version}, this nolora_vision reads {FORMAT_VERSION}. Upgrade nolora-vision."
        )
    problems = [*_type_problems(config), *_value_problems(config)]
    if problems:
        raise CorruptAdapterError(f"{path} is not an adapter config:\n" + "\n".join(f"  - {p}" for p in problems))
    if "sha256" in config and config["sha256"] != config_digest(config):
        raise CorruptAdapterError(
            f"{path} does not have the checksum that it states: it was damaged or edited. Copy it again; to keep an "
            f"edit, delete its line with 'sha256'."
        )
    return config


def read_adapter_files(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a directory, each file checked against the checksum that the config states.

    Raises:
        CheckpointError: as `read_adapter_config`, and for the weights likewise.
    """
    config = read_adapter_config(directory)
    path = whole_directory(directory) / WEIGHTS_FILE
    content = read_weight_bytes(path)
    if hashlib.sha256(content).hexdigest() != config["weights_sha256"]:
        state = parse_weights(path, content)  # says what is wrong, if it is not even a safetensors file
        raise CorruptAdapterError(
            f"{path} does not have the checksum that {CONFIG_FILE} states ({len(state)} tensors, "
            f"{config['tensors']} according to {CONFIG_FILE}): it was damaged or is of another save. Copy it again."
        )
    state = parse_weights(path, content)
    if len(state) != config["tensors"]:
        raise CorruptAdapterError(
            f"{len(state)} tensors in {path}, {config['tensors']} according to {CONFIG_FILE}. Copy it again."
        )
    return config, state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: if there is none.
    """
    wanted = "Wanted a directory written by nolora_vision.save_adapter."
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise CorruptAdapterError(f"{path} has {path.stat().st_size:,} bytes, more than any adapter config.")
        config = json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError) as error:
        inner = path.parent / "adapter"  # where train.py puts it, in the folder of a run
        hint = f" Did you mean {inner}?" if (inner / path.name).is_file() else ""
        raise AdapterNotFoundError(f"{path} does not exist. {wanted}{hint}") from error
    except OSError as error:
        raise AdapterNotFoundError(f"{path} cannot be read ({error.strerror}). {wanted}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(f"{path} is not an adapter config ({type(error).__name__}: {error}).") from error
    if not isinstance(config, dict):
        raise CorruptAdapterError(f"{path} is not an adapter config (a {type(config).__name__}, not an object).")
    return config


def read_weight_bytes(path: Path) -> bytes:
    """The bytes of a weight file.

    Raises:
        AdapterNotFoundError: if there is none, saying so if there is a pickle, which is never loaded.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in PICKLES)
        if pickles:
            raise AdapterNotFoundError(
                f"{path} does not exist, and {pickles[0]} is a pickle, which can run any code and is never loaded. "
                f"Convert it with safetensors.torch.save_file where you trust it."
            ) from error
        raise AdapterNotFoundError(
            f"{path} does not exist. Wanted a directory written by nolora_vision.save_adapter."
        ) from error


def parse_weights(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes.

    Raises:
        CorruptAdapterError: if they are not such a file's, or a pickle's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        if content[:2] in PICKLE_MAGIC:  # not before: the length of a sound header can begin so too
            raise CorruptAdapterError(
                f"{path} is a pickle by its first bytes, which can run any code: it is not loaded."
            ) from error
        raise CorruptAdapterError(f"{path} is not a whole safetensors file ({error}).") from error


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the fields, whatever their order and layout in the file; `sha256` itself apart."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _type_problems(config: Mapping[str, Any]) -> Iterable[str]:
    for name, kinds in {**FIELDS, **OPTIONAL_FIELDS}.items():
        if name not in config:
            if name in FIELDS:
                yield f"{name} is missing"
        elif not isinstance(config[name], kinds) or isinstance(config[name], bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            yield f"{name} must be {wanted}, got {str(config[name])[:80]!r}"
    for name in config.keys() - FIELDS.keys() - OPTIONAL_FIELDS.keys():
        yield f"{name!r} is not a field"


def _value_problems(config: Mapping[str, Any]) -> Iterable[str]:
    def is_number(value: object) -> bool:
        return isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)

    version, names, classes = (config.get(key) for key in ("format_version", "class_names", "num_classes"))
    if isinstance(version, int) and version < 1:
        yield f"format_version must be at least 1, got {version}"
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        yield "class_names must be strings"
    elif isinstance(names, list) and isinstance(classes, int) and len(names) != classes:
        yield f"{len(names)} class_names for {classes} classes"
    backbone = config.get("backbone")
    for name, numbers in backbone.items() if isinstance(backbone, dict) else ():
        if not isinstance(numbers, list) or not all(map(is_number, numbers)):
            yield f"backbone[{name!r}] must be a list of numbers"
    sha = config.get("weights_sha256")
    if isinstance(sha, str) and not re.fullmatch("[0-9a-f]{64}", sha):
        yield f"weights_sha256 must be 64 hexadecimal digits, got {sha[:80]!r}"
