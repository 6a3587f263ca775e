"""What the trajectory methods look at, and how they judge every sample by a model that never saw it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FOLDS = 5
_FLOOR_NATS = 1e-4


def log_losses(trajectories: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Natural log of the losses, floored at 1e-4 nats; same shape, float32.

    A fast proxy brings most losses near zero; the differences that matter there are ratios.
    """
    logs: npt.NDArray[np.float32] = np.log(trajectories + np.float32(_FLOOR_NATS))
    return logs


def early_log_loss(trajectories: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N,) float32 mean log loss from a tenth to 40 % of the E epochs of (N, E) trajectories."""
    logs = log_losses(trajectories)
    epochs = logs.shape[1]
    mean: npt.NDArray[np.float32] = logs[:, epochs // 10 : max(epochs // 10 + 1, 2 * epochs // 5)].mean(
        axis=1
    )
    return mean


def rows_by_class(class_id: npt.NDArray[np.int32]) -> list[npt.NDArray[np.intp]]:
    """Rows of each class that has any, ascending, in one pass over the (N,) class ids, 0 to C-1."""
    order = np.argsort(class_id, kind="stable")
    return [rows for rows in np.split(order, np.cumsum(np.bincount(class_id))[:-1]) if len(rows)]


def ranks_within_class(
    trajectories: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Rank of each loss among the losses of its class in its epoch.

    Args:
        trajectories: (N, E) float32.
        class_id: (N,) int32, 0 to C-1.

    Returns:
        (N, E) float32 in [0, 1): 0 = the lowest loss of the class. Ties keep the order of the samples.
    """
    counts = np.bincount(class_id)
    starts = np.cumsum(counts) - counts
    ranks = np.empty(trajectories.shape, np.float32)
    for epoch in range(trajectories.shape[1]):
        order = np.lexsort((trajectories[:, epoch], class_id))
        sorted_class = class_id[order]
        positions = np.arange(len(order)) - starts[sorted_class]
        ranks[order, epoch] = positions / counts[sorted_class]
    return ranks


def folds(
    class_id: npt.NDArray[np.int32], trusted: npt.NDArray[np.bool_], rng: np.random.Generator
) -> npt.NDArray[np.int8]:
    """(N,) int8 fold numbers 0 to FOLDS-1; the trusted samples of every class are spread evenly."""
    fold = rng.integers(0, FOLDS, len(class_id)).astype(np.int8)
    rows = rng.permutation(np.flatnonzero(trusted))
    rows = rows[np.argsort(class_id[rows], kind="stable")]
    fold[rows] = np.arange(len(rows)) % FOLDS
    return fold
