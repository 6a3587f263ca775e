"""Both sides of the label conflict, on trajectories and losses of known kinds."""

import numpy as np
import pytest

from sanitize.scores import ScoreInputs, label_conflict


def inputs_of(early: np.ndarray, second: np.ndarray, class_id: np.ndarray | None = None) -> ScoreInputs:
    """Log losses that fall from `early` to the same end for all, and those of the second opinion."""
    samples = len(early)
    falling = np.concatenate([early[:, None].repeat(8, 1), np.full((samples, 12), -6.0)], axis=1)
    return ScoreInputs(
        trajectories=np.exp(falling).astype(np.float32),
        class_id=np.zeros(samples, np.int32) if class_id is None else class_id,
        trusted=np.arange(samples) < 100,
        seed=0,
        second_opinion=lambda: np.exp(second).astype(np.float32),
    )


def test_too_hard_and_too_easy_both_come_before_what_is_only_slow() -> None:
    random = np.random.default_rng(0)
    early, second = random.normal(-1, 0.7, 2000), random.normal(-1, 0.7, 2000)
    second += 0.8 * (early + 1)  # a hard sample is hard for both
    wrong, shortcuts = slice(1900, 1950), slice(1950, 2000)
    early[wrong], second[wrong] = 1.0, 1.8
    early[shortcuts], second[shortcuts] = -4.0, -1.0
    found = label_conflict.evidence(inputs_of(early, second))
    usual = np.quantile(found.score[:1900], 0.95)
    assert (found.score[wrong] > usual).all()
    assert (found.score[shortcuts] > usual).all()
    hard, easy = found.signals["label_conflict"], found.signals["shortcut"]
    assert hard[wrong].min() > np.quantile(hard[:1900], 0.95) > hard[shortcuts].max()
    assert easy[shortcuts].min() > np.quantile(easy[:1900], 0.95)


def test_a_noisy_class_is_judged_by_its_own_spread() -> None:
    random = np.random.default_rng(1)
    class_id = (np.arange(2000) % 2).astype(np.int32)
    second = np.where(class_id == 1, random.normal(0, 1.5, 2000), random.normal(-3, 0.3, 2000))
    score = label_conflict.score(inputs_of(np.full(2000, -1.0), second, class_id))
    high = score > np.quantile(score, 0.95)
    assert high[class_id == 0].mean() == pytest.approx(0.05, abs=0.02)
    assert high[class_id == 1].mean() == pytest.approx(0.05, abs=0.02)


def test_rarity_is_the_log_of_the_share_that_is_as_large() -> None:
    found = label_conflict.rarity(np.array([3, 1, 3, 2], np.float32))
    np.testing.assert_allclose(found, -np.log([2 / 4, 4 / 4, 2 / 4, 3 / 4]), rtol=1e-6)
    assert (label_conflict.rarity(np.zeros(5, np.float32)) == 0).all()
