"""Does alpha keep its word? What label conflict takes of corpora without poison, over many trusted sets.

    python docs/benchmarks/calibration.py out/unpoisoned-3/run out/unpoisoned-4/run ...

The runs are those of judgement.py with the condition `unpoisoned`. Nothing is trained: a trusted sample is
trained on and tracked like every other, so any class-balanced draw among all samples might have been the
trusted set. Groups are left out; there were none in these corpora.
"""

import sys
from pathlib import Path

import numpy as np

from sanitize.config import DecisionConfig
from sanitize.pipeline import score_inputs
from sanitize.rundir import RunDir
from sanitize.scores import label_conflict
from sanitize.scores.decide import centre_within_class, decide

ALPHAS = (0.05, 0.07, 0.1, 0.2)
TRUSTED = (100, 250, 1_000)
DRAWS = 200


def main() -> None:
    runs = [scored(Path(path)) for path in sys.argv[1:]]
    print("| trusted | alpha | clean lost, mean | more than alpha | plain p-value: mean | more than alpha |")
    print("|---|---|---|---|---|---|")
    for count in TRUSTED:
        for alpha in ALPHAS:
            lost = np.array([losses(*run, count, alpha, draw) for run in runs for draw in range(DRAWS)])
            (kept, plain), (over, plain_over) = lost.mean(axis=0), (lost > alpha).mean(axis=0)
            cells = [count, alpha, *(f"{100 * value:.1f} %" for value in (kept, over, plain, plain_over))]
            print(f"| {' | '.join(str(cell) for cell in cells)} |")


def scored(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores and class ids of all samples of a run."""
    with RunDir.open(run) as opened:
        inputs, _, _ = score_inputs(opened, seed=0)
        return label_conflict.score(inputs), inputs.class_id


def losses(
    scores: np.ndarray, class_id: np.ndarray, count: int, alpha: float, draw: int
) -> tuple[float, float]:
    """Share of the samples lost with one trusted set: as a scan decides, and by (1 + j) / (n + 1)."""
    rng = np.random.default_rng([count, draw])
    classes = np.unique(class_id)
    chosen = [rng.permutation(np.flatnonzero(class_id == own))[: count // len(classes)] for own in classes]
    trusted = np.zeros(len(class_id), bool)
    trusted[np.concatenate(chosen)] = True
    flagged = decide(scores, class_id, trusted, DecisionConfig(alpha=alpha, class_cap=None)).flagged
    centred = centre_within_class(scores, class_id)
    ranked = np.sort(centred[trusted])
    at_least = trusted.sum() - np.searchsorted(ranked, centred[~trusted], side="left")
    plain = (1 + at_least) / (trusted.sum() + 1) <= alpha
    return float(flagged[~trusted].mean()), float(plain.mean())


if __name__ == "__main__":
    main()
