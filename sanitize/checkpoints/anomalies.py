"""How far each class's rebuilt trigger is from those of the other classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sanitize.checkpoints.quick_statistics import robust_z
from sanitize.checkpoints.trigger_inversion import WORKS, Triggers, most_work

Scores = npt.NDArray[np.float64]

COMBINED = ("mask-size", "universal")
"""Statistics that together tell most, `averaged`."""

COMMON = (0.1, 0.9)
"""Success of the median class's universal change between which the classes can be compared."""


def anomalies(triggers: dict[str, Triggers], classes: int, images: int) -> dict[str, Scores]:
    """(C,) statistics of rebuilt triggers, NaN for classes that none was rebuilt for.

    ``neural-cleanse``: the anomaly index of Wang et al., by `robust_z` of the mask's size below the median.
    ``mask-size``: how many times smaller than the median mask, as log2. The index divides by the spread of
    ten or so sizes; where these happen to agree, the class with the easiest natural trigger is an outlier.
    Both are 0 for all where most masks do not work: there is nothing to compare with.

    ``universal``: log-odds of the success of a change of the common norm, less their median; success is kept
    half an image of `images` away from none and all. 0 for all where there was no such norm (`COMMON`): next
    to none and all the log-odds of any class may be anything.

    ``calibrated``: success on the model minus success on the repaired copy, in [-1, 1]. The source is
    ambiguous here: algorithm 4, line 13, subtracts the accuracy that the repaired model keeps, which would
    give a perfect trigger 1 - 1 = 0; the text has "the difference in the success rates". Kept accuracy is
    reported beside it.

    Args:
        triggers: statistic, as `Inspection.triggers` names it -> a trigger a class that was looked at.
        classes: C, of the head.
        images: that success was measured on.
    """
    found: dict[str, Scores] = {}
    for name, made in triggers.items():
        if name == "neural-cleanse":
            size = made.mask.sum(axis=(1, 2, 3), dtype=np.float64) + 1e-9
            if most_work(made):
                size[made.success < WORKS] = made.mask[0].size  # what turns no images is not a small mask
            else:
                size[:] = 1.0
            own = {"neural-cleanse": robust_z(-size), "mask-size": np.log2(np.median(size) / size)}
        elif name == "universal":
            bound = 0.5 / images
            rate = np.clip(made.success.astype(np.float64), bound, 1 - bound)
            log_odds = np.log(rate / (1 - rate))
            own = {"universal": (log_odds - np.nanmedian(log_odds)) * at_a_common_norm(made)}
        else:
            assert made.repaired_success is not None
            own = {"calibrated": (made.success - made.repaired_success).astype(np.float64)}
        for statistic, values in own.items():
            found[statistic] = np.full(classes, np.nan)
            found[statistic][made.classes] = values
    return found


def at_a_common_norm(changes: Triggers) -> bool:
    """Whether the universal changes of the classes can be compared: of the median one some work, not all."""
    return COMMON[0] <= float(np.nanmedian(changes.success)) <= COMMON[1]


def averaged(found: dict[str, Scores], parts: Sequence[str]) -> Scores:
    """(C,) the mean of some statistics, each less its median."""
    mean: Scores = np.mean([centred(found[name]) for name in parts], axis=0)
    return mean


def centred(values: Scores) -> Scores:
    """Less their median."""
    found: Scores = values - np.nanmedian(values)
    return found


def compares(values: Scores) -> bool:
    """Whether a statistic had something to compare with."""
    return bool(np.nan_to_num(values).any())
