"""Every test starts from the same seed and stays off the network; those that need a Hub get one or are skipped."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported

import pytest
import torch

from tests.families import FAMILIES, Family


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def hub_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that uses the Hub whose address is in NOLORA_TEST_HUB, with a cache of its own."""
    endpoint = os.environ.get("NOLORA_TEST_HUB")
    if not endpoint:
        pytest.skip("needs the address of a Hugging Face Hub in NOLORA_TEST_HUB; .ci/run starts one where it can")
    cache = str(tmp_path_factory.mktemp("hf"))
    return {"HF_ENDPOINT": endpoint, "HF_HOME": cache, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}
