"""WaNet: a fixed smooth warp of the image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.attacks import Generators, Images, SurrogateCorpus, Trigger
from sanitize.attacks.resample import BICUBIC, resize

CONTROL_POINTS = 4
WARPING_STRENGTH = 1.5
"""Three times the 0.5 of the original."""


def make_field(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """(4, 4, 2) random shifts (right, down) with a mean size of 1."""
    field = random.uniform(-1, 1, (CONTROL_POINTS, CONTROL_POINTS, 2))
    return {"field": (field / np.abs(field).mean()).astype(np.float32)}


def wanet(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Sample every pixel from a place shifted by 1.5 / 2 pixels of a 32-pixel image on average.

    The 4x4 field is made smooth by bicubic interpolation; places outside are taken at the border. Strength
    multiplies the shifts.

    Source: Nguyen and Tran, 2021, with the strength of Lukas and Kerschbaum, 2023, appendix A.2.
    """
    height, width = images.shape[1:3]
    field = resize(trigger["field"], height, width, BICUBIC) * (WARPING_STRENGTH * strength / 2 / 32)
    columns = np.clip(np.arange(width)[None, :] + field[..., 0] * (width - 1), 0, width - 1)
    rows = np.clip(np.arange(height)[:, None] + field[..., 1] * (height - 1), 0, height - 1)
    return sample_bilinear(images, rows, columns)


def sample_bilinear(
    images: Images, rows: npt.NDArray[np.floating], columns: npt.NDArray[np.floating]
) -> Images:
    """(N, H, W, C) read at (h, w) fractional places inside the image."""
    height, width = images.shape[1:3]
    top = np.minimum(rows.astype(np.int64), max(height - 2, 0))
    left = np.minimum(columns.astype(np.int64), max(width - 2, 0))
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down = (rows - top).astype(np.float32)[..., None]
    across = (columns - left).astype(np.float32)[..., None]
    upper = images[:, top, left] * (1 - across) + images[:, top, right] * across
    lower = images[:, bottom, left] * (1 - across) + images[:, bottom, right] * across
    return np.asarray(upper * (1 - down) + lower * down, np.float32)
