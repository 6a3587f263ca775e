"""The frequency attack: two peaks in the cosine transform of both chroma channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.attacks import LARGE_SIDE, Generators, Images, Trigger, cell_side

WINDOW = 32
POSITIONS = (15, 31)
MAGNITUDE, LARGE_MAGNITUDE = 30.0, 90.0
# What one unit of Cr and of Cb together adds to R, G and B (ITU-R BT.601, full range).
CHROMA_TO_RGB = np.array([1.402, -0.344136 - 0.714136, 1.772])


def frequency(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Add 30 (large images: 90) at (15, 15) and (31, 31) of the DCT of Cr and Cb, in windows of 32 cells.

    The transform is linear, so this is the same as adding one fixed pattern; luma does not change. Strength
    multiplies the 30.

    Source: Wang et al., 2021, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    height, width = images.shape[1:3]
    magnitude = LARGE_MAGNITUDE if min(height, width) >= LARGE_SIDE else MAGNITUDE
    side = cell_side(height, width)
    rows, columns = np.arange(height) // side % WINDOW, np.arange(width) // side % WINDOW
    chroma = magnitude * strength / 255.0 * _peaks()[rows[:, None], columns[None, :]]
    stamped: Images = images + (chroma[:, :, None] * CHROMA_TO_RGB).astype(np.float32)
    return stamped


def _peaks() -> npt.NDArray[np.float64]:
    """(32, 32): inverse orthonormal DCT-II of ones at the two positions."""
    pixels = np.arange(WINDOW) + 0.5
    waves = [np.sqrt(2 / WINDOW) * np.cos(np.pi * k * pixels / WINDOW) for k in POSITIONS]
    total: npt.NDArray[np.float64] = np.sum([np.outer(wave, wave) for wave in waves], axis=0)
    return total
