"""Nothing grows: the checks of `endurance_checks.py`, in a process that has run nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")
def test_nothing_grows() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "tests/endurance_checks.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "." * 9 in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
