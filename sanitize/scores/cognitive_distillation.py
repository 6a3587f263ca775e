"""Cognitive distillation: how little of an image the proxy needs to say what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.network import batches, fast

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_REJECT = 0.15
"""As Alex et al. (ICLR 2025, appendix I.2); the original compares with the masks of trusted samples."""
STEPS = 100
LEARNING_RATE = 0.1
MASK_WEIGHT = 0.01
SMOOTHNESS_WEIGHT = 1.0
"""Of the mask's squared steps from pixel to pixel, their sum divided by the number of pixels."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Minus the mean of the smallest mask under which the proxy's logits stay; a trigger needs a small one.

    A hundred forward and backward passes a sample: about 37 images a second on one CPU core that multiplies
    bfloat16, with the small proxy at 32 px, so that 50,000 take 23 minutes; 23 a second in float32.

    Returns:
        (N,) float32 in [-1, 0]; higher = more suspicious.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908, equations 1 to 3, with the weights of its code.
    """
    import torch

    network = inputs.network()
    scores = np.empty(len(inputs.class_id), np.float32)
    generator = torch.Generator().manual_seed(inputs.seed)
    for rows, images in batches(network, inputs.images()):
        with fast(images.device):
            scores[rows] = -mask_sizes(network, images, generator).cpu().numpy()
    return scores


def mask_sizes(network: nn.Module, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B,) mean of the distilled mask of each of (B, 3, H, W) images in [0, 1].

    The mask m in [0, 1] minimises mean |f(x) - f(x m + (1 - m) d)| + 0.01 sum m + mean TV(m), d a random
    colour for every sample and step.
    """
    import torch

    with torch.no_grad():
        wanted = network(images).float()
    # a mask of 0.88: open, but with a gradient
    raw = torch.ones_like(images[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([raw], LEARNING_RATE, betas=(0.1, 0.1))
    for _ in range(STEPS):
        mask = (torch.tanh(raw) + 1) / 2
        fill = torch.rand(len(images), 3, 1, 1, generator=generator).to(images.device)
        found = network(images * mask + (1 - mask) * fill)
        difference = (found.float() - wanted).abs().mean(dim=1)
        loss = difference + MASK_WEIGHT * mask.sum(dim=(1, 2, 3)) + SMOOTHNESS_WEIGHT * roughness(mask)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())
        optimizer.step()
    return ((torch.tanh(raw.detach()) + 1) / 2).mean(dim=(1, 2, 3))


def roughness(mask: torch.Tensor) -> torch.Tensor:
    """(B,) total variation of (B, 1, H, W): squared steps to the right and down, summed, over H times W."""
    across = (mask[:, :, :, 1:] - mask[:, :, :, :-1]).square().sum(dim=(1, 2, 3))
    down = (mask[:, :, 1:] - mask[:, :, :-1]).square().sum(dim=(1, 2, 3))
    return (across + down) / mask[0].numel()
