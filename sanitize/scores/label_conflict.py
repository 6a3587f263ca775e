"""Labels that a model which learned no triggers does not believe, or that were learned suspiciously early."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, ScoreInputs
from sanitize.scores.features import early_log_loss, log_losses, rows_by_class

SECOND_OPINION = True
FEW = 50
"""Samples at which a class's own spread counts half."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32, 0 or more: how rare the stranger of the two signals is; higher = stranger.

    Source: ours; see dynamics/second_opinion.py for what it rests on.
    """
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """The same, and the two signals it is made of.

    ``label_conflict``, the too-hard side: the log loss of the second opinion. A wrong label is unbelievable
    to a model that learned no trigger. ``shortcut``, the too-easy side: the same minus the proxy's mean log
    loss in its early epochs. What the proxy learned before the second model could follow was learned from
    something else than what the class has in common; this also shows poison with the right label.

    Both in units of their class's spread, then as minus the natural log of the share of the samples that are
    at least as strange, and of the two the larger.
    """
    second = log_losses(inputs.second_opinion()[:, None])[:, 0]
    signals = {"label_conflict": second, "shortcut": second - early_log_loss(inputs.trajectories)}
    rarest = [rarity(in_spreads(values, inputs.class_id)) for values in signals.values()]
    return Evidence(score=np.maximum(*rarest), signals=signals)


def rarity(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N,) float32 minus the natural log of the share of the (N,) values that are at least as large."""
    at_least = len(values) - np.searchsorted(np.sort(values), values, side="left")
    found: npt.NDArray[np.float32] = -np.log(at_least / len(values)).astype(np.float32)
    return found


def in_spreads(values: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Distance from the class's median in units of its lower half's spread, which poison does not widen.

    The spread of a class of few samples is drawn towards that of all.
    """
    scaled = np.empty_like(values)
    everywhere = _lower_spread(values)
    for rows in rows_by_class(class_id):
        share = len(rows) / (len(rows) + FEW)
        spread = share * _lower_spread(values[rows]) + (1 - share) * everywhere
        scaled[rows] = (values[rows] - np.median(values[rows])) / max(spread, 1e-6)
    return scaled


def _lower_spread(values: npt.NDArray[np.float32]) -> float:
    low, middle = np.percentile(values, [25, 50])
    return float(middle - low)
