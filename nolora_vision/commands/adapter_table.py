"""The table of a saved adapter's updates, as wide as the terminal: columns, bars, the profile over depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nolora_vision.adapters.anatomy import AdapterAnatomy
from nolora_vision.commands.predictions import printable, shorten_middle

BAR = " ▏▎▍▌▋▊▉█"
SPARK = "▁▂▃▄▅▆▇█"
BAR_WIDTH, SHORTEST_PATH = 10, 16


def print_updates(rows: Sequence[AdapterAnatomy], console: Console, *, by: str) -> None:
    """Print the table, the profile of each role over the blocks, and what the columns mean.

    Args:
        by: layer, role or block: what a line is for.
    """
    columns = all_columns(grouped(rows, by), by, console)
    columns = fitting([column for column in columns if column.cells], console.width)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.name, justify=column.justify, no_wrap=True, overflow="ellipsis")
    for line in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, line))
    for part in ("", table, "", _profiles(rows, console)):
        console.print(part)
    for line in _notes(rows, columns):
        console.print(Text(line, style="dim"))


class Column(NamedTuple):
    """One column of the table."""

    name: str
    cells: list[str]
    rank: int
    """Those of the highest rank go first where the terminal is too narrow."""
    justify: Literal["left", "right"] = "right"
    meaning: str = ""

    @property
    def width(self) -> int:
        """With the space after it."""
        return max(map(cell_len, [self.name, *self.cells])) + 1


def grouped(rows: Sequence[AdapterAnatomy], by: str) -> dict[str, list[AdapterAnatomy]]:
    """Rows by what the first column says."""
    groups: dict[str, list[AdapterAnatomy]] = {}
    for i, row in enumerate(rows):
        name = {"role": row.kind or "other", "block": row.block or "outside blocks"}.get(by, f"{i}")
        groups.setdefault(name, []).append(row)
    return groups


def all_columns(groups: Mapping[str, Sequence[AdapterAnatomy]], by: str, console: Console) -> list[Column]:
    """Every column that says something about these rows."""
    lines = list(groups.values())
    thetas = list(dict.fromkeys(name for rows in lines for row in rows for name in row.theta_moved()))

    def of(value: Callable[[AdapterAnatomy], Any], form: Callable[[Any], str] = _number, join: Any = None) -> list[str]:
        found = [[x for x in map(value, rows) if x is not None] for rows in lines]
        return [form((join or _mean)(xs)) if xs else "" for xs in found] if any(found) else []

    updates = [math.hypot(*(row.update_norm for row in rows)) for rows in lines]
    largest = max((update for update in updates if math.isfinite(update)), default=0.0)
    first = [rows[0].path for rows in lines] if by == "layer" else list(groups)
    return [
        Column(by, [printable(name) for name in first], 0, "left"),
        Column("role", [] if by == "role" else _span_of(lines, lambda row: row.kind), 1, "left"),
        Column(
            "in → out",
            _span_of(lines, lambda row: f"{row.in_features} → {row.out_features}") if by == "layer" else [],
            8,
        ),
        Column("rank", _span_of(lines, lambda row: str(row.rank)), 7),
        Column("parameters", of(lambda row: row.parameters, lambda n: f"{n:,}", sum), 9),
        Column("update", [_number(update) for update in updates], 0, meaning=UPDATE),
        Column("", [bar(update, largest, ascii=_is_ascii(console)) for update in updates], 2, "left"),
        Column("dirs", of(lambda row: row.stable_rank, lambda x: f"{x:.1f}"), 5, meaning=DIRECTIONS),
        Column("‖B‖", of(lambda row: row.up_norm), 10, meaning="‖B‖: 0 if never trained"),
        Column("f'(0)", of(lambda row: row.slopes, _range, _joined) if _varies(lines) else [], 6, meaning=SLOPE),
        Column("v", of(lambda row: row.v, _range, _joined), 3, meaning="v: smallest … largest; 1 at the start"),
        Column("‖G‖", of(lambda row: row.gate_norm), 4, meaning="‖G‖: weight of the gate; 0 at the start"),
        *(
            Column(f"Δ{name}", of(lambda row, name=name: row.theta_moved().get(name), join=max), 4, meaning=THETA)
            for name in thetas
        ),
    ]


UPDATE = (
    "update: ‖s·B J A‖, the norm of the update's slope at A x = 0, v, gate and f'(0) included; of several together √Σ²"
)
DIRECTIONS = "dirs: Σσ² / max σ² of the update, the directions that it really uses, at most the rank"
SLOPE = "f'(0): smallest … largest slope of the learned f at 0"
THETA = "Δ…: largest change of a parameter of f since the start"


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit, the least telling left out first; then the first one is shortened."""
    kept = list(columns)
    path = min(kept[0].width, max(width // 2, SHORTEST_PATH + 1))
    while len(kept) > 2 and path + sum(column.width for column in kept[1:]) > width:
        kept.remove(max(kept[1:], key=lambda column: column.rank))
    room = max(SHORTEST_PATH, width - sum(column.width for column in kept[1:]) - 1)
    return [kept[0]._replace(cells=[shorten_middle(cell, room) for cell in kept[0].cells]), *kept[1:]]


def bar(value: float, largest: float, *, ascii: bool = False) -> str:
    """A bar of at most `BAR_WIDTH` characters."""
    if not math.isfinite(value) or not largest:
        return ""
    eighths = round(8 * BAR_WIDTH * min(1.0, value / largest))
    if ascii:
        return "#" * round(eighths / 8)
    return ("█" * (eighths // 8) + BAR[eighths % 8]).strip()


def sparkline(values: Sequence[float | None], largest: float, *, ascii: bool = False) -> str:
    """One character for each value, from 0 to the largest; a space for None, ! for what is not finite."""
    marks = "_.:-=+*#" if ascii else SPARK
    text = ""
    for value in values:
        if value is None or not math.isfinite(value):
            text += " " if value is None else "!"
        else:
            text += marks[min(len(marks) - 1, int(len(marks) * value / largest))] if largest else marks[0]
    return text


def _profiles(rows: Sequence[AdapterAnatomy], console: Console) -> Table:
    """The update norm of each role over the blocks, all on one scale."""
    blocks = list(dict.fromkeys(row.block for row in rows))
    profiles: dict[str, list[float | None]] = {}
    for kind, members in grouped(rows, "role").items():
        norms = [[row.update_norm for row in members if row.block == block] for block in blocks]
        profiles[kind] = [math.hypot(*those) if those else None for those in norms]
    found = [value for line in profiles.values() for value in line if value is not None and math.isfinite(value)]
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("update by block", style="bold"), Text("first to last, one scale"), Text("smallest … largest"))
    for kind, line in profiles.items():
        known = [value for value in line if value is not None]
        spark = sparkline(line, max(found, default=0.0), ascii=_is_ascii(console))
        table.add_row(Text(f"  {printable(kind)}"), Text(spark), Text(_range(known)))
    return table


def _notes(rows: Sequence[AdapterAnatomy], columns: Sequence[Column]) -> list[str]:
    lines = list(dict.fromkeys(column.meaning for column in columns if column.meaning))
    if not all(math.isfinite(row.update_norm) for row in rows):
        lines.append("nan: weights that are not finite; the training diverged.")
    elif not any(row.update_norm for row in rows):
        lines.append("Every update is 0: these adapters have not been trained.")
    return lines


def _span_of(lines: Sequence[Sequence[AdapterAnatomy]], value: Callable[[AdapterAnatomy], str]) -> list[str]:
    texts = [list(dict.fromkeys(map(value, rows))) for rows in lines]
    return [", ".join(found) for found in texts] if max(map(len, texts)) <= 4 else []


def _varies(lines: Sequence[Sequence[AdapterAnatomy]]) -> bool:
    return len({round(slope, 2) for rows in lines for row in rows for slope in row.slopes}) > 1


def _is_ascii(console: Console) -> bool:
    return not (console.encoding or "").lower().startswith("utf")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def _range(values: Sequence[float]) -> str:
    """Smallest … largest, with digits after the point that suit the larger one."""
    if not values:
        return ""
    largest = max(map(abs, values))
    size = math.floor(math.log10(largest)) if 1e-5 < largest < 1e3 else 0
    digits = 3 - max(0, size) if size >= -1 else 2 - size
    return f"{min(values):.{digits}f} … {max(values):.{digits}f}"


def _joined(lists: Sequence[Sequence[float]]) -> list[float]:
    return [value for values in lists for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
