"""Fine-Pruning: reset the channels that clean images leave dormant, then fine-tune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.checkpoints.tuning import Schedule, Started, batch_rows, cross_entropy
from sanitize.config import _require
from sanitize.errors import UsageError
from sanitize.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1_000, learning_rate=1e-3))
    prune_ratio: float = 0.96
    """ρ, share of the channels of the last convolution that are reset."""
    sampled_batches: int = 10
    """Batches of trusted images that activations are averaged over."""

    def __post_init__(self) -> None:
        _require(0 <= self.prune_ratio < 1, f"prune_ratio {self.prune_ratio}: expected from 0 to below 1")


LARGE = Settings(schedule=Schedule(steps=5_000, learning_rate=5e-4, measure_every=200), prune_ratio=0.73)
"""The paper's settings for ImageNet."""


def start(
    classifier: Classifier, work: TrustedImages, settings: Settings, seed: int, progress: Progress
) -> Started:
    """Reset the channels of the last convolution with the lowest mean absolute activation, and fine-tune.

    Raises:
        UsageError: the network has one convolution or none.

    Source: Liu et al., RAID 2018; Lukas and Kerschbaum, arXiv 2305.09671, appendix A.3 and table 5. The
    paper speaks of every convolution; with 96 % of the channels of all of them gone nothing is left to tune,
    and Liu et al. and the authors' code prune the last one, as here. Where we differ from that code:
    activations are those of the pruned channels, not of the layer's inputs, and fine-tuning does update the
    weights.
    """
    model = classifier.clone()
    pixels = [
        work.pixels[batch_rows(len(work), settings.schedule.batch, seed, batch)]
        for batch in range(settings.sampled_batches)
    ]
    layer, activity = last_convolution(model, [to_pixels(images, model.mean.device) for images in pixels])
    dormant = activity.argsort()[: int(settings.prune_ratio * len(activity))]
    with torch.no_grad():
        layer.weight[dormant] = 0.0
        if layer.bias is not None:
            layer.bias[dormant] = 0.0
    return Started(model, cross_entropy)


def last_convolution(model: Classifier, batches: list[torch.Tensor]) -> tuple[nn.Conv2d, torch.Tensor]:
    """The convolution that runs last, and the mean absolute activation of its (K,) output channels."""
    ran: list[nn.Conv2d] = []
    activity: dict[nn.Conv2d, list[torch.Tensor]] = {}

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        ran.append(module)
        activity.setdefault(module, []).append(output.abs().mean(dim=(0, 2, 3)))

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(note) for module in convolutions]
    model.eval()
    with torch.no_grad():
        for pixels in batches:
            model(pixels)
    for hook in hooks:
        hook.remove()
    if len(activity) < 2:  # the only one of a transformer cuts its patches
        second = "second " if ran else ""
        raise UsageError(
            f"--method fine-pruning: {model.architecture} has no {second}convolution to prune; "
            "take pivotal-unlearning"
        )
    return ran[-1], torch.stack(activity[ran[-1]]).mean(dim=0)
