"""Spectral signatures: poison stretches the activations of its class along one direction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.features import ranks_within_class

DEFAULT_REJECT = 0.15
"""As Alex et al. (ICLR 2025, appendix I.2); the original removes 1.5 times an upper bound on the poison."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Rank within its class of a sample's squared projection on the class's top singular vector.

    Ranks, because the original removes the same share of every class, whatever the size of its activations.

    Returns:
        (N,) float32 in [0, 1); higher = more suspicious.

    Source: Tran, Li and Madry, NeurIPS 2018, arXiv 1811.00636, algorithm 1. Where we differ: activations are
    those of the short-trained proxy, not of a network trained to the end.
    """
    projections = squared_projections(inputs.activations(), inputs.class_id)
    return ranks_within_class(projections[:, None], inputs.class_id)[:, 0]


def squared_projections(
    activations: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Squared projection of centred activations on the first right singular vector of their class.

    Args:
        activations: (N, D) float32.
        class_id: (N,) int32.

    Returns:
        (N,) float32, 0 or more.
    """
    scores = np.zeros(len(activations), np.float32)
    for own in np.unique(class_id):
        rows = np.flatnonzero(class_id == own)
        centred = activations[rows].astype(np.float64)
        centred -= centred.mean(axis=0)
        # Eigenvectors of the (D, D) scatter are the right singular vectors of the (n, D) matrix.
        _, vectors = np.linalg.eigh(centred.T @ centred)
        scores[rows] = (centred @ vectors[:, -1]) ** 2
    return scores
