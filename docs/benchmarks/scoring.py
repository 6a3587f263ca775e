"""BaDLoss scoring by FAISS against scikit-learn's neighbours, side by side on random trajectories.

python docs/benchmarks/scoring.py [--repeats 5]
"""

import argparse
import statistics
import time

import numpy as np
from sklearn.neighbors import NearestNeighbors

from sanitize import scores
from sanitize.scores.badloss import K, badloss_scores


def by_scikit_learn(trajectories, trusted):
    """The same score; only the pool's, as scikit-learn has no batched leave-one-out either."""
    neighbours = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=-1).fit(trajectories[trusted])
    distances, _ = neighbours.kneighbors(trajectories[~trusted])
    return np.log(distances + 1e-8).mean(axis=1)


def timed(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for samples, epochs, classes in ((50_000, 20, 10), (1_200_000, 15, 1000)):
        rng = np.random.default_rng(0)
        losses = rng.gamma(0.5, 1.0, (samples, epochs)).astype(np.float32)
        trusted = np.zeros(samples, bool)
        trusted[rng.choice(samples, 250, replace=False)] = True
        faiss_s, sklearn_s = [], []
        for _ in range(repeats):
            seconds, ours = timed(badloss_scores, losses, trusted)
            faiss_s.append(seconds)
            seconds, theirs = timed(by_scikit_learn, losses, trusted)
            sklearn_s.append(seconds)
        worst = np.abs(ours[~trusted] - theirs).max()
        ratios = [b / a for a, b in zip(faiss_s, sklearn_s, strict=True)]
        print(
            f"{samples:,} x {epochs}: FAISS {statistics.median(faiss_s):.2f} s "
            f"({min(faiss_s):.2f}-{max(faiss_s):.2f}), scikit-learn {statistics.median(sklearn_s):.2f} s "
            f"({min(sklearn_s):.2f}-{max(sklearn_s):.2f}), ratio {statistics.median(ratios):.1f}, "
            f"largest difference {worst:.1e}",
            flush=True,
        )
        inputs = scores.ScoreInputs(
            trajectories=losses,
            class_id=rng.integers(0, classes, samples).astype(np.int32),
            trusted=trusted,
            seed=0,
        )
        for method in ("mahalanobis", "trajectory-classifier"):
            seconds, _ = timed(scores.score, method, inputs)
            print(f"{samples:,} x {epochs}: {method} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
