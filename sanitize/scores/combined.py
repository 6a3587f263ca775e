"""The default: groups that share something, and labels that a second model does not believe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, ScoreInputs, class_mixtures, label_conflict

SECOND_OPINION = True
GROUPS = True
IN_A_GROUP = 30.0
"""What a member of a group scores at least: above every label conflict, which ends at the log of N."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32 scores; see `evidence`."""
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """Label conflict; members of a group come before everything else.

    The two complete each other: a fixed trigger makes a group whether the labels are right or not; poison
    whose triggers differ from image to image makes none, but its wrong labels are not believed.

    Source: ours, from the two methods it joins.
    """
    conflict = label_conflict.evidence(inputs)
    found = class_mixtures.find(inputs, [*class_mixtures.hints(inputs), *conflict.signals.values()])
    odds = class_mixtures.log_odds(found.suspected, len(conflict.score))
    return Evidence(
        score=np.where(odds > 0, IN_A_GROUP + np.minimum(odds, 50), conflict.score).astype(np.float32),
        signals={"group_log_odds": odds, **conflict.signals},
        **found.distinct(inputs.trusted),
    )
