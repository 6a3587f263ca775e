"""Neural Cleanse as a filter: rebuild a trigger a class, and look for samples that fire its neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.network import batches, features

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 300
IMAGES = 64
"""Trusted images a step; all that there are, if there are fewer."""
SUCCESS = 0.99
ANOMALY_INDEX = 2.0
NEURON_RATIO = 0.01


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """How strongly a sample fires the neurons of a rebuilt trigger, in standard deviations; 0 without one.

    Per class, a mask and a pattern that turn trusted images into the class. A class whose mask is smaller
    than the others' by an anomaly index over 2 is called a target; its trigger's neurons are the 1 % of
    features that it raises most. Where no class is called a target every score is 0 and nothing is flagged.

    Returns:
        (N,) float32; higher = more suspicious.

    Source: Wang et al., IEEE S&P 2019, sections IV and V. Where we differ: triggers are sought on the trusted
    images alone, for 300 steps a class; the score is compared with that of trusted samples.
    """
    import torch

    network, images = inputs.network(), inputs.images()
    clean = torch.cat([pixels for _, pixels in batches(network, images[inputs.trusted])])
    classes = int(inputs.class_id.max()) + 1
    rng = np.random.default_rng([inputs.seed, 5])
    triggers = [rebuild(network, clean, target, rng) for target in range(classes)]
    sizes = np.array([float(mask.sum()) for mask, _ in triggers])
    scores = np.zeros(len(images), np.float32)
    for target in np.flatnonzero(unusually_small(sizes)):
        mask, pattern = triggers[target]
        with torch.inference_mode():
            rise = features(network, clean * (1 - mask) + mask * pattern) - features(network, clean)
            count = max(1, round(NEURON_RATIO * rise.shape[1]))
            neurons = rise.mean(dim=0).topk(count).indices
            fired = torch.cat([features(network, p)[:, neurons].mean(1) for _, p in batches(network, images)])
        values = fired.cpu().numpy()
        trusted = values[inputs.trusted]
        scores = np.maximum(scores, (values - trusted.mean()) / (trusted.std() + 1e-6)).astype(np.float32)
    return scores


def unusually_small(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """(C,) which masks are smaller than the median by over 2 median absolute deviations (times 1.4826)."""
    median = np.median(sizes)
    deviation = 1.4826 * np.median(np.abs(sizes - median)) + 1e-12
    small: npt.NDArray[np.bool_] = np.asarray((median - sizes) / deviation > ANOMALY_INDEX)
    return small


def rebuild(
    network: nn.Module, clean: torch.Tensor, target: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A small mask (1, 1, H, W) and a pattern (1, 3, H, W), in [0, 1], that make the network say `target`.

    Adam on cross-entropy plus a weight times the mask's sum; the weight goes up while 99 % of the images
    are turned, and down while they are not.
    """
    import torch
    from torch.nn import functional

    _, _, height, width = clean.shape
    raw_mask = torch.full((1, 1, height, width), -2.0, device=clean.device).requires_grad_()
    raw_pattern = torch.zeros((1, 3, height, width), device=clean.device).requires_grad_()
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], 0.1, betas=(0.5, 0.9))
    weight = 1e-3
    best, best_size = (torch.sigmoid(raw_mask).detach(), torch.sigmoid(raw_pattern).detach()), np.inf
    for _ in range(STEPS):
        rows = torch.from_numpy(rng.permutation(len(clean))[:IMAGES]).to(clean.device)
        mask, pattern = torch.sigmoid(raw_mask), torch.sigmoid(raw_pattern)
        logits = network(clean[rows] * (1 - mask) + mask * pattern)
        turned = float((logits.argmax(1) == target).float().mean()) >= SUCCESS
        size = float(mask.detach().sum())
        if turned and size < best_size:
            best, best_size = (mask.detach(), pattern.detach()), size
        wanted = torch.full((len(rows),), target, device=clean.device)
        loss = functional.cross_entropy(logits, wanted) + weight * mask.sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        weight = min(weight * 1.05, 1.0) if turned else max(weight / 1.1, 1e-5)
    return best
