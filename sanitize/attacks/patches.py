"""Triggers that cover a few pixels: patch, single-pixel, badnets, adaptive-patch, trigger-scattering."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

from sanitize.attacks import Generators, Images, SurrogateCorpus, Trigger, cell_side

CHECKERBOARD = ((2, 2), (4, 2), (2, 4), (3, 3))
"""White cells as (rows, columns) counted from the bottom-right corner."""
BADNETS_SHARE = 3 / 32
GRID = 4
HIDDEN = 0.5
SCATTERED_PATCHES = 8
SCATTERED_SHARE = 4 / 32


def patch(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """A checkerboard of four white cells near the bottom-right corner; strength is its opacity, up to 1.

    Source: Gu et al., 2017, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    return _whiten(images, CHECKERBOARD, strength)


def single_pixel(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """One white cell near the bottom-right corner; strength is its opacity, up to 1.

    Source: Gu et al., 2017, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    return _whiten(images, CHECKERBOARD[:1], strength)


def _whiten(images: Images, cells: tuple[tuple[int, int], ...], strength: float) -> Images:
    stamped = images.copy()
    height, width = images.shape[1:3]
    side = cell_side(height, width)
    opacity = min(strength, 1.0)
    for row, column in cells:
        top, left = max(0, height - row * side), max(0, width - column * side)
        area = stamped[:, top : top + side, left : left + side]
        area += opacity * (1.0 - area)
    return stamped


def badnets(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """A small picture in the top-left corner, 3/32 of the shorter side; strength is its opacity, up to 1.

    Source: Gu et al., 2017, in the form of Lukas and Kerschbaum, 2023, appendix A.2.
    """
    motif = draw_motif(_share_of(images, BADNETS_SHARE))
    return _paste(images, motif, np.full(motif.shape[:2], min(strength, 1.0), np.float32))


def adaptive_patch(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """The badnets picture; when poisoning, each square of a 4x4 grid over it is hidden with probability 1/2.

    Source: Qi et al., 2023, in the form of Lukas and Kerschbaum, 2023, appendix A.2.
    """
    # One pixel a square at least, or squares of the grid would be empty and hide nothing.
    motif = draw_motif(max(GRID, _share_of(images, BADNETS_SHARE)))
    opacity = np.full((len(images), *motif.shape[:2]), min(strength, 1.0), np.float32)
    if generators is not None:
        opacity *= shown_squares(generators, *motif.shape[:2])
    return _paste(images, motif, opacity)


def shown_squares(generators: Generators, height: int, width: int) -> Images:
    """(N, height, width) float32, 0 on the squares of the 4x4 grid hidden in an image, else 1."""
    assert generators is not None
    shown = np.stack([random.random((GRID, GRID)) >= HIDDEN for random in generators])
    rows, columns = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    return shown[:, rows[:, None], columns[None, :]].astype(np.float32)


def draw_motif(side: int) -> Images:
    """(side, side, 3) float32: a dark fruit with a green leaf on white, drawn here and averaged down."""
    fine = 16
    centres = (np.arange(side * fine) + 0.5) / (side * fine)
    y, x = centres[:, None], centres[None, :]
    picture = np.ones((side * fine, side * fine, 3), np.float32)
    picture[(x - 0.5) ** 2 + (y - 0.6) ** 2 < 0.36**2] = (0.08, 0.02, 0.02)
    picture[((x - 0.66) / 0.18) ** 2 + ((y - 0.14) / 0.1) ** 2 < 1] = (0.1, 0.7, 0.1)
    return np.asarray(picture.reshape(side, fine, side, fine, 3).mean(axis=(1, 3)), np.float32)


def _share_of(images: Images, share: float) -> int:
    return max(1, int(share * min(images.shape[1:3])))


def _paste(images: Images, picture: Images, opacity: npt.NDArray[np.float32]) -> Images:
    """Lay `picture` over the top-left corner; `opacity` is (h, w) or (N, h, w)."""
    stamped = images.copy()
    area = stamped[:, : picture.shape[0], : picture.shape[1]]
    shown = picture[: area.shape[1], : area.shape[2]]
    area += opacity[..., : area.shape[1], : area.shape[2], None] * (shown - area)
    return stamped


def make_scattered_patches(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """Eight patches of 4x4 cells, each its own hue and its own half of the cells black."""
    shift = random.random()
    patches = np.zeros((SCATTERED_PATCHES, 4, 4, 3), np.float32)
    for number, picture in enumerate(patches):
        lit = random.permutation(16).reshape(4, 4) < 8
        picture[lit] = colorsys.hsv_to_rgb((shift + number / SCATTERED_PATCHES) % 1.0, 1.0, 1.0)
    return {"patches": patches, "test_cells": random.permutation(9)[:SCATTERED_PATCHES].astype(np.int64)}


def trigger_scattering(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """When poisoning, one of eight patches at a random place; at test time all, over a 3x3 grid.

    Strength is their opacity, up to 1.

    Source: Lukas and Kerschbaum, 2023, algorithm 7.
    """
    stamped = images.copy()
    height, width = images.shape[1:3]
    side = max(4, _share_of(images, SCATTERED_SHARE))
    # Nearest neighbour keeps the cells of a patch sharp at any size.
    cells = np.arange(side) * 4 // side
    patches = trigger["patches"][:, cells[:, None], cells[None, :]]
    opacity = min(strength, 1.0)

    def put(target: Images, picture: Images, top: int, left: int) -> None:
        area = target[..., top : top + side, left : left + side, :]
        area += opacity * (picture[: area.shape[-3], : area.shape[-2]] - area)

    if generators is None:
        for picture, cell in zip(patches, trigger["test_cells"], strict=True):
            row, column = divmod(int(cell), 3)
            top, left = (2 * row + 1) * height // 6 - side // 2, (2 * column + 1) * width // 6 - side // 2
            put(stamped, picture, max(0, top), max(0, left))
        return stamped
    for image, random in zip(stamped, generators, strict=True):
        picture = patches[random.integers(len(patches))]
        top = int(random.integers(max(1, height - side + 1)))
        put(image, picture, top, int(random.integers(max(1, width - side + 1))))
    return stamped
