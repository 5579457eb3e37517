"""Every test starts from the same seed and stays off the network; those that need a Hub get one or are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported

import pytest
import torch

from tests.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return request.param


@pytest.fixture
def train_py(tmp_path: Path) -> Command:
    """Run `train.py` in a process of its own, in an empty folder: `train_py("--dataset", "digits", env={…})`."""

    def command(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
        )

    return command


@pytest.fixture(scope="session")
def hub_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that uses the Hub whose address is in NOLORA_TEST_HUB, with a cache of its own."""
    endpoint = os.environ.get("NOLORA_TEST_HUB")
    if not endpoint:
        pytest.skip("needs the address of a Hugging Face Hub in NOLORA_TEST_HUB; .ci/run starts one where it can")
    cache = str(tmp_path_factory.mktemp("hf"))
    return {"HF_ENDPOINT": endpoint, "HF_HOME": cache, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}
