"""Contact sheet of an attack: clean, poisoned, and ten times their difference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

TILE, GAP = 128, 4
COLUMNS = 8
AMPLIFICATION = 10

Pixels = npt.NDArray[np.uint8]


class Column(NamedTuple):
    """One sample, three tiles of (TILE, TILE, 3)."""

    clean: Pixels
    poisoned: Pixels
    difference: Pixels


def make_column(clean: Pixels, poisoned: Pixels) -> Column:
    """Tiles of one sample; the difference is taken at full size, and black where nothing changed."""
    apart = np.abs(clean.astype(np.int16) - poisoned.astype(np.int16))
    difference = np.minimum(apart * AMPLIFICATION, 255).astype(np.uint8)
    return Column(_tile(clean), _tile(poisoned), _tile(difference))


def draw_sheet(columns: Sequence[Column]) -> bytes:
    """PNG with a row each for clean, poisoned and difference."""
    step = TILE + GAP
    sheet = np.full((3 * step + GAP, max(1, len(columns)) * step + GAP, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            top, left = GAP + y * step, GAP + x * step
            sheet[top : top + TILE, left : left + TILE] = tile
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    return buffer.getvalue()


def _tile(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Single pixels must stay visible: blocks when enlarged, averages when made smaller.
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    small = np.asarray(Image.fromarray(pixels).resize(size, how))
    tile = np.full((TILE, TILE, 3), 235, np.uint8)
    top, left = (TILE - small.shape[0]) // 2, (TILE - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile
