"""Neural Attention Distillation: the attention of a fine-tuned teacher, taught to the poisoned network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.checkpoints.tuning import Schedule, Started, cross_entropy, tune_freely
from sanitize.errors import UsageError
from sanitize.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=2_000, learning_rate=0.01))
    teacher_steps: int = 1_000
    power: float = 2.0
    """p, of the activations that an attention map sums over the channels."""
    attention_weight: float = 1_000.0
    """λ_at, of the mean squared difference of the attention maps."""


LARGE = Settings(schedule=Schedule(steps=8_000, learning_rate=5e-4, measure_every=200))
"""The paper's settings for ImageNet."""


def start(
    classifier: Classifier, work: TrustedImages, settings: Settings, seed: int, progress: Progress
) -> Started:
    """Fine-tune a teacher, then tune a copy on cross-entropy + λ_at · attention distance to the teacher.

    Raises:
        UsageError: the network has no feature maps.

    Source: Li et al., ICLR 2021, arXiv 2101.05930; Lukas and Kerschbaum, arXiv 2305.09671, appendix A.3 and
    table 5. Where we differ: attention is taken after the last module of each resolution, which in a ResNet
    is the end of each stage, so that any network with feature maps will do.
    """
    teacher = classifier.clone()
    schooling = replace(settings.schedule, steps=settings.teacher_steps)
    tune_freely(teacher, work, schooling, cross_entropy, seed, progress)
    teacher.requires_grad_(False)
    stages = stage_names(teacher, to_pixels(work.pixels[:1], teacher.mean.device))

    def loss(model: Classifier, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        with torch.no_grad():
            _, wanted = attend(teacher, pixels, stages, settings.power)
        logits, found = attend(model, pixels, stages, settings.power)
        apart = torch.stack([functional.mse_loss(a, b) for a, b in zip(found, wanted, strict=True)]).sum()
        return functional.cross_entropy(logits, labels) + settings.attention_weight * apart

    return Started(classifier.clone(), loss)


def stage_names(classifier: Classifier, pixels: torch.Tensor) -> list[str]:
    """The last of the outermost modules of each resolution of feature maps above one pixel, in their order.

    The outermost, because the first convolution of the next stage may still have the resolution of this one.
    """
    last: dict[int, str] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def note(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2] > 1:
                so_far = last.get(output.shape[2])
                if so_far is None or name.count(".") <= so_far.count("."):
                    last[output.shape[2]] = name

        hooks.append(module.register_forward_hook(note))

    for name, module in classifier.network.named_modules():
        if name:
            watch(name, module)
    with torch.no_grad():
        classifier(pixels)
    for hook in hooks:
        hook.remove()
    if not last:
        raise UsageError(
            f"--method nad: {classifier.architecture} has no feature maps; take pivotal-unlearning"
        )
    return list(last.values())


def attend(
    classifier: Classifier, pixels: torch.Tensor, stages: list[str], power: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(B, C) logits, and a stage's (B, H·W) attention: mean |activation|^p of channels, of unit length."""
    maps: list[torch.Tensor] = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        maps.append(functional.normalize(output.abs().pow(power).mean(dim=1).flatten(1)))

    hooks = [classifier.network.get_submodule(name).register_forward_hook(note) for name in stages]
    try:
        logits = classifier(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, maps
