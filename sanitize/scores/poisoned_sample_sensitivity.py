"""Poisoned sample sensitivity: what a strong transformation does to the features of a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.network import batches, features

if TYPE_CHECKING:
    import torch

DEGREES = 180.0
"""Rotations are drawn between this much either way."""
SHIFT = 0.2
"""Translations are drawn up to this share of the side."""
DRAWS = 4


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Mean squared distance between the features of an image and of four transformed copies of it.

    A transformation takes a trigger out of its place while the object stays recognisable, so that the
    features of a poisoned sample move more.

    Returns:
        (N,) float32, 0 or more; higher = more suspicious.

    Source: Chen, Wu and Wang, NeurIPS 2022 (sensitivity of poisoned samples), the FCT metric under rotation
    and affine maps. Where we differ: features are those of the scan's proxy as it is; the original first
    trains for some epochs with an intra-class loss, and calls the least sensitive samples clean.
    """
    import torch

    network = inputs.network()
    scores = np.zeros(len(inputs.class_id), np.float32)
    rng = np.random.default_rng([inputs.seed, 4])
    with torch.inference_mode():
        for rows, images in batches(network, inputs.images()):
            before = features(network, images)
            for _ in range(DRAWS):
                after = features(network, moved(images, rng))
                scores[rows] += (after - before).square().sum(dim=1).cpu().numpy() / DRAWS
    return scores


def moved(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(B, 3, H, W) images, each rotated and shifted by its own draw; what comes in from outside mirrors."""
    import torch
    from torch.nn import functional

    angle = np.deg2rad(rng.uniform(-DEGREES, DEGREES, len(images)))
    shift = 2 * rng.uniform(-SHIFT, SHIFT, (len(images), 2))
    maps = np.empty((len(images), 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = np.cos(angle)
    maps[:, 0, 1], maps[:, 1, 0] = -np.sin(angle), np.sin(angle)
    maps[:, :, 2] = shift
    theta = torch.from_numpy(maps.astype(np.float32)).to(images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
