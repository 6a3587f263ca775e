"""Refool: the picture and its own shifted reflection, as in a double-glazed window."""

from __future__ import annotations

import numpy as np

from sanitize.attacks import Generators, Images, SurrogateCorpus, Trigger
from sanitize.attacks.resample import resize_all

GAMMA = 2.2
SMALLEST_SHIFT, LARGEST_SHIFT = 2, 3
"""Pixels of a 32-pixel image."""


def make_offset(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """Shift of the reflection as a share of height and width, and the weight of its first copy."""
    shift = random.integers(SMALLEST_SHIFT, LARGEST_SHIFT, size=2, endpoint=True) / 32
    return {"shift": shift, "weight": np.array(random.uniform(0.35, 0.65))}


def refool(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Mix each image, in linear light, with its double image; strength is the double's share, up to 1.

    The double is two copies of the image shifted against each other, cut to where they overlap and
    enlarged to the old size.

    Source: Liu et al., 2020 (ghost effect), in the form of Lukas and Kerschbaum, 2023, appendix A.2,
    where the reflection is of the image itself and its share is 1.
    """
    height, width = images.shape[1:3]
    down = min(height - 1, max(1, round(float(trigger["shift"][0]) * height)))
    right = min(width - 1, max(1, round(float(trigger["shift"][1]) * width)))
    weight, share = np.float32(trigger["weight"]), np.float32(min(strength, 1.0))
    light = images ** np.float32(GAMMA)
    double = weight * light[:, down:, right:] + (1 - weight) * light[:, :-down, :-right]
    mixed = (1 - share) * light + share * resize_all(double, height, width)
    return np.clip(mixed, 0.0, 1.0) ** np.float32(1 / GAMMA)
