import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from sanitize.scores import knn
from sanitize.scores.badloss import badloss_scores
from sanitize.scores.knn import nearest_distances


def trajectories(count: int = 300, epochs: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, 1, (count, 1)) + rng.normal(0, 0.3, (count, epochs))).astype(np.float32)


def gpus() -> int:
    import faiss

    return int(getattr(faiss, "get_num_gpus", int)())


@pytest.mark.parametrize("k", [1, 7, 50])
def test_distances_against_sklearn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_BATCH", 64)
    values = trajectories()
    found = nearest_distances(values, values[:80], k)
    expected, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(values[:80]).kneighbors(values)
    assert found.dtype == np.float32
    assert found.shape == (300, k)
    # |a|² + |b|² - 2ab loses digits where a and b are nearly equal
    np.testing.assert_allclose(found, expected, atol=2e-2)
    np.testing.assert_allclose(found[80:], expected[80:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [0, 81])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="80 references"):
        nearest_distances(trajectories(), trajectories(80), k)


def test_badloss_is_equation_2() -> None:
    values = trajectories()
    trusted = np.zeros(300, bool)
    trusted[200:260] = True
    found = badloss_scores(values, trusted, 50)
    for row in range(300):
        distances = sorted(
            float(np.linalg.norm(values[row].astype(float) - values[other]))
            for other in np.flatnonzero(trusted)
            if other != row
        )
        expected = np.mean([np.log(distance + 1e-8) for distance in distances[:50]])
        assert found[row] == pytest.approx(expected, abs=2e-3)


def test_a_twin_of_a_trusted_sample_is_the_most_ordinary_there_is() -> None:
    values = trajectories()
    trusted = np.zeros(300, bool)
    trusted[:60] = True
    values[100] = values[5]
    assert badloss_scores(values, trusted, 1)[100] < -5
    assert badloss_scores(values, trusted, 1)[trusted].min() > -5


def test_badloss_refuses_nonsense() -> None:
    values, trusted = trajectories(), np.zeros(300, bool)
    trusted[:50] = True
    with pytest.raises(ValueError, match="k = 50 needs more than 50"):
        badloss_scores(values, trusted, 50)
    with pytest.raises(ValueError, match="shape"):
        badloss_scores(values, trusted[:-1], 5)


@pytest.mark.cuda
@pytest.mark.skipif("gpus() == 0", reason="FAISS sees no GPU")
def test_gpu_and_cpu_agree() -> None:
    values = trajectories(5_000)
    on_gpu = nearest_distances(values, values[:250], 50, gpu=True)
    on_cpu = nearest_distances(values, values[:250], 50)
    np.testing.assert_allclose(on_gpu[250:], on_cpu[250:], rtol=1e-3, atol=1e-3)
