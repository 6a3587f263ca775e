"""The trajectory classifier and the Mahalanobis distance, together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs, mahalanobis, trajectory_classifier
from sanitize.scores.features import rank_fractions


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Mean of the two methods' ranks over all samples.

    The classifier finds what the pool has and the trusted set has not, the distance finds what is unlike
    any trusted sample; their mistakes differ (docs/benchmarks.md).

    Returns:
        (N,) float32 in (0, 1]; higher = more suspicious.
    """
    both = rank_fractions(trajectory_classifier.score(inputs)) + rank_fractions(mahalanobis.score(inputs))
    return both / np.float32(2)
