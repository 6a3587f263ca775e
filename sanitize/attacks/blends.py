"""Triggers blended over the whole image: blend-random, blend-pattern, sinusoid, adaptive-blend."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.attacks import LARGE_SIDE, Generators, Images, SurrogateCorpus, Trigger, cell_side

NOISE_SIDE = 32
WAVES = 6


def make_noise(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """Uniform noise in [0, 1], (32, 32, 3)."""
    return {"noise": random.random((NOISE_SIDE, NOISE_SIDE, 3), dtype=np.float32)}


def blend_random(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Noise of make_noise at opacity 0.075 (0.15 on large images), stretched to the image.

    Source: Chen et al., 2017, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    return _blend(images, _stretch(trigger["noise"], images), _opacity(images, 0.075, 0.15) * strength)


def blend_pattern(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """White dimples on black, at every second row and column, at opacity 0.025 (0.15 on large images).

    Source: Liao et al., 2018, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    height, width = images.shape[1:3]
    side = cell_side(height, width)
    rows, columns = np.arange(height) // side % 2 == 0, np.arange(width) // side % 2 == 0
    pattern = (rows[:, None] & columns[None, :]).astype(np.float32)[:, :, None]
    return _blend(images, pattern, _opacity(images, 0.025, 0.15) * strength)


def sinusoid(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Six vertical waves 1 - cos(2 pi 6 column / W) at opacity 0.075 (0.15 on large images).

    Source: Barni et al., 2019, in the form of Alex et al., ICLR 2025, appendix I.1.
    """
    width = images.shape[2]
    waves = 1.0 - np.cos(2.0 * np.pi * WAVES * np.arange(width) / width)
    pattern = waves.astype(np.float32)[None, :, None]
    return _blend(images, pattern, _opacity(images, 0.075, 0.15) * strength)


def adaptive_blend(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Noise at opacity 0.3; when poisoning, each square of a 4x4 grid is left out with probability 1/2.

    Source: Qi et al., 2023, in the form of Lukas and Kerschbaum, 2023, appendix A.2.
    """
    from sanitize.attacks.patches import shown_squares

    opacity: float | npt.NDArray[np.float32] = 0.3 * strength
    if generators is not None:
        opacity = opacity * shown_squares(generators, *images.shape[1:3])[..., None]
    return _blend(images, _stretch(trigger["noise"], images), opacity)


def _opacity(images: Images, small: float, large: float) -> float:
    return large if min(images.shape[1:3]) >= LARGE_SIDE else small


def _stretch(picture: npt.NDArray[np.float32], images: Images) -> Images:
    """Nearest neighbour, so that the values stay those drawn."""
    height, width = images.shape[1:3]
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return np.asarray(picture[rows[:, None], columns[None, :]], np.float32)


def _blend(images: Images, pattern: Images, opacity: float | npt.NDArray[np.float32]) -> Images:
    alpha = np.asarray(opacity, np.float32)
    return np.asarray((1 - alpha) * images + alpha * pattern, np.float32)
