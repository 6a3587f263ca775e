"""Pixels and files: every image of a poisoned corpus is decoded, and written, in the same way."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sanitize.corpus.pixels import MAX_PIXELS
from sanitize.errors import UsageError

FORMATS = {"png": "PNG", "jpg": "JPEG"}


def check_format(image_format: str, quality: int) -> None:
    """Raises UsageError for a format or quality that cannot be written."""
    if image_format not in FORMATS:
        raise UsageError(f"--format {image_format}: expected {' or '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: expected 1 to 100")


def decode(data: bytes) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) uint8 at the image's own size, or None for what a scan would not decode either.

    Grey, palette and CMYK images are converted, 16-bit ones scaled to 8 bits, alpha is dropped, EXIF rotation
    is ignored: as in `sanitize.corpus.pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on odd palettes is nothing a user can act on
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS or getattr(image, "n_frames", 1) > 1:
                    return None
                return np.array(_to_rgb(image))
    except Image.DecompressionBombError:
        return None
    # Pillow's decoders raise almost anything on damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError):
        return None
    except (struct.error, zlib.error):
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def encode(pixels: npt.NDArray[np.uint8], image_format: str, quality: int) -> bytes:
    """PNG, or JPEG with 4:2:0 chroma; no metadata."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "subsampling": "4:2:0"} if image_format == "jpg" else {}
    Image.fromarray(pixels).save(buffer, FORMATS[image_format], **options)
    return buffer.getvalue()
