"""The default: groups that share something, and labels that a second model does not believe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, ScoreInputs, class_mixtures, label_conflict

SECOND_OPINION = True
IN_A_GROUP = 20.0
"""What a member of a group scores at least: above every label conflict, which ends at LARGEST_CONFLICT."""
LARGEST_CONFLICT = 19.0


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
        groups=class_mixtures.distinct(groups),
    )


def _in_spreads(values: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Distance from the class's median in units of its lower half's spread, which poison does not widen."""
    scaled = np.empty_like(values)
    for label in np.unique(class_id):
        rows = class_id == label
        low, middle = np.percentile(values[rows], [25, 50])
        scaled[rows] = (values[rows] - middle) / max(middle - low, 1e-6)
    return scaled
