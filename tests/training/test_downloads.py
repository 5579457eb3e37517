"""train.py and a Hub that drops, delays, refuses and damages: weights, dataset and adapter, by the real clients.

Either a fault is got over, and the result is bit for bit that of a run without it; or the run ends with one message and
exit code 2, and the same command does its work when the fault has gone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save

from tests import hub_server
from tests.forked_train import Terminal, emptied, terminal

BACKBONE, COLOURS, ADAPTER = "timm/test_vit.r160_in1k", "datasets/me/colours", "me/adapter"
TRAIN, TEST, CARD = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"
FAST = ["--img-size", "32", "-b", "8", "--workers", "0", "--amp-dtype", "none", "--max-eval-samples", "20"]
RUN = ["--model", "test_vit", "--epochs", "1", "--max-train-samples", "16", "--output", "out", "--experiment", "run"]
RUN += ["--adapter.layers", "0"]
COMMANDS = {
    "weights": [*RUN, *FAST, "--dataset", "digits"],
    "dataset": [*RUN, *FAST, "--dataset", "me/colours", "--no-pretrained"],
    "adapter": ["--eval-only", "--adapter", ADAPTER, *FAST[4:-1], "300", "-b", "100", "--dataset", "digits"],
}
REPOS = {"weights": BACKBONE, "dataset": COLOURS, "adapter": ADAPTER}
FILES = {"weights": ("model.safetensors",), "dataset": (TRAIN, CARD), "adapter": ("adapter_model.safetensors",)}


def pictures(rows: int, size: int, seed: int) -> bytes:
    """A parquet file of two classes of noise, the second one brighter."""
    draw = np.random.default_rng(seed)
    images = []
    for i in range(rows):
        Image.fromarray(draw.integers(0, 120, (size, size, 3), np.uint8) + 60 * (i % 2)).save(png := BytesIO(), "PNG")
        images.append({"bytes": png.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(rows)]}, features=features)
    table.to_parquet(stream := BytesIO())
    return stream.getvalue()


@dataclass
class Machine:
    """A machine with a cache, `hf` in its folder, on which commands are typed."""

    hub: hub_server.HubServer
    folder: Path
    online: Terminal
    offline: Terminal

    def run(self, asset: str, *more: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return (self.offline if offline else self.online).train(*COMMANDS[asset], *more, cwd=self.folder)

    def result(self, asset: str, *more: str, offline: bool = False) -> Any:
        """What a run that must succeed gives: the adapter it trained, or the score it printed."""
        done = self.run(asset, *more, offline=offline)
        assert done.returncode == 0, done.stderr
        if asset == "adapter":
            return [line for line in done.stdout.splitlines() if "test top-" in line]
        return (self.folder / "out" / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    def refusal(self, asset: str, *more: str, offline: bool = False) -> str:
        """What a run that must fail says at its end."""
        done = self.run(asset, *more, offline=offline)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert not (self.folder / "out").exists()
        said = done.stderr.split("train.py: ")
        assert len(said) == 2
        return said[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, dict[str, Any]]]:
    """A Hub with the three, a machine that has them all in its cache, and what its runs gave."""
    folder = tmp_path_factory.mktemp("machine")
    env = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    with (
        hub_server.hub_server() as hub,
        terminal(**env, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0") as online,
        terminal(**env, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1") as offline,
    ):
        for repo in REPOS.values():
            hub.repos[repo] = hub_server.Repo()
        torch.manual_seed(5)
        weights = save(timm.create_model("test_vit").state_dict())
        hub.repos[BACKBONE].commit({"model.safetensors": weights, CARD: b"# Weights\n"})
        hub.repos[COLOURS].commit({TRAIN: pictures(40, 32, 0), TEST: pictures(20, 32, 1), CARD: b"# Colours\n"})
        machine = Machine(hub, folder, online, offline)
        results = {asset: machine.result(asset) for asset in ("dataset", "weights")}
        trained = machine.folder / "out" / "run" / "adapter"
        hub.repos[ADAPTER].commit({path.name: path.read_bytes() for path in trained.iterdir()})
        yield machine, results | {"adapter": machine.result("adapter")}


@pytest.fixture
def warm(world: tuple[Machine, dict[str, Any]]) -> Iterator[Machine]:
    world[0].hub.requests.clear()
    yield world[0]
    world[0].hub.faults = hub_server.Faults()


@pytest.fixture
def cold(warm: Machine) -> Iterator[Machine]:
    """The machine with nothing in its cache, for a while."""
    with emptied(warm.folder / "hf"):
        yield warm


def fault(asset: str, **what: Any) -> hub_server.Faults:
    """One that only the asset's own repository has."""
    return hub_server.Faults(where=f"/{REPOS[asset]}/", **what)


