"""The learned nonlinearities of saved adapters as plain numbers: a process beside the report, which has no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nolora_vision.adapters.adapter_files import CheckpointError
from nolora_vision.adapters.anatomy import anatomy

REACH, POINTS = 3.0, 61
"""f is shown at so many h in [-REACH, REACH]."""


def learned_functions(directories: Mapping[str, Path]) -> dict[str, Any]:
    """For each adapter with a learned f its curves by label: h, and rows of block, after (R, N) and before (N,)."""
    found = {}
    h = np.linspace(-REACH, REACH, POINTS).tolist()
    for label, directory in directories.items():
        try:
            updates = [update for update in anatomy(directory).rows if update.theta]
        except CheckpointError as error:
            print(f"{label}: {error}", file=sys.stderr)
            continue
        rows = []
        for update in updates:
            after, before = update.curves(h)
            rows.append({
                "block": update.block,
                "after": after.numpy().round(4).tolist(),
                "before": None if before is None else before.numpy().round(4).tolist(),
            })  # fmt: skip
        if rows:
            found[label] = {"h": h, "rows": rows}
    return found


def main(argv: Sequence[str]) -> None:
    """Print the curves of the adapters in a JSON object of label and directory, as JSON."""
    directories = {label: Path(directory) for label, directory in json.loads(argv[0]).items()}
    json.dump(learned_functions(directories), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
