"""Reading any image as upright RGB, or saying why it cannot be read."""

from __future__ import annotations

import os
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

NOT_PHOTOS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows but reads by other programs or not at all: never opened, whatever a file's name says."""
PIL_LIMIT_FACTOR = 2
"""Pillow itself refuses an image of more than so many times `PIL.Image.MAX_IMAGE_PIXELS`."""

MOST_ELONGATED = 1000
"""Longer side over shorter: the shorter one is scaled to the model's size, 224 or so, and the longer with it."""


class UnreadableImageError(ValueError):
    """A file that is no whole image; the message says why, without its path."""


def read_image(path: str) -> Image:
    """An image as RGB, upright: EXIF orientation applied, the first frame of several.

    Transparent pixels are put on white. 16-bit greys are scaled to 8 bits; floating-point ones are taken as 0 to 1,
    or as 0 to 255 if a value is above 1. Colour profiles are not applied.

    Raises:
        UnreadableImageError: if the file is absent, no image, damaged, or of more pixels than Pillow allows.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UnreadableImageError("neither a file nor a folder")  # reading a pipe might never end
    try:
        return _decoded(path)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise UnreadableImageError(_reason(path, error)) from error


def decode_image(data: bytes) -> Image:
    """What `read_image` gives of a file with these bytes.

    Raises:
        UnreadableImageError: if they are no whole image.
    """
    try:
        return _decoded(BytesIO(data))
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"damaged ({type(error).__name__})") from error


def as_rgb(image: Image) -> Image:
    """An opened image as RGB, upright."""
    return to_rgb(_upright(image))


def to_rgb(image: Image) -> Image:
    """The same picture in RGB, from any mode of Pillow."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_suffixes() -> frozenset[str]:
    """Suffixes, with their dot, of the files that Pillow reads."""
    from PIL import Image

    formats = set(_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _decoded(source: str | BytesIO) -> Image:
    from PIL import Image

    with Image.open(source, formats=_formats()) as opened:
        _refuse_shape(opened.size)
        opened.load()
        return as_rgb(opened)


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name not in NOT_PHOTOS]


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, of which there is much: the image itself is whole
        return image


def _refuse_shape(size: tuple[int, int]) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > PIL_LIMIT_FACTOR * limit:
        raise UnreadableImageError(_too_many_pixels())
    if max(size) > MOST_ELONGATED * min(size):
        raise UnreadableImageError(f"{size[0]} × {size[1]} pixels, too long a strip to be scaled to the model's size")


def _too_many_pixels() -> str:
    from PIL import Image

    return f"more than {PIL_LIMIT_FACTOR * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which might exhaust the memory"


def _reason(path: str, error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError, __version__

    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return "an empty file"
        return f"no image of a kind that Pillow {__version__} reads"
    if isinstance(error, Image.DecompressionBombError):
        return _too_many_pixels()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return f"damaged ({str(error).split(chr(10))[0].rstrip('.') or type(error).__name__})"


def _grey_to_8_bits(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    scale = 255 if image.mode == "F" and values.max(initial=0) <= 1 else 1 if image.mode == "F" else 255 / 65535
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _lab_to_rgb(image: Image) -> Image:
    from PIL import ImageCms

    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # it is only where the image is changed in place
    return converted
