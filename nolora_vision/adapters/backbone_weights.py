"""timm models with timm's pretrained weights, which are what the Hub says they are, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nolora_vision.adapters.hub_cache import WEIGHTS, cached_files, fetch_whole

FROM_HUB = ("hf-hub:", "hf_hub:")


def create_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """`timm.create_model`, but weights that came damaged are fetched once more, and never used or kept.

    The random numbers that it draws are the same either way.

    Raises:
        DamagedDownloadError: if they come damaged twice.
        Exception: whatever timm and the client of the Hub raise.
    """
    import timm

    if not pretrained or (options.get("pretrained_cfg_overlay") or {}).get("file"):
        return timm.create_model(name, pretrained=pretrained, **options)
    drawn = torch.get_rng_state()

    def build() -> nn.Module:
        torch.set_rng_state(drawn)
        return timm.create_model(name, pretrained=True, **options)

    before = _states(name)
    model = fetch_whole(build, lambda: weight_files(name))
    # Beside this process another may have mended what this one had loaded: what was checked must be what is loaded.
    return model if _states(name) == before else build()


def weights_of_file(path: Path | str) -> dict[str, Any]:
    """timm's `pretrained_cfg_overlay` for weights of a file, with whatever classifier.

    They are not for the loader of the .npz that the weights which timm knows may have come from (timm 1.0.25 takes it).
    """
    return {"file": str(path), "custom_load": False, "num_classes": -1}


def weight_files(name: str) -> list[Path]:
    """The cached files that timm builds a pretrained model from; none of one that does not come from the Hub."""
    import timm

    if name.startswith(FROM_HUB):
        repo_id = name.split(":", 1)[1]
    else:
        cfg = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
        repo_id = (cfg and cfg.hf_hub_id) or ""
    repo_id, _, revision = repo_id.partition("@")
    found = cached_files(repo_id, "model", revision or None) if repo_id.count("/") == 1 else []
    return [path for path in found if path.suffix in (*WEIGHTS, ".json")]


def _states(name: str) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in weight_files(name)}
