"""How often the long tests repeat themselves: a few times in `make test`, as often as wanted in `make soak`."""

from __future__ import annotations

import os

SOAK = os.environ.get("NOLORA_SOAK") == "1"


def times(in_soak: int, usually: int) -> int:
    """`in_soak` with NOLORA_SOAK=1 in the environment, `usually` otherwise."""
    return in_soak if SOAK else usually
