"""BaDLoss as published: distance of a loss trajectory to its nearest trusted ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.knn import nearest_distances

K = 50
MIN_TRUSTED = K + 1
"""A trusted sample needs 50 others."""
DEFAULT_REJECT = 0.4
"""The share of the data that the paper removes."""
_EPSILON = 1e-8


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """BaDLoss with the published k = 50; higher = more suspicious."""
    return badloss_scores(inputs.trajectories, inputs.trusted, K, inputs.gpu)


def badloss_scores(
    trajectories: npt.NDArray[np.float32], trusted: npt.NDArray[np.bool_], k: int = K, gpu: bool = False
) -> npt.NDArray[np.float32]:
    """Mean log distance of every loss trajectory to its k nearest trusted ones.

    A trusted sample is not its own neighbour: at distance zero it would look more ordinary than any
    other sample could, and its score could not calibrate theirs.

    Args:
        trajectories: (N, E) float32, cross-entropy in nats, finite.
        trusted: (N,) bool, more than k True.
        k: neighbours, 1 <= k < trusted.sum().
        gpu: use the first GPU, if FAISS finds one.

    Returns:
        (N,) float32, unbounded; higher = more suspicious.

    Raises:
        ValueError: shapes disagree, k out of range.

    Source: Alex et al., ICLR 2025, arXiv 2408.13221, eq. 2 (epsilon 1e-8).
    """
    if trusted.shape != (len(trajectories),):
        raise ValueError(f"trusted has shape {trusted.shape} for {len(trajectories)} trajectories")
    count = int(trusted.sum())
    if not 1 <= k < count:
        raise ValueError(f"k = {k} needs more than {k} trusted samples, there are {count}")
    references = trajectories[trusted]
    scores = _mean_log(nearest_distances(trajectories, references, k, gpu))
    # The nearest reference of a trusted sample is itself (or a twin at the same distance, zero).
    scores[trusted] = _mean_log(nearest_distances(references, references, k + 1, gpu)[:, 1:])
    return scores


def _mean_log(distances: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    means: npt.NDArray[np.float32] = np.log(distances + np.float32(_EPSILON)).mean(axis=1, dtype=np.float32)
    return means
