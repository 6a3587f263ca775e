"""Two populations in one class: found when planted, not when there is one, or when trusted samples share
it."""

import dataclasses

import numpy as np
import pytest

from sanitize.dynamics.proxy import build
from sanitize.scores import ScoreInputs, class_mixtures, evidence, views
from sanitize.scores.network import block_activations

torch = pytest.importorskip("torch")
CLASSES, PER_CLASS, SIDE = 3, 1000, 8


def corpus(
    planted: float, strength: float = 0.3, trusted_too: bool = False
) -> tuple[ScoreInputs, np.ndarray]:
    """Smooth random images; a fixed pattern is added to a share of class 1, the rows returned."""
    rng = np.random.default_rng(0)
    samples = CLASSES * PER_CLASS
    class_id = np.arange(samples, dtype=np.int32) % CLASSES
    coarse = rng.normal(0.5, 0.15, (samples, SIDE // 2, SIDE // 2, 3))
    images = coarse.repeat(2, 1).repeat(2, 2) + rng.normal(0, 0.05, (samples, SIDE, SIDE, 3))
    trusted = np.zeros(samples, bool)
    trusted[:150] = True
    chosen = rng.permutation(np.flatnonzero((class_id == 1) & (trusted_too | ~trusted)))
    chosen = chosen[: round(planted * PER_CLASS)]
    images[chosen] += strength * rng.uniform(-1, 1, (SIDE, SIDE, 3))
    torch.manual_seed(0)
    network = build("small", CLASSES, SIDE).eval().requires_grad_(False)
    inputs = ScoreInputs(
        trajectories=rng.random((samples, 5), np.float32),
        class_id=class_id,
        trusted=trusted,
        seed=0,
        images=lambda: (255 * images.clip(0, 1)).astype(np.uint8),
        network=lambda: network,
    )
    return inputs, chosen


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_mixtures, "VIEWS", (views.pixels, views.frequencies, views.contrasts))


@pytest.fixture
def pixels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_mixtures, "VIEWS", (views.pixels,))


@pytest.mark.usefixtures("pixels_only")
@pytest.mark.parametrize("planted", [0.03, 0.1, 0.3])
def test_a_planted_pattern_is_a_group_of_its_class(planted: float) -> None:
    inputs, chosen = corpus(planted)
    groups = class_mixtures.distinct(class_mixtures.find(inputs, []).suspected, inputs.trusted)
    assert [group.class_id for group in groups] == [1]
    found = groups[0]
    assert found.signal in ("pixels", "patterns")
    assert found.separation > class_mixtures.SEPARATION[found.signal]
    assert found.trusted == inputs.trusted[found.rows].sum() == 0
    right = np.isin(chosen, found.rows)
    assert right.mean() > 0.97
    assert right.sum() / len(found.rows) > 0.97
    odds = class_mixtures.score(inputs)
    assert set(np.flatnonzero(odds > 0)) >= set(found.rows)
    assert (odds[inputs.class_id != 1] == -20).all()


def test_one_population_makes_no_group() -> None:
    assert class_mixtures.find(corpus(0.0)[0], []).suspected == []


def test_what_trusted_samples_share_is_no_group() -> None:
    assert class_mixtures.find(corpus(0.3, trusted_too=True)[0], []).suspected == []


@pytest.mark.usefixtures("pixels_only")
def test_a_hint_finds_what_is_too_weak_to_lead() -> None:
    inputs, chosen = corpus(0.03, strength=0.12)
    hint = np.random.default_rng(1).normal(size=len(inputs.class_id)).astype(np.float32)
    hint[chosen] += 3

    def recall(hints: list[np.ndarray]) -> float:
        odds = class_mixtures.log_odds(class_mixtures.find(inputs, hints).suspected, len(hint))
        return float((odds[chosen] > 0).mean())

    assert recall([hint]) > 0.9
    assert recall([hint]) >= recall([])


def test_small_classes_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    inputs = ScoreInputs(
        trajectories=rng.random((60, 3), np.float32),
        class_id=(np.arange(60) % 2).astype(np.int32),
        trusted=np.arange(60) < 10,
        seed=0,
        images=lambda: rng.integers(0, 256, (60, 8, 8, 3), np.uint8),
    )
    assert class_mixtures.find(inputs, []).suspected == []


