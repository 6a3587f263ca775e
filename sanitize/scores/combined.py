"""The default: groups that share something, and labels that a second model does not believe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, ScoreInputs, class_mixtures, label_conflict

SECOND_OPINION = True
IN_A_GROUP = 20.0
"""What a member of a group scores at least: above every label conflict, which ends at LARGEST_CONFLICT."""
LARGEST_CONFLICT = 19.0
FEW = 50
"""Samples at which a class's own spread counts half."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32 scores; see `evidence`."""
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """Label conflict in units of its class's spread; members of a group come before everything else.

    The two complete each other: a fixed trigger makes a group whether the labels are right or not; poison
    whose triggers differ from image to image makes none, but its wrong labels are not believed.

    Source: ours, from the two methods it joins.
    """
    conflict = label_conflict.score(inputs)
    groups = class_mixtures.find(inputs, [*class_mixtures.hints(inputs), conflict])
    odds = class_mixtures.log_odds(groups, len(conflict))
    scaled = np.minimum(_in_spreads(conflict, inputs.class_id), LARGEST_CONFLICT)
    return Evidence(
        score=np.where(odds > 0, IN_A_GROUP + np.minimum(odds, 50), scaled).astype(np.float32),
        signals={"group_log_odds": odds, "label_conflict": conflict},
        groups=class_mixtures.distinct(groups, inputs.trusted),
    )


def _in_spreads(values: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Distance from the class's median in units of its lower half's spread, which poison does not widen.

    The spread of a class of few samples is drawn towards that of all.
    """
    scaled = np.empty_like(values)
    everywhere = _lower_spread(values)
    for label in np.unique(class_id):
        rows = class_id == label
        share = rows.sum() / (rows.sum() + FEW)
        spread = share * _lower_spread(values[rows]) + (1 - share) * everywhere
        scaled[rows] = (values[rows] - np.median(values[rows])) / max(spread, 1e-6)
    return scaled


def _lower_spread(values: npt.NDArray[np.float32]) -> float:
    low, middle = np.percentile(values, [25, 50])
    return float(middle - low)
