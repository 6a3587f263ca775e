from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.dynamics.trajectories import columns, kept_epochs, open_trajectories


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([], []),
        ([2.0], [0]),
        ([1.0, 9.0, 1.0], [0, 1, 2]),  # the first three are always kept
        ([3.0, 2.0, 1.0, 4.0], [0, 1, 2, 3]),  # exactly twice the mean of 2 is no spike
        ([3.0, 2.0, 1.0, 4.01], [0, 1, 2]),
        ([1.0, 1.0, 1.0, 5.0, 1.0], [0, 1, 2, 4]),
        ([1.0, 1.0, 1.0, 5.0, 5.0, 5.0], [0, 1, 2]),  # spikes are compared with kept epochs only
        ([9.0, 1.0, 1.0, 1.0, 2.5], [0, 1, 2, 3]),  # the 9 has left the window
        ([1.0, 1.0, 1.0, 2.0, 2.6, 3.7], [0, 1, 2, 3, 4, 5]),  # a slow rise is kept
    ],
)
def test_spike_rule(losses: list[float], kept: list[int]) -> None:
    assert kept_epochs(losses) == kept


@given(st.lists(st.floats(0, 100), max_size=30))
def test_kept_epochs_are_ascending_and_none_is_a_spike(losses: list[float]) -> None:
    kept = kept_epochs(losses)
    assert kept == sorted(set(kept))
    assert kept[:3] == list(range(min(3, len(losses))))
    for epoch in range(3, len(losses)):
        before = [losses[e] for e in kept if e < epoch][-3:]
        assert (epoch in kept) == (losses[epoch] <= 2 * sum(before) / 3)


def test_new_trajectories_are_nan_and_stored_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.npy"
    losses = open_trajectories(path, 4, 7)
    assert losses.shape == (4, 7)
    assert losses.dtype == np.float32
    assert np.isnan(losses).all()
    losses[2] = 5
    losses.flush()
    assert np.load(path)[2].tolist() == [5] * 7
    assert np.isnan(open_trajectories(path, 4, 7)[0]).all()
    assert open_trajectories(path, 4, 7)[2].tolist() == [5] * 7
    assert [p.name for p in tmp_path.iterdir()] == ["trajectories.npy"]


def test_columns_are_the_transpose_of_what_was_asked_for() -> None:
    losses = np.arange(20, dtype=np.float32).reshape(4, 5)
    found = columns(losses, [0, 3], np.array([4, 1, 2]))
    np.testing.assert_array_equal(found, losses[[0, 3]][:, [4, 1, 2]].T)
    assert found.flags["C_CONTIGUOUS"]
    assert found.dtype == np.float32
