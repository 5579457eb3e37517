"""What timm says of a model's images, for tests that have no model."""

from typing import Any


def preprocessing(side: int) -> dict[str, Any]:
    """Squares of so many pixels, colours from -1 to 1, nothing cropped."""
    return {
        "input_size": (3, side, side),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
