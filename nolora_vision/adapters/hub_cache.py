"""The Hub's cache on this machine: what it holds, and that each file has the checksum that the Hub stated for it.

The client of the Hub compares sizes, not contents, and never looks again at what is in its cache. But it names each
file there by the Hub's ETag, which is the SHA-256 of weights and tables and git's SHA-1 of small files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CHECKSUM = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT = re.compile("[0-9a-f]{40}")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")


class DamagedDownloadError(OSError):
    """A downloaded file whose content has another checksum than the Hub stated."""

    def __init__(self, path: Path, *, kept: bool) -> None:
        super().__init__(f"{path if kept else path.name} does not have the checksum that the Hub states for it")
        self.kept = kept


def fetch_whole(load: Callable[[], T], files: Callable[[], Iterable[Path]]) -> T:
    """What `load` gives, if each of the files has its checksum; if not, they are deleted and it is called once more.

    Args:
        load: downloads what the cache lacks.
        files: those in the cache that it goes by; asked after each call, whether it failed or not.

    Raises:
        DamagedDownloadError: if they come damaged twice, and nothing of that is kept; or if one is damaged and
            HF_HUB_OFFLINE forbids to fetch it again.
    """
    from huggingface_hub import constants

    damaged: list[Path] = []
    for _ in range(2):
        try:
            result = load()
        except Exception:  # may well be because of the damage
            damaged = [path for path in files() if not is_sound(path)]
            if not damaged:
                raise
        else:
            damaged = [path for path in files() if not is_sound(path)]
            if not damaged:
                return result
        if constants.HF_HUB_OFFLINE:
            raise DamagedDownloadError(damaged[0], kept=True)
        for path in damaged:
            _delete(path)
    raise DamagedDownloadError(damaged[0], kept=False)


def is_sound(path: Path) -> bool:
    """Whether a file in the cache has the checksum that is its name there, or none is known.

    None is known where the file system has no links, and of what did not come from a Hub.
    """
    if not path.is_symlink():
        return True
    stated = Path(os.readlink(path)).name
    if not CHECKSUM.fullmatch(stated) or not path.exists():
        return True
    found = path.stat()
    return _has_checksum(str(path), stated, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _has_checksum(path: str, stated: str, inode: int, size: int, mtime_ns: int) -> bool:
    plain = hashlib.sha256() if len(stated) == 64 else hashlib.sha1()
    git = hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            plain.update(block)
            if len(stated) == 40:
                git.update(block)
    return stated in (plain.hexdigest(), git.hexdigest())  # some mirrors state the SHA-1 of the content itself


def _delete(link: Path) -> None:
    """The link, and the content that it leads to, by however many links."""
    blob = link.parent / os.readlink(link)
    for path in (blob.resolve(), blob, link):
        path.unlink(missing_ok=True)


def cached_files(repo_id: str, kind: str, revision: str | None = None) -> list[Path]:
    """A repository's files in the cache, at a branch, tag or commit.

    Args:
        kind: model or dataset.
    """
    folder, commit = _folder(repo_id, kind), cached_commit(repo_id, kind, revision)
    return sorted(path for path in (folder / "snapshots" / commit).rglob("*") if path.is_file()) if commit else []


def cached_commit(repo_id: str, kind: str, revision: str | None = None) -> str | None:
    """The commit that a branch or tag was when it was last looked up, as far as the cache knows."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    reference = _folder(repo_id, kind) / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def cached_models(*, adapters: bool) -> list[str]:
    """Ids of the repositories in the cache of which there are an adapter's weights, or else a whole model's."""
    from huggingface_hub import constants

    files = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*")
    weights = [path for path in files if path.suffix in WEIGHTS and path.exists()]
    found = {path.parents[2].name for path in weights if path.name.startswith("adapter_model.") == adapters}
    return sorted(name.removeprefix("models--").replace("--", "/") for name in found)


def _folder(repo_id: str, kind: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind)
