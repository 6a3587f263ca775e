"""Anti-Backdoor Learning's rule: what has the lowest loss was learned too easily."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs

DEFAULT_REJECT = 0.15
"""As Alex et al. (ICLR 2025, appendix I.2) use it; the original isolates 1 % and unlearns it."""


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Minus the loss after the last kept epoch; (N,) float32 in nats.

    Where we differ: no local gradient ascent while the proxy trains, and what is found is removed rather
    than unlearned. Both are so in the comparison of Alex et al., too.

    Source: Li et al., NeurIPS 2021, arXiv 2110.11571.
    """
    scores: npt.NDArray[np.float32] = -inputs.trajectories[:, -1]
    return scores
