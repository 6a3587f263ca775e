"""Activation clustering: in a poisoned class the activations fall into two groups."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs

DIMENSIONS = 10
SILHOUETTE_SAMPLES = 2_000
"""The silhouette of a larger class is estimated on this many; exact, it takes time and memory n²."""
_TIE_BREAK = 0.01


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """How well a class falls into two, for the samples of its smaller part; -1 for those of the larger.

    Per class: activations reduced to ten independent components, 2-means, mean silhouette. Within a part the
    samples farthest on their own side come first.

    Returns:
        (N,) float32, about -1 to 1; higher = more suspicious.

    Source: Chen et al., SafeAI 2019, arXiv 1811.03728. Where we differ: they cut at a silhouette of 0.10 to
    0.15 and remove whole clusters (or retrain to judge them); a score lets one threshold serve all methods.
    """
    return cluster_scores(inputs.activations(), inputs.class_id, inputs.seed)


def cluster_scores(
    activations: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32], seed: int
) -> npt.NDArray[np.float32]:
    """`score` on arrays: (N, D) activations and (N,) class ids to (N,) float32."""
    scores = np.full(len(activations), -1, np.float32)
    for own in np.unique(class_id):
        rows = np.flatnonzero(class_id == own)
        if len(rows) > DIMENSIONS:
            scores[rows] = _class_scores(activations[rows], seed)
    return scores


def _class_scores(activations: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float64]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    reduced = reduce(activations, seed)
    if len(np.unique(reduced, axis=0)) < 2:
        return np.full(len(activations), -1.0)
    found = KMeans(2, n_init=10, random_state=seed).fit(reduced)
    counts = np.bincount(found.labels_, minlength=2)
    small = int(counts.argmin())
    silhouette = silhouette_score(
        reduced, found.labels_, sample_size=min(len(reduced), SILHOUETTE_SAMPLES), random_state=seed
    )
    distances = found.transform(reduced)
    between = np.linalg.norm(found.cluster_centers_[0] - found.cluster_centers_[1])
    margin: npt.NDArray[np.float64] = (distances[:, 1 - small] - distances[:, small]) / between
    return np.where(found.labels_ == small, silhouette, -1.0) + _TIE_BREAK * margin


def reduce(activations: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float64]:
    """(n, 10) independent components of (n, D) activations; fewer if they span fewer dimensions."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    values = activations.astype(np.float64)
    span = int(np.linalg.matrix_rank(values - values.mean(axis=0)))
    if span == 0:
        return np.zeros((len(values), 1))
    with warnings.catch_warnings():
        # Not quite independent components separate two groups as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(min(DIMENSIONS, span), whiten="unit-variance", random_state=seed)
        components: npt.NDArray[np.float64] = ica.fit_transform(values)
    return components
