"""Pixels and files: every image of a poisoned corpus is decoded, and written, in the same way."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sanitize.corpus import pixels
from sanitize.errors import UsageError

FORMATS = {"png": "PNG", "jpg": "JPEG"}


def check_format(image_format: str, quality: int) -> None:
    """Raises UsageError for a format or quality that cannot be written."""
    if image_format not in FORMATS:
        raise UsageError(f"--format {image_format}: expected {' or '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: expected 1 to 100")


def decode(data: bytes) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) uint8 at the image's own size, or None for what a scan would not decode either."""
    try:
        return pixels.decode(data, None)
    except pixels.ImageError:
        return None


def encode(image: npt.NDArray[np.uint8], image_format: str, quality: int) -> bytes:
    """PNG, or JPEG with 4:2:0 chroma; no metadata."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "subsampling": "4:2:0"} if image_format == "jpg" else {}
    Image.fromarray(image).save(buffer, FORMATS[image_format], **options)
    return buffer.getvalue()
