"""From an encoded image to the 8 bits a channel that its author saw: every mode by its meaning, and the right way up.

* 16-bit grey (also 9 to 15 bits of a TIFF) is scaled to 8 bits, white to white; Pillow's own conversion cuts it off.
* What is transparent shows a white ground (:data:`GROUND`).
* Palettes, CMYK, YCbCr, Lab and 1-bit become RGB or grey as Pillow does it; 16-bit colour it has already cut to 8 bits.
* EXIF's orientation is applied.
* Floating point and 32-bit integers are refused: nothing in the file says which number is white.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np

from masa.errors import MasaError

GROUND = 255
"""What is seen through transparent pixels: white."""

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright, 5 to 8 exchange width and height."""

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose 32-bit mode of Pillow holds 16 bits."""


def decode(data: bytes, channels: int, name: str) -> np.ndarray:
    """Pixels (H, W, channels) uint8 of an encoded image, upright.

    Grey images become RGB where three channels are wanted, and colours grey where one is.

    Args:
        data: the file's bytes.
        channels: 1 or 3.
        name: where it comes from, for messages.

    Raises:
        MasaError: the image is corrupt, or of a kind that does not say what is white.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            image = _eight_bits(_upright(image), name)
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except UnidentifiedImageError as error:  # whose own message names a place in memory
        what = f"its first bytes are {data[:8]!r}" if data else "it is empty"
        raise MasaError(f"{name}: the image is corrupt, or of no format that Pillow reads ({what}).") from error
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise MasaError(f"{name}: the image is corrupt ({error}).") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def orientation(data: bytes) -> int:
    """EXIF's orientation of an image that :func:`decode` takes: 1, upright, where it says nothing readable."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return _orientation(image)


def _orientation(image: Any) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF beside whole pixels, of which Pillow raises whatever it stumbles over
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Any) -> Any:
    """The image turned and mirrored as EXIF says; a TIFF is so already once it is loaded."""
    from PIL import Image

    turns = Image.Transpose
    how = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(_orientation(image))
    return image if how is None else _like(image, image.transpose(how))


def _like(image: Any, turned: Any) -> Any:
    """Transposing keeps the pixels alone; the file's format and tags say what they mean."""
    turned.format, turned.info = image.format, image.info
    return turned


def _eight_bits(image: Any, name: str) -> Any:
    """The image in a mode of 8 bits a channel without transparency."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return Image.fromarray(_grey(image))
    if image.mode in ("I", "F"):
        what = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise MasaError(
            f"{name}: the pixels of this {image.format} are {what}, and nothing says which of them is white. Save it "
            "with 8 or 16 bits a channel."
        )
    if not image.has_transparency_data:
        return image
    seen = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    ground = Image.new("RGBA", seen.size, (GROUND, GROUND, GROUND, 255))
    return Image.alpha_composite(ground, seen)


def _grey(image: Any) -> np.ndarray:
    """(H, W) uint8 of 16-bit grey, or of the fewer bits that a TIFF says it has."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** int(tags.get(258, (16,))[0]) - 1
    values = np.asarray(image).astype(np.int64).clip(0, white)
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero
        grey = 255 - grey
    clear = image.info.get("transparency")
    return np.where(values == clear, np.uint8(GROUND), grey) if isinstance(clear, int) else grey
