"""Detection and attack figures. All of them are fractions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEARNED_MARGIN = 0.3
"""An attack whose undefended success is less than this above the floor was not learned."""


def clean_accuracy(predicted: npt.NDArray[np.int64], class_id: npt.NDArray[Any]) -> float:
    """Share of (N,) predictions that are the (N,) true classes."""
    return float((predicted == class_id).mean())


def attack_success_rate(
    predicted: npt.NDArray[np.int64], class_id: npt.NDArray[Any], target_class: int
) -> float:
    """Share of triggered images, of a true class that is not the target, that are given the target class.

    Args:
        predicted: (N,) for the triggered images.
        class_id: (N,) true classes; samples of the target class do not count.

    Raises:
        ValueError: all samples are of the target class.
    """
    others = class_id != target_class
    if not others.any():
        raise ValueError(f"no test sample is of another class than the target {target_class}")
    return float((predicted[others] == target_class).mean())


def learned(undefended: float, floor: float) -> bool:
    """Whether an undefended model took the backdoor in: its success is 30 points or more over the floor.

    The floor is the success rate on a model of the same corpus with the poison left out; it is seldom zero.
    """
    return undefended - floor >= LEARNED_MARGIN


def removal(
    flagged: npt.NDArray[np.bool_], attack: npt.NDArray[np.object_], class_id: npt.NDArray[Any]
) -> dict[str, Any]:
    """What a decision took away.

    Args:
        flagged: (N,) bool, over the corpus.
        attack: (N,) name of the attack a sample carries, None for a clean one.
        class_id: (N,) given labels.

    Returns:
        removed_ratio (of the corpus), recall (of each attack's samples, by name), clean_lost (of the clean
        samples), worst_class_lost (the largest share of clean samples that one class lost).
    """
    clean = np.array([name is None for name in attack], bool)
    names = sorted({name for name in attack if name is not None})
    classes = [flagged[clean & (class_id == own)] for own in np.unique(class_id[clean])]
    return {
        "removed_ratio": float(flagged.mean()),
        "recall": {name: float(flagged[attack == name].mean()) for name in names},
        "clean_lost": float(flagged[clean].mean()) if clean.any() else 0.0,
        "worst_class_lost": max((float(lost.mean()) for lost in classes), default=0.0),
    }
