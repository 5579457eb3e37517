"""The handwritten digits that ship with scikit-learn, for runs without a network."""

from __future__ import annotations

from typing import Any

from PIL import Image

from nolora_vision.training.errors import RunError
from nolora_vision.training.table import Table


def digits(classes: str = "0-9") -> tuple[dict[str, Table], dict[str, Any]]:
    """1,797 real handwritten digits of 8×8 pixels that ship with scikit-learn; every fifth of a class is for the test.

    Args:
        classes: first and last digit, to take only some of them: `5-9`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    first, last = int(classes[0]), int(classes[-1])
    if first >= last:
        raise RunError(f"digits:{classes} has fewer than two classes. Wanted first-last, such as digits:5-9.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError("--dataset digits needs scikit-learn: pip install 'nolora-vision[demo]'.") from error
    bunch: Any = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype("uint8")
    seen: dict[int, int] = {}
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for i, label in enumerate(bunch.target.tolist()):
        if first <= label <= last:
            seen[label] = seen.get(label, 0) + 1
            rows["test" if seen[label] % 5 == 0 else "train"].append(i)
    names = tuple(str(digit) for digit in range(first, last + 1))

    def table(split: str, indices: list[int]) -> Table:
        images = [Image.fromarray(pixels[i]).convert("RGB") for i in indices]
        labels = [int(bunch.target[i]) - first for i in indices]
        return Table(images.__getitem__, labels, names, in_memory=True, name=split)

    name = "digits" if classes == "0-9" else f"digits:{classes}"
    return {split: table(split, indices) for split, indices in rows.items()}, {"id": name, "source": "scikit-learn"}
