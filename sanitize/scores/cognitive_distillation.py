"""Cognitive distillation: how little of an image the proxy needs to say what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.network import batches

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_REJECT = 0.15
"""As Alex et al. (ICLR 2025, appendix I.2); the original compares with the masks of trusted samples."""
STEPS = 100
LEARNING_RATE = 0.1
MASK_WEIGHT = 0.01
SMOOTHNESS_WEIGHT = 0.1


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Minus the mean of the smallest mask under which the proxy's logits stay; a trigger needs a small one.

    A hundred forward and backward passes a sample: expect a hundred times an epoch of the scan.

    Returns:
        (N,) float32 in [-1, 0]; higher = more suspicious.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908, equations 1 to 3. Where we differ: the fill of the
    hidden part is one colour a step for all samples of a batch; in the original's code each has its own.
    """
    import torch

    network = inputs.network()
    scores = np.empty(len(inputs.class_id), np.float32)
    generator = torch.Generator().manual_seed(inputs.seed)
    for rows, images in batches(network, inputs.images()):
        scores[rows] = -mask_sizes(network, images, generator).cpu().numpy()
    return scores


def mask_sizes(network: nn.Module, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B,) mean of the distilled mask of each of (B, 3, H, W) images in [0, 1].

    The mask m in [0, 1] minimises |f(x) - f(x m + (1 - m) d)| + 0.01 |m| + 0.1 TV(m), d a random colour.
    """
    import torch

    with torch.no_grad():
        wanted = network(images)
    # a mask of 0.88: open, but with a gradient
    raw = torch.ones_like(images[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([raw], LEARNING_RATE, betas=(0.1, 0.1))
    for _ in range(STEPS):
        mask = (torch.tanh(raw) + 1) / 2
        fill = torch.rand(1, 3, 1, 1, generator=generator).to(images.device)
        found = network(images * mask + (1 - mask) * fill)
        difference = (found - wanted).abs().mean(dim=1)
        across = (mask[:, :, :, 1:] - mask[:, :, :, :-1]).square().sum(dim=(1, 2, 3))
        down = (mask[:, :, 1:] - mask[:, :, :-1]).square().sum(dim=(1, 2, 3))
        size = mask.abs().sum(dim=(1, 2, 3))
        loss = difference + MASK_WEIGHT * size + SMOOTHNESS_WEIGHT * (across + down)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())
        optimizer.step()
    return ((torch.tanh(raw.detach()) + 1) / 2).mean(dim=(1, 2, 3))
