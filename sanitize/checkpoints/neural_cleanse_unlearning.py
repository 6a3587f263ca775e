"""Neural Cleanse as a repair: rebuild the most suspicious trigger, and teach the network to ignore it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trigger_inversion import InversionConfig, masked_triggers, smallest_working, stamp
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.checkpoints.tuning import Schedule, Started, cross_entropy
from sanitize.errors import UsageError
from sanitize.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1_000, learning_rate=1e-3))
    inversion: InversionConfig = field(default_factory=lambda: InversionConfig(steps=100, batch=128))
    """Steps a class as in table 5; the weight of the trigger's norm adapts, as Wang et al. have it."""


LARGE = Settings(
    schedule=Schedule(steps=3_000, learning_rate=5e-4, measure_every=200),
    inversion=InversionConfig(steps=200, batch=128),
)
"""The paper's settings for ImageNet."""


def start(
    classifier: Classifier, work: TrustedImages, settings: Settings, seed: int, progress: Progress
) -> Started:
    """Rebuild a trigger a class, and fine-tune with the smallest one on every second batch, labels kept.

    Raises:
        UsageError: no trigger works.

    Source: Wang et al., IEEE S&P 2019, section VI; Lukas and Kerschbaum, arXiv 2305.09671, algorithm 6 and
    table 5. Where we differ: the trigger is a mask and a pattern, as Wang et al. have it, not an added image,
    and is tuned away by SGD.
    """
    with progress.stage("prepare", settings.inversion.steps * classifier.classes, "steps") as advance:
        triggers = masked_triggers(
            classifier, work, work, range(classifier.classes), settings.inversion, seed, advance
        )
    smallest = smallest_working(triggers)
    if smallest is None:
        raise UsageError(
            "--method neural-cleanse: no rebuilt trigger turns half of the images into its class, so "
            "there is none to unlearn; take another --method"
        )
    mask, pattern = triggers.tensors(smallest, classifier.mean.device)

    def loss(model: Classifier, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        if step % 2 == 0:
            pixels = stamp(pixels, mask, pattern, added=False)
        return cross_entropy(model, pixels, labels, step)

    return Started(classifier.clone(), loss)
