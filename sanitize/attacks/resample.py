"""Resizing of float arrays, as smooth triggers and surrogates need it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def resize(
    array: npt.NDArray[np.float32], height: int, width: int, how: Image.Resampling = BILINEAR
) -> npt.NDArray[np.float32]:
    """(h, w, C) float32 to (height, width, C); antialiased where it shrinks, unchanged where it fits."""
    if array.shape[:2] == (height, width):
        return array
    planes = [Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in range(array.shape[2])]
    return np.stack([np.asarray(p.resize((width, height), how), np.float32) for p in planes], axis=2)


def resize_all(images: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """(N, h, w, C) float32 to (N, height, width, C), bilinear."""
    if images.shape[1:3] == (height, width):
        return images
    resized = np.empty((len(images), height, width, images.shape[3]), np.float32)
    for number, image in enumerate(images):
        resized[number] = resize(image, height, width)
    return resized
