"""Which of a dataset's splits are for training, validation and test, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from nolora_vision.training.errors import RunError

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainval"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def holds_validation(name: str) -> bool:
    """Whether a training split of this name has the validation images, too: trainval, train_val-2017."""
    return re.sub(r"[-_ ]", "", name.lower()).startswith("trainval")


def role_of(name: str) -> str | None:
    """train, val or test, for a split, file or folder of this name; None for other names."""
    for role, names in SPLIT_NAMES.items():
        if any(name.lower() == n or name.lower().startswith((f"{n}-", f"{n}_")) for n in names):
            return role
    return None


def choose_splits(names: Iterable[str], where: str, test_split: str | None = None) -> dict[str, str]:
    """The name of the split for each role that has one: train, val, test.

    A name that is one word comes before longer ones, test before test_small. Where a dataset has both `train` and
    `trainval`, which holds the validation images too, it is the former.

    Args:
        where: the dataset, for messages.
        test_split: name of the split to test on, instead of the one that is called so.

    Raises:
        RunError: if there is no training split, or no such split to test on.
    """
    known = list(names)
    roles: dict[str, str] = {}
    exact = {name for names in SPLIT_NAMES.values() for name in names}
    for name in sorted(known, key=lambda name: (holds_validation(name), name.lower() not in exact)):
        if role := role_of(name):
            roles.setdefault(role, name)
    if "train" not in roles:
        raise RunError(f"{where} has no training split; it has {', '.join(known) or 'none'}.")
    if holds_validation(roles["train"]):
        roles.pop("val", None)
    if test_split is None:
        return roles
    found = test_split if test_split in known else roles.get(role_of(test_split) or "")
    if found is None or found == roles["train"]:
        raise no_such_split(where, test_split, [name for name in known if name != roles["train"]])
    return {role: name for role, name in roles.items() if name != found} | {"test": found}


def no_such_split(where: str, test_split: str, others: Iterable[str]) -> RunError:
    """The refusal of a split to test on; the training split is none."""
    names = ", ".join(others)
    advice = f"Choose --test-split from: {names}." if names else "It has none but the training split."
    return RunError(f"{where} has no split {test_split!r} to test on. {advice}")
