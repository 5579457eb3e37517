"""Files in the Hub's cache and their checksums; what a user is told. The real downloads are in test_downloads.py."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from nolora_vision.adapters import backbone_weights
from nolora_vision.adapters.hub_cache import DamagedDownloadError, fetch_whole, is_sound
from nolora_vision.adapters.hub_trouble import advice_for, reason_of

CONTENT = b"some weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def cached(folder: Path, name: str, content: bytes = CONTENT) -> Path:
    """A link to a blob of this name, as the client of the Hub lays them out."""
    snapshot = folder / "snapshots" / "c"
    for made in (snapshot, folder / "blobs"):
        made.mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / name).write_bytes(content)
    link = snapshot / "model.safetensors"
    link.symlink_to(Path("..", "..", "blobs", name))
    return link


@pytest.mark.parametrize(
    "name",
    [
        SHA256,
        hashlib.sha1(b"blob 12\0" + CONTENT).hexdigest(),  # git's
        hashlib.sha1(CONTENT).hexdigest(),
    ],
)
def test_a_file_is_sound_if_its_name_is_its_checksum(tmp_path: Path, name: str) -> None:
    link = cached(tmp_path, name)
    assert is_sound(link)
    link.write_bytes(b"more weights")  # as many bytes
    assert not is_sound(link)


def test_where_no_checksum_is_known_nothing_is_refused(tmp_path: Path) -> None:
    assert is_sound(cached(tmp_path / "a", "an-etag-of-a-mirror"))
    (tmp_path / SHA256).write_bytes(b"no link")
    assert is_sound(tmp_path / SHA256)
    link = cached(tmp_path / "b", SHA256)
    (tmp_path / "b" / "blobs" / SHA256).unlink()
    assert is_sound(link)  # it is not there


def test_a_blob_shared_between_caches_has_the_name_of_the_first_link(tmp_path: Path) -> None:
    link = cached(tmp_path, SHA256)
    blob = tmp_path / "blobs" / SHA256
    blob.rename(tmp_path / ("e" * 64))  # another kind of hash
    blob.symlink_to(tmp_path / ("e" * 64))
    assert is_sound(link)


def test_what_is_damaged_is_deleted_and_fetched_once_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    calls = []

    def load() -> str:
        calls.append(1)
        if not (tmp_path / "blobs" / SHA256).exists():
            (tmp_path / "snapshots" / "c" / "model.safetensors").unlink(missing_ok=True)
            cached(tmp_path, SHA256, CONTENT if len(calls) == mended else b"damaged")
        return f"call {len(calls)}"

    def files() -> list[Path]:
        return list((tmp_path / "snapshots").rglob("*.safetensors"))

    mended = 2
    assert fetch_whole(load, files) == "call 2" and files()[0].read_bytes() == CONTENT
    files()[0].write_bytes(b"damaged")
    calls.clear()
    mended = 3
    with pytest.raises(DamagedDownloadError, match=r"^model.safetensors does not have the checksum") as caught:
        fetch_whole(load, files)
    assert len(calls) == 2 and not files() and not list((tmp_path / "blobs").iterdir())
    assert "came damaged twice and was not kept" in advice_for(caught.value)


def test_without_the_hub_nothing_is_deleted(tmp_path: Path) -> None:  # tests are offline
    link = cached(tmp_path, SHA256, b"damaged")
    with pytest.raises(DamagedDownloadError, match=f"^{link} does not") as caught:
        fetch_whole(lambda: None, lambda: [link])
    assert link.read_bytes() == b"damaged" and "Delete it" in advice_for(caught.value)


def test_an_error_without_damage_is_the_callers(tmp_path: Path) -> None:
    link = cached(tmp_path, SHA256)
    with pytest.raises(KeyError):
        fetch_whole(lambda: {}["x"], lambda: [link])


def test_weights_that_another_process_mended_meanwhile_are_loaded_again(tmp_path: Path, monkeypatch) -> None:
    link, read = cached(tmp_path, SHA256, b"damaged"), []

    def create_model(name: str, **options: object) -> torch.nn.Module:
        read.append(link.read_bytes())
        link.write_bytes(CONTENT)  # the other one's doing
        return torch.nn.Linear(3, 3)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(backbone_weights, "weight_files", lambda name: [link])
    torch.manual_seed(1)
    model = backbone_weights.create_model("test_vit", pretrained=True)
    assert read == [b"damaged", CONTENT]
    torch.manual_seed(1)
    assert isinstance(model, torch.nn.Linear) and torch.equal(model.weight, torch.nn.Linear(3, 3).weight)


def test_the_reason_is_what_happened_and_not_only_where() -> None:
    try:
        try:
            raise OfflineModeIsEnabled("the network\nis off")
        except ConnectionError as error:
            raise LocalEntryNotFoundError("not in the cache") from error
    except LocalEntryNotFoundError as error:
        assert reason_of(error) == "OfflineModeIsEnabled: the network is off"
        assert advice_for(error).startswith("HF_HUB_OFFLINE=1 is set: unset it")
