"""What a person sees of a run: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def print_anything() -> None:
    """From here on stdout and stderr write escapes for what their encoding lacks: a pipe on Windows has no λ, no →."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class LiveProgress:
    """One bar for the whole run with loss, top-1, images per second and the remaining time; a line for each epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal and sys.stdout.isatty()
        self.bar = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f}  top-1 {task.fields[top1]:.1f} %  {task.fields[rate]:.0f} images/s"
            ),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.bar.add_task("", total=None, epoch="", loss=float("nan"), top1=0.0, rate=0.0)

    def __enter__(self) -> LiveProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """An epoch of so many steps begins."""
        self.epochs = epochs
        self.bar.update(self.task, total=epochs * steps, completed=epoch * steps, epoch=f"{epoch + 1}/{epochs}")

    def step(self, *, loss: float, top1: float, images_per_s: float) -> None:
        """One batch is done; loss and top-1 are the epoch's means so far."""
        self.bar.update(self.task, advance=1, loss=loss, top1=top1, rate=images_per_s)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Print the epoch's line."""
        validation = f"val top-1 {row['val_top1_percent']:.2f} %  " if "val_top1_percent" in row else ""
        self.console.print(
            f"epoch {row['epoch']:.0f}/{self.epochs}  train loss {row['train_loss']:.3f}  "
            f"train top-1 {row['train_top1_percent']:.1f} %  {validation}{row['images_per_s']:.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )

    def warn(self, text: str) -> None:
        """Print above the bar what is odd."""
        self.console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)


class RunsProgress:
    """One bar for several runs, whatever the length of each, with what the current one is."""

    def __init__(self, runs: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bar = Progress(
            TextColumn("{task.fields[what]}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=runs, what="", loss=float("nan"))
        self.begun, self.share, self.depth = 0, 0.0, 0

    def __enter__(self) -> RunsProgress:
        self.depth += 1
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:  # each run enters and leaves it too
            self.bar.stop()

    def begin(self, what: str) -> None:
        """The next run begins; the one before counts as done."""
        self.bar.update(self.task, completed=self.begun, what=what)
        self.begun += 1

    def say(self, text: str) -> None:
        """Print above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """An epoch of so many steps begins."""
        self.share = 1 / (epochs * steps)

    def step(self, *, loss: float, top1: float, images_per_s: float) -> None:
        """One batch is done."""
        self.bar.update(self.task, advance=self.share, loss=loss)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Nothing: a line for each epoch of each run would be too many."""

    def warn(self, text: str) -> None:
        """Nothing: the run's record has it."""


class Silence:
    """Progress that nobody is told."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Nothing."""

    def step(self, *, loss: float, top1: float, images_per_s: float) -> None:
        """Nothing."""

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""


def print_table(title: str, rows: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """A table of names and values."""
    _print(Table(show_header=False), title, rows, console)


def print_columns(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """A table with a header; numbers to the right."""
    table = Table()
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    _print(table, title, rows, console)


def _print(table: Table, title: str, rows: Sequence[Sequence[str]], console: Console | None) -> None:
    console = console or Console()
    for row in rows:
        table.add_row(*map(Text, row))
    # a table's own title wraps at its width
    console.print(Text(title, style="italic"), soft_wrap=True, highlight=False)
    console.print(table)
