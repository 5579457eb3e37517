"""A dataset of the Hub as the datasets library has it: downloaded whole, or from the cache, at the revision wanted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nolora_vision.adapters.hub_cache import COMMIT, cached_commit, cached_files, fetch_whole
from nolora_vision.adapters.hub_trouble import hub_trouble, patiently
from nolora_vision.training.errors import RunError
from nolora_vision.training.registry import REGISTRY


def fetch_dataset(hub_id: str, revision: str) -> Mapping[str, Any]:
    """All splits of a dataset of the Hub, downloaded or from the cache.

    Raises:
        RunError: if it does not exist or cannot be had now.
    """
    datasets = datasets_library()
    try:
        return patiently(lambda: _prepared(hub_id, revision))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RunError(
            f"Dataset {hub_id!r} does not exist on the Hub, or is private or gated, or has no revision {revision!r}. "
            f"Check its name, log in with `hf auth login`, or use one of {', '.join(('digits', *REGISTRY))}."
        ) from error
    except RunError:
        raise
    except Exception as error:  # clients raise many kinds for a failed download
        instead = "Or use --dataset digits (needs no network) or a local folder of images."
        text = hub_trouble(f"Dataset {hub_id}", "dataset", error, cached=prepared_datasets(), instead=instead)
        raise RunError(text) from error


def _prepared(hub_id: str, revision: str) -> Mapping[str, Any]:
    """What `datasets.load_dataset` does, step by step."""
    datasets = datasets_library()
    builder = fetch_whole(
        lambda: datasets.load_dataset_builder(hub_id, revision=revision),
        lambda: _cards(hub_id, revision),
    )
    builder = _at_revision(builder, hub_id, revision)
    builder.download_and_prepare(dl_manager=_careful_downloads(builder))
    return builder.as_dataset()


def _cards(hub_id: str, revision: str) -> list[Path]:
    """What says which files and columns there are, as far as it is in the cache."""
    return [path for path in cached_files(hub_id, "dataset", revision) if path.suffix in {".md", ".json", ".yaml"}]


def _careful_downloads(builder: Any) -> Any:
    """The library's own way to download, but each file is compared with its checksum before it is read."""
    datasets = datasets_library()

    class CarefulDownloads(datasets.DownloadManager):
        def download(self, url_or_urls: Any) -> Any:
            return fetch_whole(
                lambda: super(CarefulDownloads, self).download(url_or_urls),
                lambda: [Path(path) for path in self.downloaded_paths.values()],
            )

    options = {"token": builder.token, "storage_options": builder.storage_options, "use_etag": False}
    return CarefulDownloads(
        dataset_name=builder.dataset_name,
        data_dir=builder.config.data_dir,
        download_config=datasets.DownloadConfig(**options),
        base_path=builder.base_path,
    )


def _at_revision(builder: Any, hub_id: str, revision: str) -> Any:
    """The builder itself, or one of the revision asked for.

    Where the Hub cannot be had, the library takes what it prepared last, of whatever revision.

    Raises:
        RunError: if that revision is not in the cache.
    """
    if type(builder).__name__ != "Cache":
        return builder
    folder, wanted = Path(builder.cache_dir), cached_commit(hub_id, "dataset", revision)
    if folder.name == wanted or (wanted is None and revision == "main"):  # of a cache that holds prepared tables only
        return builder
    if wanted is None or not (folder.parent / wanted).is_dir():
        known = sorted(path.name for path in folder.parent.iterdir() if COMMIT.fullmatch(path.name))
        raise RunError(
            f"Dataset {hub_id} could not be had from the Hub, and the cache does not hold its revision {revision!r}"
            f"{f', commit {wanted}' if wanted else ''}. There are the commits {', '.join(known)}: choose one with "
            f"--revision, or run once with the Hub in reach."
        )
    name = {"dataset_name": builder.dataset_name, "repo_id": hub_id, "config_name": builder.config.name}
    return type(builder)(**name, version=folder.parent.name, hash=wanted)


def commit_of(splits: Mapping[str, Any]) -> str | None:
    """The Hub's commit that was loaded: the library names the folders of its cache by it."""
    for rows in splits.values():
        for file in getattr(rows, "cache_files", ()):
            if re.fullmatch(COMMIT, commit := Path(file["filename"]).parent.name):
                return commit
    return None


def prepared_datasets() -> list[str]:
    """Ids of the datasets that can be had without the Hub."""
    pattern = "*___*/*/*/*/dataset_info.json"
    found = Path(datasets_library().config.HF_DATASETS_CACHE).glob(pattern)
    return sorted({path.parents[3].name.replace("___", "/") for path in found})


def datasets_library() -> Any:
    """The library, without its progress bars.

    Raises:
        RunError: if it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise RunError("This dataset needs the datasets library: pip install 'datasets>=4'.") from error
    datasets.disable_progress_bars()
    return datasets