@pytest.mark.parametrize("different", [0, 1])
def test_images_that_hardly_differ(different: int) -> None:
    """No direction at all, or fewer than are asked for."""
    images = np.zeros((600, 8, 8, 3), np.uint8)
    images[:, 0, 0, :different] = np.random.default_rng(0).integers(0, 256, (600, 1))
    inputs = ScoreInputs(
        trajectories=np.ones((600, 3), np.float32),
        class_id=(np.arange(600) % 2).astype(np.int32),
        trusted=np.arange(600) < 50,
        seed=0,
        images=lambda: images,
    )
    assert class_mixtures.find(inputs, [np.arange(600, dtype=np.float32)]).suspected == []


def test_evidence_of_a_method_with_and_without_groups() -> None:
    inputs, _ = corpus(0.1)
    inputs = dataclasses.replace(inputs, second_opinion=lambda: np.ones(len(inputs.class_id), np.float32))
    plain, combined = evidence("mahalanobis", inputs), evidence("combined", inputs)
    alone = evidence("class-mixtures", inputs)
    assert [group.class_id for group in alone.groups] == [1]
    np.testing.assert_array_equal(alone.score, alone.signals["group_log_odds"])
    assert plain.groups is None
    assert plain.signals == {}
    assert [group.class_id for group in combined.groups] == [1]
    assert set(combined.signals) == {"group_log_odds", "label_conflict", "shortcut"}
    inside = combined.signals["group_log_odds"] > 0
    assert combined.score[inside].min() > combined.score[~inside].max()


@pytest.mark.parametrize("proxy", ["small", "resnet18"])
def test_block_activations(proxy: str) -> None:
    torch.manual_seed(0)
    network = build(proxy, 4, 32).eval().requires_grad_(False)
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    blocks = block_activations(network, images)
    assert [block.shape[1] for block in blocks] == ([64, 128] if proxy == "small" else [128, 256])
    assert all(len(block) == 300 and np.isfinite(block).all() for block in blocks)
    again = block_activations(network, images[256:])
    np.testing.assert_allclose(blocks[0][256:], again[0], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in network.modules())


def test_small_groups_must_stand_further_apart() -> None:
    least = class_mixtures.least_separation
    assert least("pixels", 50, 0.1) == least("activations", 50, 0.01) == 4.0
    assert least("frequencies", 500, 0.1) == pytest.approx(6.1)
    assert least("contrasts", 500, 0.1) == pytest.approx(3.0 + 0.1 + 0.3)
    assert least("contrasts", 32, 32 / 600) > 4.6, "a natural group of clean CIFAR-10"
    assert least("patterns", 27, 0.027) == pytest.approx(2.7 + 50 / 27 + 0.03 / 0.027)


@pytest.mark.usefixtures("pixels_only")
def test_a_class_with_few_trusted_samples_has_no_groups() -> None:
    """With nine, a natural group of a third of the class holds none of them in one case of forty."""
    inputs, _ = corpus(0.3)
    own = np.flatnonzero(inputs.trusted & (inputs.class_id == 1))
    inputs.trusted[own[9:]] = False
    assert class_mixtures.find(inputs, []).suspected == []
    inputs.trusted[own[9]] = True
    assert [group.class_id for group in class_mixtures.find(inputs, []).suspected] != []


@pytest.mark.usefixtures("pixels_only")
def test_groups_that_trusted_samples_are_in_are_told_apart() -> None:
    """Beside a large attack the rest of the class is crisp, too, and holds all of its trusted samples."""
    both = class_mixtures.find(corpus(0.3, trusted_too=True)[0], []).distinct(corpus(0)[0].trusted)
    assert both["groups"] == []
    assert [group.class_id for group in both["shared_groups"]] == [1]
    assert both["shared_groups"][0].trusted > 5
    for planted in (0.45, 0.55):
        found = class_mixtures.find(corpus(planted)[0], [])
        assert found.suspected
        assert found.shared == []
