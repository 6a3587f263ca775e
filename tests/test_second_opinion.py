"""The second model: deterministic, resumable, and not taken in by a trigger or a wrong label."""

from pathlib import Path

import numpy as np
import pytest

from sanitize.config import ProxyConfig
from sanitize.dynamics import second_opinion
from sanitize.dynamics.proxy import Samples, setup
from sanitize.progress import Silent

torch = pytest.importorskip("torch")


def samples(count: int = 1200, wrong: float = 0.08) -> tuple[Samples, np.ndarray]:
    """Two classes of bright and dark stripes; some labels are wrong."""
    rng = np.random.default_rng(0)
    true = (np.arange(count) % 2).astype(np.int32)
    stripes = np.where(true[:, None], np.arange(32) // 4 % 2, np.arange(32) // 8 % 2)
    pixels = 80 + 80 * stripes[:, None, :, None] + rng.integers(-40, 40, (count, 32, 32, 3))
    given, flipped = true.copy(), rng.random(count) < wrong
    given[flipped] = 1 - given[flipped]
    return Samples(pixels=pixels.astype(np.uint8), class_id=given, rows=np.arange(count), classes=2), flipped


def run(tmp_path: Path, name: str = "a") -> np.ndarray:
    made, _ = samples()
    resolved = setup(ProxyConfig(proxy="small", device="cpu"), len(made.rows))
    return second_opinion.losses(made, 0, resolved, tmp_path / name, Silent())


def test_wrong_labels_are_not_believed_and_the_seed_fixes_the_result(tmp_path: Path) -> None:
    _, wrong = samples()
    losses = run(tmp_path)
    assert losses.dtype == np.float32
    assert losses.shape == wrong.shape
    assert losses[wrong].min() > np.quantile(losses[~wrong], 0.99)
    np.testing.assert_array_equal(losses, run(tmp_path, "b"))


def test_a_killed_run_goes_on_and_ends_with_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path)
    real, looks = second_opinion.evaluate, []

    def killed(*given: object) -> object:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(second_opinion, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "killed")
    monkeypatch.setattr(second_opinion, "evaluate", real)
    np.testing.assert_array_equal(run(tmp_path, "killed"), whole)
    np.testing.assert_array_equal(run(tmp_path, "killed"), whole)  # finished: measured again, not trained


def test_the_highest_losses_of_each_class_are_left_out() -> None:
    class_id = np.array([0] * 20 + [1] * 10, np.int32)
    running = np.arange(30, dtype=np.float32)[::-1].copy()
    believed = second_opinion._believed(running, class_id)
    np.testing.assert_array_equal(believed, [*range(3, 20), *range(21, 30)])


def test_augmented_images_are_shifted_and_mirrored_whole() -> None:
    images = torch.zeros(64, 3, 32, 32)
    images[:, :, 16, 16] = 1.0
    torch.manual_seed(0)
    changed = second_opinion._augment(images)
    assert changed.shape == images.shape
    np.testing.assert_allclose(changed.sum((1, 2, 3)), 3)
    places = {tuple(map(int, place)) for place in changed[:, 0].nonzero()[:, 1:]}
    assert len(places) > 20
    assert all(abs(row - 16) <= 4 and 11 <= column <= 20 for row, column in places)


def test_the_rate_rises_and_falls() -> None:
    rates = [second_opinion._learning_rate(done) for done in np.linspace(0, 1, 11)]
    assert max(rates) == rates[3] == pytest.approx(second_opinion.LEARNING_RATE)
    assert rates[-1] == pytest.approx(0)
