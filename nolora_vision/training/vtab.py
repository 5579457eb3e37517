"""The 19 tasks of VTAB-1k in their three groups, and the two averages that papers report of them.

Source: X. Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

VTAB_GROUPS: Mapping[str, Mapping[str, int]] = {
    "natural": {
        "cifar": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
    },
    "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}
"""Classes of each task, by group, in the order of papers' tables; named as the folders of the community's copy."""

VTAB_TASKS: Mapping[str, int] = {task: classes for group in VTAB_GROUPS.values() for task, classes in group.items()}
"""Classes of each task."""


def vtab_averages(scores: Mapping[str, float]) -> tuple[float, float]:
    """The mean of the three groups' means, and the mean of all 19 tasks.

    The groups have 7, 4 and 8 tasks, so the two are about two points apart: a comparison has to say which it shows.

    Args:
        scores: by task; all 19.

    Raises:
        ValueError: if a task is missing or unknown.
    """
    missing, unknown = sorted(VTAB_TASKS.keys() - scores), sorted(scores.keys() - VTAB_TASKS.keys())
    if missing or unknown:
        raise ValueError(
            f"An average over VTAB-1k needs a score of each of its {len(VTAB_TASKS)} tasks and no others; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    groups = [fmean(scores[task] for task in group) for group in VTAB_GROUPS.values()]
    return fmean(groups), fmean(scores.values())
