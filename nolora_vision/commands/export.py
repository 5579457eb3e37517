"""export: a saved adapter with its backbone as one file for ONNX Runtime, torch.export or AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from nolora_vision.training.progress import print_table

if TYPE_CHECKING:
    from nolora_vision.adapters.export import ExportReport


def export_command(
    source: Annotated[Positional[str], arg(metavar="DIR_OR_ID")],
    output: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    *,
    format: Literal["onnx", "torch", "aoti"] = "onnx",
    normalize: bool = False,
    input_size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None,
    revision: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
) -> int:
    """Write a saved adapter with its backbone as one file for other runtimes.

    The file takes any number of images, is checked against eager PyTorch to 1e-4 of the largest output before it
    appears, and carries class names and preprocessing as metadata. An existing file is replaced.

    Args:
        source: the adapter: a directory that training wrote, or its id on the Hugging Face Hub.
        output: the file to write; ends in .onnx, or in .pt2 for torch and aoti.
        format: onnx; torch, for torch.export.load; aoti, compiled for this processor by AOTInductor (minutes).
        normalize: the file takes images in [0, 1] and normalises them itself.
        input_size: side of the images in pixels, instead of the size that the adapter was evaluated at.
        revision: branch, tag or commit, where the source is on the Hub.
    """
    from nolora_vision import from_pretrained
    from nolora_vision.adapters.export import check_target, export

    check_target(output, format)  # before anything is loaded
    with Console(stderr=True).status(escape(f"Loading {source} …")) as status:  # shown on a terminal only
        model = from_pretrained(source, revision=revision, device="cpu")
        status.update(escape(f"Writing and checking {output} …"))
        report = export(model, output, format=format, normalize=normalize, input_size=input_size)
    print_table(f"{source} → {output}", report_rows(report, normalize=normalize))
    return 0


def report_rows(report: ExportReport, *, normalize: bool) -> list[tuple[str, str]]:
    """What was written, as names and values."""
    channels, height, width = report.input_size
    what = "in [0, 1], normalised inside" if normalize else "normalised"
    batches = ", ".join(map(str, report.batches))
    rows = [
        ("file", str(report.path)),
        ("format", report.format),
        ("size", f"{report.file_bytes / 2**20:,.1f} MiB"),
        ("input", f"any number of images, {channels} × {height} × {width}, {what}"),
    ]
    for runtime, difference in report.max_abs_difference.items():
        rows.append((f"{runtime} − eager", f"at most {difference:.2g} (largest output {report.largest_output:.3g})"))
    return [*rows, ("compared at batch", batches)]