@pytest.fixture(params=REPOS)
def asset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "what",
    [
        pytest.param({"cut_after": 100, "times": 2}, id="dropped twice"),
        pytest.param({"stall_s": 1.5, "times": 1}, id="stalled once"),
        pytest.param({"status": 503, "times": 1}, id="busy once"),
        pytest.param({"delay_s": 0.3}, id="slow"),
        pytest.param({"damaged": True, "times": 1}, id="damaged once"),
    ],
)
def test_a_fault_that_passes_is_got_over(cold: Machine, world: Any, asset: str, what: dict[str, Any]) -> None:
    what = dict(what)
    if what.pop("damaged", False):
        what["wrong_bytes"] = FILES[asset][:1]
    cold.hub.faults = fault(asset, **what)
    if "status" not in what:
        cold.hub.faults.where = FILES[asset][0]  # not the card, which is asked for first
    assert cold.result(asset) == world[1][asset]
    assert not cold.hub.faults.times  # it happened


@pytest.mark.parametrize(
    ("asset", "listing"), [("dataset", f"/api/{COLOURS}/"), ("adapter", f"/api/models/{ADAPTER}/")]
)
def test_a_busy_hub_is_asked_again_which_files_there_are(cold: Machine, world: Any, asset: str, listing: str) -> None:
    cold.hub.faults = hub_server.Faults(where=listing, status=429, times=3)
    assert cold.result(asset) == world[1][asset]
    assert cold.hub.faults.times == 0


PERSISTENT: dict[str, tuple[dict[str, Any], str]] = {
    "dropped": ({"cut_after": 100}, "HF_HUB_DOWNLOAD_TIMEOUT=60"),
    "stalled": ({"stall_s": 1.5}, "HF_HUB_DOWNLOAD_TIMEOUT=60"),
    "busy": ({"status": 503}, "The Hub is in trouble: try again later"),
    "unauthorised": ({"status": 401}, "log in with `hf auth login`, or set HF_TOKEN"),
    "not found": ({"status": 404}, "log in with `hf auth login`, or set HF_TOKEN"),
    "login page": ({"page": True}, "What answered is no Hub, but perhaps this network's login page"),
    "short": ({"short_by": 16}, "came damaged twice and was not kept"),
}


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_fault_that_stays_is_said_and_leaves_nothing(cold: Machine, world: Any, asset: str, name: str) -> None:
    what, advice = PERSISTENT[name]
    cold.hub.faults = fault(asset, **what)
    said = cold.refusal(asset)
    assert REPOS[asset].split("/")[-1].split(".")[0] in said and advice in said
    if "status" not in what:  # else no file came
        cold.hub.faults = hub_server.Faults()
        assert cold.result(asset) == world[1][asset]


@pytest.mark.parametrize(("asset", "file"), [(asset, file) for asset, files in FILES.items() for file in files])
def test_wrong_bytes_are_never_used_or_kept(cold: Machine, world: Any, asset: str, file: str) -> None:
    cold.hub.faults = fault(asset, wrong_bytes=(file,))
    assert f"{Path(file).name} does not have the checksum that the Hub states" in cold.refusal(asset)
    assert sum(request.startswith("GET") and request.endswith(file) for request in cold.hub.requests) == 2
    said = cold.refusal(asset, offline=True)
    assert "HF_HUB_OFFLINE" in said and "checksum" not in said  # there is nothing
    cold.hub.faults = hub_server.Faults()
    assert cold.result(asset) == world[1][asset]


