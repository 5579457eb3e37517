"""What went wrong with the Hub, in one line, and what a user can do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from nolora_vision.adapters.hub_cache import DamagedDownloadError

T = TypeVar("T")

BUSY, WAITS_S = (429, 500, 502, 503, 504), (1, 2, 4)
NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
ELSEWHERE = "set HF_ENDPOINT to a mirror"
NO_HUB = (
    "What answered is no Hub, but perhaps this network's login page: open any page in a browser, and check the proxy's "
    "settings and HF_ENDPOINT."
)
COPY = "copy the cache (HF_HOME) of a machine that has it here and set HF_HUB_OFFLINE=1"


def hub_trouble(what: str, kind: str, error: BaseException, *, cached: Sequence[str], instead: str) -> str:
    """The one message for something that could not be had from the Hub: why, what to do, what is cached.

    Args:
        what: the thing, as the user called it.
        kind: model, dataset or adapter.
        cached: those in the cache.
        instead: what would work without the Hub.
    """
    from huggingface_hub import constants

    return (
        f"{what} could not be loaded from the Hugging Face Hub, {constants.ENDPOINT} ({reason_of(error)}).\n"
        f"{advice_for(error)}\n"
        f"In the cache: {', '.join(cached) if cached else f'no {kind}s'}. {instead}"
    )


def reason_of(error: BaseException) -> str:
    """The cause in one line."""
    cause = telling(error)
    text = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    return f"{type(cause).__name__}: {text}"[:300]


def advice_for(error: BaseException) -> str:
    """What can be done about it, in a line."""
    from huggingface_hub import constants, errors

    cause, status = telling(error), status_of(error)
    if isinstance(cause, DamagedDownloadError):
        return (
            "Delete it, and run once without HF_HUB_OFFLINE."
            if cause.kept
            else "It came damaged twice and was not kept. Something on the way alters or cuts files, a proxy or a "
            f"mirror: try another network, or {ELSEWHERE}."
        )
    if isinstance(cause, ConnectionError) and constants.HF_HUB_OFFLINE:  # datasets forgets what led to its own
        return f"HF_HUB_OFFLINE=1 is set: unset it to download it, where needed {ELSEWHERE}, or {COPY}."
    if isinstance(cause, errors.FileMetadataError):
        return NO_HUB
    if status in (401, 403, 404):
        return (
            "Perhaps it does not exist there, or is private or gated: check its name, and HF_ENDPOINT if that is set. "
            "For a private one log in with `hf auth login`, or set HF_TOKEN."
        )
    if status == 429:
        return f"Too many requests came from here: wait some minutes, log in with `hf auth login`, or {ELSEWHERE}."
    if status is not None:
        return f"The Hub is in trouble: try again later, or {ELSEWHERE}."
    if type(cause).__module__.split(".")[0] in NETWORK or isinstance(cause, (ConnectionError, TimeoutError)):
        return (
            "Run it again: what has come whole is kept, and nothing else. On a slow line set HF_HUB_DOWNLOAD_TIMEOUT=60"
            f" (seconds). Without internet: {ELSEWHERE}, or {COPY}."
        )
    return "It is here as the Hub has it, but cannot be read: it may be damaged there, or of another kind."


def patiently(ask: Callable[[], T]) -> T:
    """Ask again while the Hub is busy: its client does so where it asks for a file, but not where it asks which are."""
    for seconds in WAITS_S:
        try:
            return ask()
        except Exception as error:
            response = getattr(telling(error), "response", None)
            if status_of(error) not in BUSY or "/api/" not in str(getattr(response, "url", "")):
                raise
            time.sleep(seconds)
    return ask()


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception, or what led to it, is about."""
    return next((status for cause in _chain(error) if (status := _own_status(cause)) is not None), None)


def telling(error: BaseException) -> BaseException:
    """The exception that says what happened, among those that led to this one; the outermost often say only where."""
    from huggingface_hub import errors

    known = (DamagedDownloadError, errors.OfflineModeIsEnabled, errors.FileMetadataError)
    for cause in _chain(error):
        if isinstance(cause, known) or _own_status(cause) is not None:
            return cause
    return next((cause for cause in _chain(error) if not isinstance(cause, FileNotFoundError)), error)


def _own_status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
