"""A model as one file for other runtimes: ONNX, torch.export, AOTInductor; checked against eager before it is there."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nolora_vision.adapters.description import describe
from nolora_vision.adapters.export_graph import (
    BATCHES,
    ExportError,
    ExportGraph,
    eager_outputs,
    fold_where_possible,
    image_size,
    plain_copy,
    probe_images,
    refuse_difference,
)
from nolora_vision.adapters.pretrained import class_names, preprocessing_of
from nolora_vision.config import did_you_mean
from nolora_vision.surgery.wrappers import bare_model

MOST_ONNX_BYTES = 2**31 - 2**24
"""Weights that fit into one ONNX file (a protobuf holds 2 GiB), with 16 MiB left for the graph."""
METADATA_FILE = "nolora_vision.json"
TEXTS = ("architecture", "pretrained_tag", "nolora_vision")
METADATA = (*TEXTS, "adapter", "class_names", "preprocessing", "normalizes", "versions")
"""Metadata by name: strings as they are, the others as JSON, because ONNX and AOTInductor keep strings only."""

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how far it is from eager."""

    path: Path
    format: str
    file_bytes: int
    max_abs_difference: Mapping[str, float]
    """Largest difference from eager's outputs, by the runtime that ran the written file."""
    largest_output: float
    """Largest absolute output of eager on the same images."""
    batches: tuple[int, ...]
    """Batch sizes that were compared."""
    input_size: tuple[int, int, int]
    """Channels, height and width of the images that the file takes."""


class _Format(NamedTuple):
    suffix: str
    runtime: str
    refuse_unusable: Callable[[nn.Module], None]
    write: Callable[[torch.export.ExportedProgram, Path, Mapping[str, str]], None]
    open: Callable[[Path], Runner]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: Literal["onnx", "torch", "aoti"] = "onnx",
    normalize: bool = False,
    input_size: int | tuple[int, int, int] | None = None,
) -> ExportReport:
    """Write a model, its adapters in the graph, as one file: images (B, C, H, W) → logits, for any B, in fp32.

    A copy is exported, in evaluation mode, on the CPU: v and s are folded into B, and a linear update into W. The file
    is written aside, opened again and compared with eager; only if it agrees does it appear under its name, replacing
    what is there. It carries metadata: `read_export_metadata`. The model stays as it is; it may be compiled or
    data-parallel, and need not have adapters.

    Args:
        path: ends in .onnx for ONNX, in .pt2 for the others.
        format: `onnx`; `torch` is what `torch.export.load` reads; `aoti` is compiled by AOTInductor for this
            processor, for `torch._inductor.aoti_load_package`.
        normalize: the graph takes images in [0, 1] and does (x − mean) / std itself.
        input_size: (C, H, W), or the side of a square RGB image; None takes the model's own.

    Raises:
        ExportError: if it cannot be exported so, or the file differs from eager by more than 1e-4 of eager's largest
            output. What was at `path` is as before.
    """
    target, kind = check_target(path, format), FORMATS[format]
    bare = bare_model(model)
    kind.refuse_unusable(bare)
    preprocessing = {**preprocessing_of(bare), "input_size": image_size(bare, input_size)}
    metadata = _metadata(bare, preprocessing, normalize)
    graph = ExportGraph(plain_copy(bare), preprocessing, normalize).eval()
    feeds = probe_images(preprocessing, normalize)
    expected = eager_outputs(graph, feeds)
    fold_where_possible(graph.model)
    with _folder_beside(target) as folder, _quiet():
        scratch = Path(folder) / target.name
        _step(f"The {format} export", lambda: kind.write(_trace(graph, feeds[1]), scratch, metadata))
        got = _step(f"{kind.runtime} on the exported file", lambda: _outputs(kind, scratch, feeds))
        difference, largest = refuse_difference(kind.runtime, got, expected)
        os.replace(scratch, target)
    size = preprocessing["input_size"]
    return ExportReport(target, format, target.stat().st_size, {kind.runtime: difference}, largest, BATCHES, size)


def _folder_beside(target: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}.") from error


