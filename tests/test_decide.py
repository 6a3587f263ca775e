import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom

from sanitize.config import CONFIDENCE, DecisionConfig, least_alpha
from sanitize.errors import InputError, UsageError
from sanitize.scores import ScoreInputs, decide
from sanitize.scores.decide import (
    anomaly_scores,
    centre_within_class,
    conformal_p_values,
    reasons,
    signals,
)

CLASS_IDS = st.sampled_from([0, 1, 2, 7, 300])


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Scores with ties, class ids with gaps, at least one trusted and one corpus sample."""
    count = draw(st.integers(2, 40))
    scores = draw(st.lists(st.sampled_from([-1.5, 0, 0.25, 1, 1e6]), min_size=count, max_size=count))
    class_id = draw(st.lists(CLASS_IDS, min_size=count, max_size=count))
    trusted = draw(st.lists(st.booleans(), min_size=count - 2, max_size=count - 2))
    return (
        np.array(scores, np.float32),
        np.array(class_id, np.int32),
        np.array([*trusted, True, False]),
    )


def config(
    alpha: float | None = None, reject: float | None = None, cap: float | None = None
) -> DecisionConfig:
    return DecisionConfig(alpha=alpha, reject=reject, class_cap=cap)


@given(cases())
def test_p_values_are_the_definition(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, _, trusted = case
    found = conformal_p_values(scores, trusted)
    for row in range(len(scores)):
        others = [scores[i] for i in np.flatnonzero(trusted) if i != row]
        at_least = sum(other >= scores[row] for other in others)
        # if a share p of all samples scored so high, one trusted set in ten would hold so few of them
        seldom = binom.cdf(at_least, len(others), found[row]) if at_least < len(others) else found[row] - 0.9
        assert seldom == pytest.approx(0.1, abs=1e-5)


@given(cases())
def test_centring_against_a_naive_loop(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, class_id, _ = case
    found = centre_within_class(scores, class_id)
    for row in range(len(scores)):
        same = scores[class_id == class_id[row]].astype(float)
        assert found[row] == pytest.approx(scores[row] - np.percentile(same, 25))


@given(cases(), st.sampled_from([0.05, 0.3, 0.9]), st.sampled_from([0.2, 0.5, 1.0]), st.booleans())
def test_decisions_keep_their_promises(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], level: float, cap: float, by_alpha: bool
) -> None:
    scores, class_id, trusted = case
    assume(not by_alpha or (1 - level) ** trusted.sum() < 0.1)
    settings = {"alpha": level} if by_alpha else {"reject": level}
    free = decide.decide(scores, class_id, trusted, config(**settings))
    assert not (free.flagged & trusted).any()
    assert free.spared_by_cap == 0
    if by_alpha:
        np.testing.assert_array_equal(free.flagged, (free.p_value <= level) & ~trusted)
    else:
        assert free.flagged.sum() == round(level * int((~trusted).sum()))
    if free.flagged.any():
        assert free.threshold == free.score[free.flagged].min()
        if not by_alpha:
            assert free.score[~free.flagged & ~trusted].max(initial=-np.inf) <= free.threshold
    else:
        assert free.threshold is None
    capped = decide.decide(scores, class_id, trusted, config(**settings, cap=cap))
    assert not (capped.flagged & ~free.flagged).any()
    assert capped.spared_by_cap == free.flagged.sum() - capped.flagged.sum()
    for own in np.unique(class_id):
        mine = (class_id == own) & ~trusted
        limit = int(np.floor(mine.sum() * cap))
        assert capped.flagged[mine].sum() == min(limit, free.flagged[mine].sum())
        spared = free.flagged & ~capped.flagged & mine
        if spared.any() and capped.flagged[mine].any():  # the most suspicious stay flagged
            assert capped.score[spared].max() <= capped.score[capped.flagged & mine].min()


@pytest.mark.parametrize(("reject", "count"), [(0.001, 0), (0.4, 80), (0.1234, 25), (0.99, 198)])
def test_reject_is_exact_and_takes_the_highest(reject: float, count: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=260).astype(np.float32)
    trusted = np.arange(260) >= 200
    found = decide.decide(scores, rng.integers(0, 5, 260).astype(np.int32), trusted, config(reject=reject))
    assert set(np.flatnonzero(found.flagged)) == set(np.argsort(-scores[:200])[:count])
    if count:
        expected = (scores[200:] >= np.sort(scores[:200])[-count]).mean()
        assert found.trusted_flagged_ratio == pytest.approx(expected)


def test_the_cap_spares_a_small_class() -> None:
    scores = np.r_[np.arange(100.0), np.arange(200.0, 210.0), np.zeros(60)].astype(np.float32)
    class_id = np.r_[np.zeros(100), np.ones(10), np.arange(60) % 2].astype(np.int32)
    trusted = np.arange(170) >= 110
    found = decide.decide(scores, class_id, trusted, config(reject=0.2, cap=0.3))
    assert found.flagged[:100].sum() == 12
    assert np.flatnonzero(found.flagged[100:110]).tolist() == [7, 8, 9]
    assert found.spared_by_cap == 7


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_clean_data_loses_at_most_alpha(alpha: float) -> None:
    """Exchangeable scores: of 400 trusted sets a tenth cost more than alpha, give or take two sigma."""
    lost = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        class_id = rng.integers(0, 5, 4250).astype(np.int32)
        scores = (rng.gamma(2, 1, 4250) + class_id).astype(np.float32)
        trusted = np.arange(4250) >= 4000
        made = decide.decide(scores, class_id, trusted, config(alpha=alpha))
        lost.append(made.flagged.sum() / 4000)
    assert np.mean(np.array(lost) > alpha) < 0.1 + 2 * np.sqrt(0.1 * 0.9 / 400)
    # no more is left unspent than that takes: 1.28 standard deviations of the trusted set's own share
    unspent = 1.28 * np.sqrt(alpha * (1 - alpha) / 250)
    assert np.mean(lost) == pytest.approx(alpha - unspent, abs=0.006)


def test_a_hard_class_is_not_judged_harder() -> None:
    rng = np.random.default_rng(0)
    class_id = np.repeat(np.arange(2), 1000).astype(np.int32)
    scores = (rng.normal(size=2000) + 5 * class_id).astype(np.float32)
    trusted = np.arange(2000) % 8 == 0
    made = decide.decide(scores, class_id, trusted, config(alpha=0.1))
    for own in (0, 1):
        assert 0.05 < made.flagged[class_id == own].mean() < 0.15


def test_anomaly_scores_are_shares_of_the_corpus() -> None:
    scores = np.array([3, 1, 2, 2, 9, -4], np.float32)
    trusted = np.array([False] * 4 + [True] * 2)
    np.testing.assert_allclose(anomaly_scores(scores, trusted), [1, 0.25, 0.75, 0.75, 1, 0])


def test_signals() -> None:
    losses = np.exp(np.array([[0, -1, -2, -3, -4, -5], [0, 0, 0, 0, 0, 0]])).astype(np.float32)
    found = signals(losses)
    np.testing.assert_allclose(found["early_log_loss"], [-0.5, 0], atol=2e-3)
    np.testing.assert_allclose(found["late_log_loss"], [-4.5, 0], atol=2e-2)
    np.testing.assert_allclose(found["loss_swing"], [0, 0], atol=1e-2)
    assert all(values.dtype == np.float32 for values in found.values())


def judged(small_class: bool = False) -> tuple[ScoreInputs, list[str]]:
    """100 trusted samples with losses 1 … 2, then samples that are lower, higher, wavering and ordinary."""
    steady = np.linspace(1, 2, 100)[:, None] * np.ones(9)
    odd = np.stack(
        [np.full(9, 0.2), np.full(9, 7.0), 1.5 * np.exp(np.tile([0.4, -0.4], 5)[:9]), np.full(9, 1.5)]
    )
    class_id = np.zeros(104, np.int32)
    if small_class:
        class_id[100:] = 1
    inputs = ScoreInputs(
        trajectories=np.concatenate([steady, odd]).astype(np.float32),
        class_id=class_id,
        trusted=np.arange(104) < 100,
        seed=0,
    )
    return inputs, reasons(inputs, {}, np.arange(100, 104))


def test_reasons_in_words() -> None:
    _, found = judged()
    assert found[0] == "learned earlier than all trusted samples of its class"
    assert found[1] == "learned later than all trusted samples of its class"
    assert found[2].startswith("its loss jumps between epochs more than that of all")
    assert found[3].startswith("no single trait stands out")
    _, found = judged(small_class=True)
    assert found[0] == "learned earlier than all trusted samples (its class has too few)"


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.1, "reject": 0.1},
        {"alpha": None, "reject": None},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": float("nan")},
        {"alpha": None, "reject": 1.0},
        {"alpha": None, "reject": -0.1},
        {"class_cap": 0.0},
        {"class_cap": 1.5},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float | None]) -> None:
    with pytest.raises(UsageError, match="--"):
        DecisionConfig(**settings)  # type: ignore[arg-type]


def test_defaults_of_the_decision() -> None:
    chosen = DecisionConfig.choose("badloss", None, None, 0.5)
    assert (chosen.alpha, chosen.reject) == (None, 0.4)
    chosen = DecisionConfig.choose("mahalanobis", None, None, None)
    assert (chosen.alpha, chosen.reject, chosen.class_cap) == (0.07, None, 0.5)
    assert DecisionConfig.choose("badloss", None, None, None, True).class_cap is None
    chosen = DecisionConfig.choose("badloss", 0.2, None, 0.5)
    assert (chosen.alpha, chosen.reject) == (0.2, None)


def test_an_alpha_that_could_flag_nothing_is_refused() -> None:
    """63 trusted samples: of a share under 3.6 % more than one set in ten holds none."""
    scores, class_id = np.arange(200, dtype=np.float32), np.zeros(200, np.int32)
    trusted = np.arange(200) < 63
    with pytest.raises(
        InputError, match=r"--alpha 0\.01 needs at least 230 usable trusted samples and there are 63"
    ):
        decide.decide(scores, class_id, trusted, config(alpha=0.01))
    assert decide.decide(scores, class_id, trusted, config(alpha=0.037)).flagged.any()


def test_what_no_trusted_sample_can_tell_is_refused() -> None:
    for trusted, alpha in ((0, 0.05), (1, 0.5), (250, 1e-17)):
        with pytest.raises(InputError, match="usable trusted samples"):
            decide.check_alpha(alpha, trusted)
    assert least_alpha(0) == 1
    assert least_alpha(1) == CONFIDENCE


def test_nothing_to_reject_is_refused() -> None:
    with pytest.raises(UsageError, match="--reject 0"):
        config(reject=0.0)


def test_a_group_comes_before_a_label_conflict_and_this_before_the_trajectory() -> None:
    trajectories = np.linspace(1, 2, 60, dtype=np.float32)[:, None].repeat(4, 1)
    inputs = ScoreInputs(
        trajectories=trajectories,
        class_id=np.zeros(60, np.int32),
        trusted=np.arange(60) < 40,
        seed=0,
    )
    conflict = np.arange(60, dtype=np.float32)
    odds = np.where(np.arange(60) == 59, 3, -20).astype(np.float32)
    shortcut = np.where(np.arange(60) == 51, 99, -conflict)
    found = {
        "label_conflict": np.where(np.arange(60) == 51, 0, conflict),
        "shortcut": shortcut,
        "group_log_odds": odds,
    }
    rows = np.array([50, 51, 59])
    assert reasons(inputs, found, rows) == [
        "a second, augmented model believes its label less than those of all trusted samples of its class",
        "the proxy learned it early and a second, augmented model did not, by more than for all trusted"
        " samples of its class",
        "shares something with other samples of its label",
    ]
    assert "learned later" in reasons(inputs, {}, rows)[2]


def test_reject_with_ties_counts_only_trusted_samples_above_them() -> None:
    scores = np.full(100, -20, np.float32)
    scores[[60, 61, 3]] = 5
    trusted = np.arange(100) < 50
    config = DecisionConfig(method="abl", alpha=None, reject=0.2, class_cap=None)
    made = decide.decide(scores, np.zeros(100, np.int32), trusted, config)
    assert made.flagged.sum() == 10
    assert made.flagged[[60, 61]].all()
    assert made.trusted_flagged_ratio == pytest.approx(1 / 50)
