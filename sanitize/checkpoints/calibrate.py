"""`--calibrate`: settings for this model, chosen on a backdoor planted in a copy of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.planting import ATTACK, plant, success
from sanitize.checkpoints.repair import LARGE_HEAD, RepairConfig, few_images, repair_classifier
from sanitize.checkpoints.trusted import TrustedImages, split
from sanitize.progress import Progress, Silent

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "pivotal-tuning": {"latent_weight": (0.1, 0.05, 0.01), "learning_rate": (0.01, 0.003)},
    "pivotal-unlearning": {"changed_weight": (2.0, 1.0, 4.0), "learning_rate": (0.005, 0.002)},
    "weight-decay": {"weight_decay": (0.01, 0.001), "learning_rate": (0.01, 0.001)},
    "fine-pruning": {"prune_ratio": (0.5, 0.8, 0.96)},
    "nad": {"attention_weight": (100.0, 1_000.0, 10_000.0)},
    "neural-cleanse": {"learning_rate": (0.01, 0.003, 0.001)},
}
"""Settings that are tried, every combination; within the ranges of the paper's appendix A.5."""
FEW_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "pivotal-unlearning": GRIDS["pivotal-unlearning"] | {"learning_rate": (0.0025, 0.001)},
}
"""In place of these where there are few images to tune on (`few_images`); not measured."""
_RATES = (1e-3, 5e-4, 1e-4)
LARGE_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "pivotal-tuning": {"latent_weight": (1e-4, 1e-5, 1e-6), "learning_rate": (5e-4, 1e-4)},
    "pivotal-unlearning": {"learning_rate": _RATES},
    "weight-decay": {"weight_decay": (0.01, 0.001), "learning_rate": (5e-4, 1e-4)},
    "fine-pruning": {"prune_ratio": (0.5, 0.73, 0.9)},
    "nad": GRIDS["nad"],
    "neural-cleanse": {"learning_rate": _RATES},
}
"""For heads of LARGE_HEAD classes or more; not measured."""


class Calibrated(NamedTuple):
    """What the search found."""

    settings: dict[str, float]
    """The combination with the lowest success of the planted trigger; empty where none was within Δ."""
    facts: dict[str, Any]
    """For the JSON file: the planted attack, and every trial with its success and accuracy."""


def calibrate(
    classifier: Classifier, trusted: TrustedImages, config: RepairConfig, progress: Progress | None = None
) -> Calibrated:
    """Plant a badnets backdoor in a copy, repair it with every combination, take the lowest success within Δ.

    Takes as long as the repair times the number of combinations. Combinations of equal success: the first.

    Raises:
        SanitizeError: the copy did not learn the trigger.

    Source: Lukas and Kerschbaum, arXiv 2305.09671, section 5.3 and appendix A.5.
    """
    progress = progress or Silent()
    work, held_out = split(trusted, config.held_out_ratio, config.seed)
    planted = plant(classifier, work, held_out, config.seed, progress)
    trials: list[dict[str, Any]] = []
    for settings in combinations(config.method, classifier.classes, len(work)):
        repaired = repair_classifier(
            planted.classifier, trusted, replace(config, settings={**config.settings, **settings}), progress
        )
        trial = {
            "settings": settings,
            "repaired": repaired.facts["repaired"],
            "success": success(repaired.classifier, held_out, planted.target),
            "held_out_accuracy": repaired.facts["after"]["held_out_accuracy"],
        }
        progress.note(f"calibrate: {settings}: success of the planted trigger {trial['success']:.3f}")
        trials.append(trial)
    within = [trial for trial in trials if trial["repaired"]]
    chosen = min(within, key=lambda trial: float(trial["success"]))["settings"] if within else {}
    facts = {
        "attack": ATTACK,
        "target": planted.target,
        "planted_success": planted.success,
        "trials": trials,
        "chosen": chosen,
    }
    return Calibrated(chosen, facts)


def combinations(method: str, classes: int, images: int) -> list[dict[str, float]]:
    """Every combination of a method's grid for a head of that size and so many images to tune on."""
    grid = (LARGE_GRIDS if classes >= LARGE_HEAD else GRIDS)[method]
    if few_images(classes, images):
        grid = FEW_GRIDS.get(method, grid)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
