"""Loss trajectories on disk, and which of their epochs count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sanitize.rundir import create_array

SPIKE_FACTOR = 2.0
SPIKE_WINDOW = 3


def open_trajectories(path: Path, epochs: int, samples: int) -> np.memmap[Any, Any]:
    """The (E, N) float32 memmap of losses in nats; made full of NaN if it is not there."""
    if not path.exists():
        temporary = path.with_name(path.name + ".tmp")
        create_array(temporary, (epochs, samples), np.float32)[:] = np.nan
        temporary.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")


def kept_epochs(epoch_loss: Sequence[float]) -> list[int]:
    """Epochs whose mean loss is no spike.

    An epoch is left out if its mean loss exceeds twice the mean of the last three kept epochs; the first
    three are always kept, as the authors' code does.

    Args:
        epoch_loss: E mean losses of the training samples after each epoch, in nats.

    Returns:
        Indices of the kept epochs, ascending.

    Source: Alex et al., ICLR 2025, arXiv 2408.13221, footnote 4.
    """
    kept: list[int] = []
    for epoch, loss in enumerate(epoch_loss):
        recent = [epoch_loss[e] for e in kept[-SPIKE_WINDOW:]]
        if len(kept) < SPIKE_WINDOW or loss <= SPIKE_FACTOR * sum(recent) / len(recent):
            kept.append(epoch)
    return kept


def columns(
    trajectories: npt.NDArray[np.float32], epochs: Sequence[int], samples: npt.NDArray[np.intp]
) -> npt.NDArray[np.float32]:
    """(len(samples), len(epochs)) float32, contiguous: one row a sample, as the scores want it."""
    rows = np.empty((len(samples), len(epochs)), np.float32)
    for column, epoch in enumerate(epochs):
        rows[:, column] = trajectories[epoch][samples]
    return rows