def check_target(path: str | Path, format: str) -> Path:
    """The absolute path of a file that `export` can write in this format.

    Raises:
        ExportError: if there is no such format, or it has another suffix, or the folder does not exist.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.{did_you_mean(format, FORMATS)}")
    target, suffix = Path(path).absolute(), FORMATS[format].suffix
    if target.suffix != suffix:
        fitting = [repr(name) for name, kind in FORMATS.items() if kind.suffix == target.suffix]
        other = f", or choose format {' or '.join(fitting)}" if fitting else ""
        raise ExportError(f"Format {format!r} writes {suffix} files, got {path}. Let its name end in {suffix}{other}.")
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else "would lie in a folder that does not exist"
        raise ExportError(f"{path} {problem}. Name a file in a folder that exists.")
    if not os.access(target.parent, os.W_OK):
        raise ExportError(f"{path}: the folder {target.parent} cannot be written to. Choose another.")
    return target


def read_export_metadata(path: str | Path) -> dict[str, Any]:
    """What `export` wrote into a file of any format about it; nothing in the file is run.

    `architecture`, `pretrained_tag`, `adapter` (the fields of its AdapterConfig, or None), `class_names`,
    `preprocessing` (input_size, mean, std, interpolation, …), `normalizes` (whether the graph takes images in [0, 1]),
    `nolora_vision` and `versions`.

    Raises:
        ExportError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} is no file. Wanted one that nolora_vision.export wrote.")
    try:
        raw = _zip_metadata(path) if zipfile.is_zipfile(path) else _onnx_metadata(path)
        return {name: raw[name] if name in TEXTS else json.loads(raw[name]) for name in METADATA}
    except ExportError:
        raise
    except Exception as error:  # the readers of three formats raise many kinds
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise ExportError(f"{path} was not written by nolora_vision.export, or is damaged ({reason}).") from error


def _metadata(model: nn.Module, preprocessing: Mapping[str, Any], normalize: bool) -> dict[str, str]:
    facts = describe(model, preprocessing=preprocessing)
    facts |= {"class_names": class_names(model), "normalizes": normalize}
    facts["nolora_vision"] = facts["versions"]["nolora_vision"]
    return {name: facts[name] if name in TEXTS else json.dumps(facts[name]) for name in METADATA}


def _trace(graph: ExportGraph, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(graph, (images,), dynamic_shapes=({0: batch},), strict=False)


# ------------------------------------------------------------------------------------------------------- the check


def _outputs(kind: _Format, path: Path, feeds: Sequence[Tensor]) -> list[Tensor]:
    run = kind.open(path)
    with torch.no_grad():
        return [run(x) for x in feeds]


def _step(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ExportError:
        raise
    except Exception as error:  # tracers, compilers and runtimes raise any kind
        reason = f"{type(error).__name__}: {error}".strip()[:500]
        raise ExportError(f"{what} failed: {reason}\nTry another format, or newer versions.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves, which a user can do nothing about."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# ----------------------------------------------------------------------------------------------------- the formats


def _refuse_unusable_onnx(model: nn.Module) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'nolora-vision[export]'.")
    size = 4 * sum(t.numel() for t in model.state_dict().values())
    if size > MOST_ONNX_BYTES:
        raise ExportError(f"{size:,} bytes of weights do not fit into one ONNX file of 2 GiB. Use format='torch'.")


def _write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    shapes = ({0: "batch"},)  # the program knows that it is dynamic; this names it in the file
    written = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
    assert written is not None
    written.model.metadata_props.update(metadata)
    written.save(path, external_data=False)


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _onnx_metadata(path: Path) -> dict[str, str]:
    if importlib.util.find_spec("onnx") is None:
        raise ExportError("Reading an ONNX file needs onnx: pip install 'nolora-vision[export]'.")
    import onnx

    return {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}


def _write_torch(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    program.example_inputs = None  # images would only make the file larger
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def _refuse_unusable_aoti(model: nn.Module) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(
            "AOTInductor needs a C++ compiler and finds none. Install g++ or clang++, or name one in the environment "
            "variable CXX; format='torch' and 'onnx' need none."
        ) from error


def _write_aoti(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package

    configs = {"aot_inductor.metadata": dict(metadata)}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def _open_aoti(path: Path) -> Runner:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _zip_metadata(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        wanted = (f"/extra/{METADATA_FILE}", ".wrapper_metadata.json")
        name = next(name for name in archive.namelist() if name.endswith(wanted))
        return json.loads(archive.read(name))


FORMATS: Mapping[str, _Format] = {
    "onnx": _Format(".onnx", "ONNX Runtime", _refuse_unusable_onnx, _write_onnx, _open_onnx),
    "torch": _Format(".pt2", "torch.export", lambda _: None, _write_torch, lambda p: torch.export.load(p).module()),
    "aoti": _Format(".pt2", "AOTInductor", _refuse_unusable_aoti, _write_aoti, _open_aoti),
}
NOISY_LOGGERS = ("onnxscript.optimizer._constant_folding", "torch._inductor.ir", "torch.utils.cpp_extension")
