"""Poisoned sample sensitivity: what a strong transformation does to the features of a sample."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import Images, ScoreInputs
from sanitize.scores.network import batches, device_of, features, pixels_of

if TYPE_CHECKING:
    import torch
    from torch import nn

EPOCHS = 3
"""Of intra-class training, as Alex et al. (ICLR 2025, appendix I.2); the original takes ten."""
BATCH = 128
LEARNING_RATE = 0.01
DEGREES = 180.0
"""Rotations are drawn between this much either way."""
SHIFT = 0.2
"""Translations are drawn up to this share of the side."""
DRAWS = 4


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Mean squared distance between the features of an image and of four transformed copies of it.

    A transformation takes a trigger out of its place while the object stays recognisable, so that the
    features of a poisoned sample move more. Before that, a copy of the proxy is trained for three epochs to
    push the features of different classes apart, which parts poison from the clean samples of its target.

    Returns:
        (N,) float32, 0 or more; higher = more suspicious.

    Source: Chen, Wu and Wang, NeurIPS 2022, the FCT metric under rotation and affine maps after training with
    the intra-class loss. Where we differ: that training starts from the scan's proxy rather than from a
    network of two epochs; four transformed copies instead of one, with mirrored instead of black margins;
    the original and Alex et al. unlearn the 5 % of the corpus that move most, here a threshold decides.
    """
    import torch

    images = inputs.images()
    rng = np.random.default_rng([inputs.seed, 4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed)  # for networks with dropout
        network = with_classes_apart(inputs.network(), images, inputs.class_id, rng)
    scores = np.zeros(len(images), np.float32)
    with torch.inference_mode():
        for rows, pixels in batches(network, images):
            before = features(network, pixels)
            for _ in range(DRAWS):
                after = features(network, moved(pixels, rng))
                scores[rows] += (after - before).square().mean(dim=1).cpu().numpy() / DRAWS
    return scores


def with_classes_apart(
    network: nn.Module,
    images: Images,
    class_id: npt.NDArray[np.int32],
    rng: np.random.Generator,
) -> nn.Module:
    """A copy of the network, trained on to bring down the intra-class loss; in eval mode.

    Args:
        images: (N, H, W, 3) uint8.
        class_id: (N,) int32.
    """
    import torch

    trained = copy.deepcopy(network).train().requires_grad_()
    labels = torch.from_numpy(class_id.astype(np.int64)).to(device_of(trained))
    optimizer = torch.optim.SGD(trained.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(len(images)), -(-len(images) // BATCH)):
            loss = likeness(features(trained, pixels_of(trained, images[rows])), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
    return trained.eval()


def likeness(seen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the mean features of different classes, those with themselves counted as 0.

    Args:
        seen: (B, D) features.
        labels: (B,) int64.
    """
    import torch
    from torch.nn import functional

    present, position = torch.unique(labels, return_inverse=True)
    sums = seen.new_zeros(len(present), seen.shape[1]).index_add(0, position, seen)
    directions = functional.normalize(sums, dim=1)
    cosines = directions @ directions.T
    return (cosines.sum() - cosines.trace()) / cosines.numel()


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
