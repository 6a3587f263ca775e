"""A classifier that tells trusted loss trajectories from the pool's: poison is what only the pool has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.features import FOLDS, folds, log_losses, ranks_within_class

REPEATS = 2
TREES = 200
LEAF = 40
POOL_SAMPLES = 5_000


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Log odds of "pool" against "trusted", every sample judged by forests that did not see it.

    Extremely randomised trees on log losses, their epoch-to-epoch changes and within-class ranks; trusted
    samples weigh as much as the 5,000 pool samples drawn a fold. Wide leaves and two repeats, because a few
    hundred trusted samples are easily learned by heart (docs/experiments.md has what was tried).

    Returns:
        (N,) float32, unbounded; higher = more suspicious.

    Source: our own; cf. Siddiqui et al. 2022, arXiv 2209.10015 (probe dynamics). Trees: Geurts et al. 2006.
    """
    logs = log_losses(inputs.trajectories)
    ranks = ranks_within_class(inputs.trajectories, inputs.class_id)
    features = np.concatenate([logs, ranks, np.diff(logs, axis=1)], axis=1)
    odds = np.zeros(len(features), np.float32)
    for repeat in range(REPEATS):
        odds += _out_of_fold_odds(features, inputs, np.random.default_rng([inputs.seed, repeat]))
    return odds / np.float32(REPEATS)


def _out_of_fold_odds(
    features: npt.NDArray[np.float32], inputs: ScoreInputs, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    from sklearn.ensemble import ExtraTreesClassifier

    fold = folds(inputs.class_id, inputs.trusted, rng)
    odds = np.empty(len(features), np.float32)
    for held_out in range(FOLDS):
        trusted = np.flatnonzero(inputs.trusted & (fold != held_out))
        pool = np.flatnonzero(~inputs.trusted & (fold != held_out))
        pool = rng.choice(pool, min(POOL_SAMPLES, len(pool)), replace=False)
        rows = np.concatenate([trusted, pool])
        weights = np.repeat([len(pool) / len(trusted), 1.0], [len(trusted), len(pool)])
        forest = ExtraTreesClassifier(
            TREES, min_samples_leaf=LEAF, n_jobs=-1, random_state=int(rng.integers(2**31))
        )
        forest.fit(features[rows], ~inputs.trusted[rows], sample_weight=weights)
        judged = fold == held_out
        share = _share_of_pool(forest, features[judged]).clip(1e-6, 1 - 1e-6)
        odds[judged] = np.log(share) - np.log1p(-share)
    return odds


def _share_of_pool(forest: Any, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probability of "pool". Threads take rows, not trees, whose sum would depend on which comes first."""
    from joblib import Parallel, delayed

    forest.set_params(n_jobs=1)
    blocks = np.array_split(features, max(1, len(features) // 5_000))
    judged = Parallel(n_jobs=-1, prefer="threads")(delayed(forest.predict_proba)(rows) for rows in blocks)
    return np.concatenate([shares[:, 1] for shares in judged])
