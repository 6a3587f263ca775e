"""Neural Cleanse as a filter: rebuild a trigger a class, and look for samples that fire its neurons."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import Images, ScoreInputs
from sanitize.scores.network import batches, device_of, features, pixels_of

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 300
IMAGES = 64
"""Trusted images a step; all that there are, if there are fewer."""
SUCCESS = 0.99
ANOMALY_INDEX = 2.0
NEURON_RATIO = 0.01
NO_TARGET = "neural-cleanse calls no class a target: every score is 0, and the method removes nothing"


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """How strongly a sample fires the neurons of a rebuilt trigger, in standard deviations; 0 without one.

    Per class, a mask and a pattern that turn trusted images into the class. A class whose mask is smaller
    than the others' by an anomaly index over 2 is called a target; its trigger's neurons are the 1 % of
    features that it raises most; with several targets the largest of their scores counts. Where no class is
    called a target the original removes nothing: every score is 0, and a warning says so.

    Returns:
        (N,) float32, unbounded; higher = more suspicious.

    Source: Wang et al., IEEE S&P 2019, sections IV to VI. Where we differ: triggers are sought on the trusted
    images alone, for 300 steps a class; several targets share one threshold, in deviations from the trusted
    samples, where Alex et al. (ICLR 2025) split a false-positive rate of 5 % between them.
    """
    network, images = inputs.network(), inputs.images()
    clean = images[inputs.trusted]
    classes = int(inputs.class_id.max()) + 1
    rng = np.random.default_rng([inputs.seed, 5])
    triggers = [rebuild(network, clean, [target], rng) for target in range(classes)]
    sizes = np.array([float(mask.sum()) for mask, _ in triggers])
    targets = np.flatnonzero(unusually_small(sizes))
    if not len(targets):
        warnings.warn(NO_TARGET, stacklevel=2)
        return np.zeros(len(images), np.float32)
    fired = np.stack([firing(network, images, clean, *triggers[target]) for target in targets])
    calm = fired[:, inputs.trusted]
    deviations = (fired - calm.mean(axis=1, keepdims=True)) / (calm.std(axis=1, keepdims=True) + 1e-6)
    return deviations.max(axis=0).astype(np.float32)  # type: ignore[no-any-return]


def firing(
    network: nn.Module,
    images: Images,
    clean: npt.NDArray[np.uint8],
    mask: torch.Tensor,
    pattern: torch.Tensor,
) -> npt.NDArray[np.float32]:
    """(N,) mean activation, on each image, of the neurons that a trigger raises most on clean images."""
    import torch

    with torch.inference_mode():
        rises = [
            (features(network, pixels * (1 - mask) + mask * pattern) - features(network, pixels)).sum(dim=0)
            for _, pixels in batches(network, clean)
        ]
        rise = torch.stack(rises).sum(dim=0)
        neurons = rise.topk(max(1, round(NEURON_RATIO * len(rise)))).indices
        found = [features(network, pixels)[:, neurons].mean(dim=1) for _, pixels in batches(network, images)]
        return torch.cat(found).cpu().numpy()


def unusually_small(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """(C,) which masks are smaller than the median by over 2 median absolute deviations (times 1.4826)."""
    median = np.median(sizes)
    deviation = 1.4826 * np.median(np.abs(sizes - median)) + 1e-12
    small: npt.NDArray[np.bool_] = np.asarray((median - sizes) / deviation > ANOMALY_INDEX)
    return small


def rebuild(
    network: nn.Module,
    clean: npt.NDArray[np.uint8],
    targets: Sequence[int],
    rng: np.random.Generator,
    *,
    steps: int = STEPS,
    images: int = IMAGES,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Small masks (K, 1, H, W) and patterns (K, 3, H, W), in [0, 1], that make the network say K targets.

    Adam on cross-entropy plus a weight times the mask's sum; the weight goes up while 99 % of the images
    are turned, and down while they are not. The smallest mask that turned a batch, or else the last one.
    The targets share batches of images and nothing else.

    Args:
        network: takes (B, 3, H, W) float32 in [0, 1].
        clean: (N, H, W, 3) uint8.
        targets: (K,) class ids.
        steps: for each target.
        images: a step and target.
        advance: told K after each step.
    """
    import torch
    from torch.nn import functional

    place, count = device_of(network), len(targets)
    wanted = torch.tensor(targets, device=place)
    raw_mask = torch.full((count, 1, *clean.shape[1:3]), -2.0, device=place).requires_grad_()
    raw_pattern = torch.zeros((count, 3, *clean.shape[1:3]), device=place).requires_grad_()
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], 0.1, betas=(0.5, 0.9))
    weight = torch.full((count,), 1e-3, device=place)
    best_size = torch.full((count,), torch.inf, device=place)
    best_mask, best_pattern = torch.sigmoid(raw_mask).detach(), torch.sigmoid(raw_pattern).detach()
    for _ in range(steps):
        pixels = pixels_of(network, clean[rng.permutation(len(clean))[:images]])
        mask, pattern = torch.sigmoid(raw_mask), torch.sigmoid(raw_pattern)
        stamped = pixels[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
        logits = network(stamped.flatten(0, 1)).float()
        labels = wanted.repeat_interleave(len(pixels))
        turned = (logits.argmax(1) == labels).view(count, -1).float().mean(1) >= SUCCESS
        size = mask.detach().sum((1, 2, 3))
        better = (turned & (size < best_size)) | ~torch.isfinite(best_size)
        best_mask[better], best_pattern[better] = mask.detach()[better], pattern.detach()[better]
        best_size = torch.where(turned, torch.minimum(size, best_size), best_size)
        loss = functional.cross_entropy(logits, labels, reduction="none").view(count, -1).mean(1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((loss + weight * mask.sum((1, 2, 3))).sum())
        optimizer.step()
        weight = torch.where(turned, (weight * 1.05).clamp(max=1.0), (weight / 1.1).clamp(min=1e-5))
        advance(count)
    return best_mask, best_pattern
