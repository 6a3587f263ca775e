"""Remove at random: the control that every method has to beat.

The module is not called ``random`` because a script run from this folder would import it instead of Python's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32, uniform in [0, 1), the same for the same seed."""
    return np.random.default_rng([inputs.seed, 0]).random(len(inputs.class_id), dtype=np.float32)
