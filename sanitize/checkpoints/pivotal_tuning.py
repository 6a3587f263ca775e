"""Pivotal Tuning: close to the old weights, with class features that point elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.checkpoints.tuning import Schedule, Started
from sanitize.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=2_000, learning_rate=0.01))
    latent_weight: float = 0.05
    """λ_S, of the soft latent orthogonalisation loss."""
    latent_pairs: int | None = 45
    """Pairs of classes in a batch up to which that loss is a sum, those of CIFAR-10; of more it is as much as
    of these, or no class would be told apart after a few steps. None: a sum over all."""
    parameter_weight: float = 20_000.0
    """λ_P, of the mean squared distance to the pivot's parameters."""


LARGE = Settings(
    schedule=Schedule(steps=10_000, learning_rate=5e-4, measure_every=200),
    latent_weight=1e-5,
    latent_pairs=None,
    parameter_weight=150_000.0,
)
"""The paper's settings for ImageNet."""


def start(
    classifier: Classifier, work: TrustedImages, settings: Settings, seed: int, progress: Progress
) -> Started:
    """Cross-entropy + λ_S · SLOL + λ_P · mean squared distance of the parameters to the original's.

    Source: Lukas and Kerschbaum, arXiv 2305.09671, section 4.1, algorithm 3 and table 5. Where we differ: the
    text has λ_P · ‖θ̃ − θ*‖₂, and with 20,000 and a rate of 0.01 one step would be 200 long; the authors' code
    takes the mean of the squared differences, and so do we. Centroids are those of a batch, of the classes in
    it. The text orthogonalises the centroids by their cosines (algorithm 3, line 11), and so do we, where the
    code has a norm of their covariance. For heads of 11 to 199 classes the paper has no settings, see
    `Settings.latent_pairs`.
    """
    pivot = classifier.clone().requires_grad_(False)

    def loss(model: Classifier, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        with torch.no_grad():
            _, frozen = pivot.embed(pixels)
        logits, features = model.embed(pixels)
        return (
            functional.cross_entropy(logits, labels)
            + settings.latent_weight * slol(frozen, features, labels, settings.latent_pairs)
            + settings.parameter_weight * mean_squared_distance(pivot, model)
        )

    return Started(classifier.clone(), loss)


def slol(
    frozen: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, most_pairs: int | None = None
) -> torch.Tensor:
    """Soft latent orthogonalisation loss, summed over the pairs of classes in a batch.

    For a pair (i, j): cos(C_i − C_j, Ĉ_i − Ĉ_j) + cos(Ĉ_i, Ĉ_j), with C the class means of the frozen
    features and Ĉ those of the tuned ones.

    Args:
        frozen: (B, D) penultimate features of the pivot.
        features: (B, D) the same of the model in training.
        labels: (B,) int64.
        most_pairs: where there are more, the sum is scaled to that many.

    Returns:
        A scalar; 0 where the batch has one class.

    Source: Lukas and Kerschbaum, arXiv 2305.09671, algorithm 3.
    """
    present, position = torch.unique(labels, return_inverse=True)
    assigned = functional.one_hot(position, len(present)).to(features.dtype)
    mean = assigned.T / assigned.sum(dim=0).unsqueeze(1)
    old, new = mean @ frozen, mean @ features
    i, j = torch.triu_indices(len(present), len(present), offset=1, device=features.device)
    turned = functional.cosine_similarity(old[i] - old[j], new[i] - new[j])
    spread = functional.cosine_similarity(new[i], new[j])
    scale = 1.0 if most_pairs is None else min(1.0, most_pairs / max(len(i), 1))
    return scale * (turned + spread).sum()


def mean_squared_distance(one: Classifier, other: Classifier) -> torch.Tensor:
    """Mean over all parameters of the squared difference between two models of one architecture."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    total = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return total / sum(a.numel() for a, _ in pairs)
