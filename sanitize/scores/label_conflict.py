"""Samples whose label a model that learned no triggers finds unbelievable, though the proxy learned them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, ScoreInputs
from sanitize.scores.features import log_losses

SECOND_OPINION = True


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32 log loss of the second opinion minus the lowest log loss of the proxy; higher = stranger.

    Poison with a wrong label is easy for the proxy, which sees the trigger, and wrong for the second
    model. A hard clean sample is hard for both. Clean-label poison is believable to both and is not found.

    Source: ours; see dynamics/second_opinion.py for what it rests on.
    """
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """The same, and as a signal."""
    second = log_losses(inputs.second_opinion()[:, None])[:, 0]
    found: npt.NDArray[np.float32] = second - log_losses(inputs.trajectories).min(axis=1)
    return Evidence(score=found, signals={"label_conflict": found})
