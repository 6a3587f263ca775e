"""Does alpha keep its word? What label conflict takes of corpora without poison, over many trusted sets.

    python docs/benchmarks/calibration.py out/unpoisoned-3/run out/unpoisoned-4/run ...

The runs are those of judgement.py with the condition `unpoisoned`. Nothing is trained: a trusted sample is
trained on and tracked like every other, so any class-balanced draw among all samples might have been the
trusted set. Groups are left out; there were none in these corpora.
"""

import sys
from pathlib import Path

import numpy as np

from sanitize.pipeline import score_inputs
from sanitize.rundir import RunDir
from sanitize.scores import label_conflict
from sanitize.scores.decide import centre_within_class, conformal_p_values

ALPHAS = (0.05, 0.07, 0.1, 0.2)
TRUSTED = (100, 250, 1_000)
DRAWS = 200


def main() -> None:
    runs = [scored(Path(path)) for path in sys.argv[1:]]
    print("| trusted | alpha | clean lost, mean | more than alpha | plain p-value: mean | more than alpha |")
    print("|---|---|---|---|---|---|")
    for count in TRUSTED:
        drawn = np.array([p_values(*run, count, draw) for run in runs for draw in range(DRAWS)])
        for alpha in ALPHAS:
            lost = (drawn <= alpha).mean(axis=2)
            (kept, plain), (over, plain_over) = lost.mean(axis=0), (lost > alpha).mean(axis=0)
            cells = [count, alpha, *(f"{100 * value:.1f} %" for value in (kept, over, plain, plain_over))]
            print(f"| {' | '.join(str(cell) for cell in cells)} |")


def scored(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all samples of a run as a decision compares them, and class ids."""
    with RunDir.open(run) as opened:
        inputs, _, _ = score_inputs(opened, seed=0)
        return centre_within_class(label_conflict.score(inputs), inputs.class_id), inputs.class_id


def p_values(
    scores: np.ndarray, class_id: np.ndarray, count: int, draw: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples that are not trusted in this draw: as a scan has them, and (1 + j) / (n + 1)."""
    rng = np.random.default_rng([count, draw])
    classes = np.unique(class_id)
    chosen = [rng.permutation(np.flatnonzero(class_id == own))[: count // len(classes)] for own in classes]
    trusted = np.zeros(len(class_id), bool)
    trusted[np.concatenate(chosen)] = True
    at_least = count - np.searchsorted(np.sort(scores[trusted]), scores[~trusted], side="left")
    return conformal_p_values(scores, trusted)[~trusted], (1 + at_least) / (count + 1)


if __name__ == "__main__":
    main()