def test_a_damaged_file_in_the_cache_is_replaced_or_named(cold: Machine, world: Any, asset: str) -> None:
    assert cold.result(asset) == world[1][asset]
    shutil.rmtree(cold.folder / "hf" / "datasets", ignore_errors=True)  # what has been prepared needs no download
    link = next(cold.folder.glob(f"hf/hub/*/snapshots/*/{FILES[asset][0]}"))
    content = link.read_bytes()
    link.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if asset != "dataset":  # without the Hub the library goes by prepared tables alone
        said = cold.refusal(asset, offline=True)
        assert f"{link} does not have the checksum" in said and "Delete it, and run once without HF_HUB_OFFLINE" in said
    assert cold.result(asset) == world[1][asset]
    assert link.read_bytes() == content


def test_a_warm_cache_needs_no_hub(warm: Machine, world: Any, asset: str) -> None:
    assert warm.result(asset, offline=True) == world[1][asset]
    assert not warm.hub.requests
    warm.hub.faults = hub_server.Faults(status=503)  # not said to be offline, but the Hub does not work
    assert warm.result(asset) == world[1][asset]
    assert warm.hub.requests


def test_offline_with_a_cold_cache(cold: Machine, asset: str) -> None:
    said = cold.refusal(asset, offline=True)
    nothing = {"weights": "In the cache: no models.", "dataset": "In the cache: no datasets."}
    assert nothing.get(asset, "adapters there: none") in said and "HF_HUB_OFFLINE" in said and "nset it" in said
    instead = {"weights": "--no-pretrained", "dataset": "--dataset digits (needs no network) or a local folder"}
    assert instead.get(asset, "hf download me/adapter --local-dir DIR") in said
    assert not cold.hub.requests


@pytest.mark.parametrize(
    ("asset", "other", "there"),
    [
        ("weights", ["--model", "test_vit2"], f"In the cache: {BACKBONE}."),
        ("dataset", ["--dataset", "me/shapes"], "In the cache: me/colours."),
        ("adapter", ["--adapter", "me/other"], "(adapters there: me/adapter)"),
    ],
)
def test_offline_with_others_in_the_cache(warm: Machine, asset: str, other: list[str], there: str) -> None:
    assert there in warm.refusal(asset, *other, offline=True)


def test_a_large_file_goes_on_where_it_was_dropped(cold: Machine) -> None:
    noise = pictures(16, 512, 2)
    cold.hub.repos["datasets/me/large"] = hub_server.Repo()
    cold.hub.repos["datasets/me/large"].commit({TRAIN: noise, TEST: pictures(20, 32, 3), CARD: b"# Large\n"})
    cold.hub.faults = hub_server.Faults(where=TRAIN, cut_after=11 * 2**20, times=1)  # the client writes 10 MiB at once
    cold.result("dataset", "--dataset", "me/large")
    assert len(noise) > 11 * 2**20
    parts = [request.split(TRAIN)[1] for request in cold.hub.requests if request.startswith("GET") and TRAIN in request]
    assert parts == ["", f" bytes={10 * 2**20}-"]
    assert next(cold.folder.glob(f"hf/hub/*/snapshots/*/{TRAIN}")).read_bytes() == noise


def test_without_the_hub_it_is_the_revision_that_was_asked_for(cold: Machine) -> None:
    def commit(*more: str, offline: bool = False) -> str:
        cold.result("dataset", "--dataset", "me/versions", *more, offline=offline)
        record = json.loads((cold.folder / "out" / "run" / "record.json").read_text(encoding="utf-8"))
        return record["dataset"]["commit"]

    repo = cold.hub.repos["datasets/me/versions"] = hub_server.Repo()
    for version in range(2):
        repo.commit({TRAIN: pictures(30, 16, 4 + version), TEST: pictures(20, 16, 6), CARD: b"# Versions\n"})
        repo.refs[f"v{version}"] = repo.refs["main"]
    assert commit() == repo.refs["v1"] and commit("--revision", "v0") == repo.refs["v0"]  # the old one later
    assert commit(offline=True) == repo.refs["v1"]
    assert commit("--revision", "v0", offline=True) == repo.refs["v0"]
    said = cold.refusal("dataset", "--dataset", "me/versions", "--revision", "v2", offline=True)
    assert "cache does not hold its revision 'v2'" in said and all(known in said for known in repo.commits)
