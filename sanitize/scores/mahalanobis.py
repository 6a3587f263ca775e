"""How far a loss trajectory lies outside the cloud of the trusted ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.features import FOLDS, folds, log_losses, ranks_within_class


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Log squared Mahalanobis distance to the trusted trajectories, out of fold.

    On log losses and within-class ranks, with a shrunk covariance: 250 trusted samples estimate some forty
    dimensions. Unlike Euclidean kNN it sees an unusual *shape* (early and then unsteady, say) in the middle
    of the range of losses.

    Returns:
        (N,) float32, unbounded; higher = more suspicious.

    Source: Mahalanobis 1936; shrinkage by Ledoit & Wolf 2004 (scikit-learn's LedoitWolf).
    """
    from sklearn.covariance import LedoitWolf

    features = np.concatenate(
        [log_losses(inputs.trajectories), ranks_within_class(inputs.trajectories, inputs.class_id)], axis=1
    )
    fold = folds(inputs.class_id, inputs.trusted, np.random.default_rng(inputs.seed))
    distances = np.empty(len(features), np.float32)
    for held_out in range(FOLDS):
        trusted = LedoitWolf().fit(features[inputs.trusted & (fold != held_out)])
        judged = fold == held_out
        distances[judged] = np.log(trusted.mahalanobis(features[judged]) + 1e-12)
    return distances
