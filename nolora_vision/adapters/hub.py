"""The Hugging Face Hub: an adapter's way from there and to there, with `huggingface_hub`."""

from __future__ import annotations

import tempfile
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from nolora_vision.adapters.adapter_files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterNotFoundError,
    CheckpointError,
    CorruptAdapterError,
    parse_weights,
    read_adapter_files,
    read_weight_bytes,
)
from nolora_vision.adapters.checkpoint import save_adapter
from nolora_vision.adapters.hub_cache import DamagedDownloadError, cached_files, cached_models, fetch_whole
from nolora_vision.adapters.hub_trouble import NO_HUB, advice_for, patiently, reason_of, status_of
from nolora_vision.adapters.peft_format import is_peft
from nolora_vision.adapters.whole_directory import whole_directory

FILES = (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)
WANTED = "Wanted a directory written by nolora_vision.save_adapter, or the id of one on the Hub (owner/name)."


def find_adapter(source: str | Path, *, revision: str | None = None) -> Path:
    """The directory of an adapter: the source itself, or the Hub's copy in the cache of `huggingface_hub`.

    Raises:
        AdapterNotFoundError: if it is neither a directory nor a repository with an adapter, or cannot be downloaded.
        CorruptAdapterError: if it comes damaged, twice.
    """
    directory = local_directory(source)
    if directory is None:
        return _download(source, revision)
    if revision is not None:
        raise AdapterNotFoundError(
            f"{source} is a directory here, and has no revision {revision!r}. Leave revision out; if the repository "
            f"of that name on the Hub is meant, call from another working directory."
        )
    return directory


def local_directory(source: str | Path) -> Path | None:
    """The directory that this path names, or None if there is none.

    Raises:
        AdapterNotFoundError: if it is a file, or no path at all.
    """
    try:
        directory = whole_directory(source)
        if directory.is_dir():
            return directory
        exists = directory.exists()
    except (OSError, ValueError) as error:
        raise AdapterNotFoundError(f"{str(source)[:100]!r} is no path ({error}). {WANTED}") from error
    if exists:
        raise AdapterNotFoundError(f"{source} is no directory. {WANTED}")
    return None


def _download(source: str | Path, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if not isinstance(source, str) or source.count("/") > 1 or source.startswith((".", "~", "/")):
        raise AdapterNotFoundError(f"{source} does not exist. {WANTED}")
    try:
        folder = fetch_whole(
            lambda: Path(patiently(lambda: snapshot_download(source, revision=revision, allow_patterns=list(FILES)))),
            lambda: [path for path in cached_files(source, "model", revision) if path.name in FILES],
        )
    except Exception as error:  # clients raise many kinds
        _refuse(source, revision, error)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        at = f" at revision {revision!r}" if revision else ""
        raise AdapterNotFoundError(
            f"{source} on the Hub holds no adapter{at}, or its download is not complete: no {' and no '.join(missing)} "
            f"in {folder}. Wanted a repository that nolora_vision.push_to_hub wrote."
        )
    return folder


def _refuse(source: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        text = f"{source} is neither a directory nor a Hub id ({reason_of(error)}). {WANTED}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{source} on the Hub has no revision {revision!r}. Pass one of its branches, tags or commits, or none."
    elif isinstance(error, errors.RepositoryNotFoundError) or status_of(error) in (401, 403):
        text = (
            f"{source} is no directory here, and {constants.ENDPOINT} has no such repository, or it is private or "
            f"gated. {WANTED} For a private one log in with `hf auth login`, or set HF_TOKEN."
        )
    elif isinstance(error, DamagedDownloadError):
        text = f"{source} could not be loaded from {constants.ENDPOINT} ({reason_of(error)}). {advice_for(error)}"
        raise CorruptAdapterError(text) from error
    elif isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        at = f" at revision {revision!r}" if revision else ""
        text = (
            f"{source} is no directory here and not whole in the cache {constants.HF_HUB_CACHE}{at} (adapters there: "
            f"{', '.join(cached_models(adapters=True)) or 'none'}), and HF_HUB_OFFLINE is set. Unset it; or run "
            f"`hf download {source} --local-dir DIR` on a machine with internet, and pass the copied directory."
        )
    else:
        advice = NO_HUB if isinstance(error, JSONDecodeError) else advice_for(error)
        text = (
            f"{source} is no directory here, and could not be downloaded from {constants.ENDPOINT} "
            f"({reason_of(error)}). {advice} Or pass a local directory."
        )
    raise AdapterNotFoundError(text) from error


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Add adapter",
    dry_run: bool = False,
    **save_options: Any,
) -> str:
    """Upload an adapter to the Hub with `huggingface_hub`, whose login and HF_ENDPOINT it uses.

    Args:
        model: a model with adapters, or the directory of a saved one.
        repo_id: owner/name; created if it does not exist, updated if it does.
        private: of a repository that is created; None leaves it to the owner's default.
        revision: branch to commit to, created from main if it does not exist.
        dry_run: print what would be uploaded, and do nothing; needs neither network nor login.
        **save_options: of `save_adapter`, if a model is given.

    Returns:
        The commit's address, or in a dry run the repository's.

    Raises:
        CheckpointError: if the directory holds no sound adapter (nothing is uploaded), or the upload fails.
        ValueError: if `repo_id` is none.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    to = {"private": private, "revision": revision, "commit_message": commit_message, "dry_run": dry_run}
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            return push_to_hub(save_adapter(model, Path(folder) / "adapter", **save_options), repo_id, **to)
    if save_options:
        raise TypeError(
            f"{', '.join(save_options)}: options of save_adapter go with a model, and {model} is saved already."
        )
    directory = _sound_directory(model)
    files = [directory / name for name in FILES if (directory / name).is_file()]
    if dry_run:
        return _show(files, repo_id, revision)
    return _upload(files, repo_id, private=private, revision=revision, commit_message=commit_message)


def _sound_directory(source: str | Path) -> Path:
    """What is damaged stays at home."""
    directory = local_directory(source)
    if directory is None:
        raise AdapterNotFoundError(f"{source} does not exist. Wanted a model, or a directory that save_adapter wrote.")
    if is_peft(directory):
        parse_weights(directory / WEIGHTS_FILE, read_weight_bytes(directory / WEIGHTS_FILE))
    else:
        read_adapter_files(directory)
    return directory


def _show(files: list[Path], repo_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    url = f"{HfApi().endpoint}/{repo_id}"
    print(f"Would upload to {url}" + (f", revision {revision}" if revision else "") + ":")
    for path in files:
        print(f"  {path.name:<26} {path.stat().st_size:>13,} bytes")
    return url


def _upload(files: list[Path], repo_id: str, *, private: bool | None, revision: str | None, commit_message: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=files[0].parent,
            allow_patterns=[path.name for path in files],
            revision=revision,
            commit_message=commit_message,
        )
    except Exception as error:  # clients raise many kinds
        raise CheckpointError(
            f"The adapter could not be uploaded to {api.endpoint}/{repo_id} ({reason_of(error)}). {_advice(error)}"
        ) from error
    return str(commit.commit_url)


def _advice(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE, or see what would be uploaded with dry_run=True."
    if status_of(error) in (401, 403, 404):
        return "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write to this repository."
    return "Call it again: a commit appears whole or not at all, and files that are there already are not sent twice."
