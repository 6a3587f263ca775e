"""The papers' baseline defences: against naive computations, and on cases where they must work."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import sanitize
from sanitize import scores
from sanitize.attacks import stamp
from sanitize.config import DecisionConfig
from sanitize.errors import InputError
from sanitize.pipeline import score_inputs
from sanitize.rundir import RunDir
from sanitize.scores import (
    ScoreInputs,
    cognitive_distillation,
    frequency_analysis,
    neural_cleanse,
    poisoned_sample_sensitivity,
)
from sanitize.scores.activation_clustering import cluster_scores
from sanitize.scores.decide import decide
from sanitize.scores.frequency_analysis import spectrum, with_artefacts
from sanitize.scores.network import features, pixels_of
from sanitize.scores.spectral_signatures import squared_projections

BASELINES = [
    "abl",
    "activation-clustering",
    "cognitive-distillation",
    "frequency-analysis",
    "neural-cleanse",
    "poisoned-sample-sensitivity",
    "random-removal",
    "spectral-signatures",
]


def inputs(**arrays: Any) -> ScoreInputs:
    """Eighty trusted of 400 samples in two classes, and whatever a test is about."""
    rng = np.random.default_rng(0)
    trusted = np.arange(400) < 80
    given: dict[str, Any] = {
        "trajectories": rng.random((400, 4)).astype(np.float32),
        "class_id": (np.arange(400) % 2).astype(np.int32),
        "trusted": trusted,
        "seed": 0,
    }
    return ScoreInputs(**given | arrays)


def planted_activations() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Two classes of 300; forty samples of class 1 lie off to one side, in one direction of twenty."""
    rng = np.random.default_rng(1)
    activations = rng.normal(0, 1, (600, 20)).astype(np.float32)
    class_id = (np.arange(600) % 2).astype(np.int32)
    poison = (class_id == 1) & (np.arange(600) >= 520)
    activations[poison] += 6 * np.eye(20, dtype=np.float32)[3]
    return activations, class_id, poison


def auroc(values: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, values))


def test_baselines_are_methods_with_their_published_shares() -> None:
    assert set(BASELINES) <= set(scores.methods())
    shares = {name: scores.default_reject(name) for name in BASELINES}
    assert shares["abl"] == shares["spectral-signatures"] == 0.15
    assert shares["activation-clustering"] is shares["random-removal"] is None
    assert DecisionConfig.choose("abl", None, None, None).reject == 0.15
    assert DecisionConfig.choose("abl", 0.2, None, None).reject is None


def test_abl_is_the_lowest_final_loss() -> None:
    given = inputs()
    order = np.argsort(-scores.score("abl", given))
    np.testing.assert_array_equal(order, np.argsort(given.trajectories[:, -1]))


def test_random_removal_is_uniform_and_seeded() -> None:
    found = scores.score("random-removal", inputs())
    np.testing.assert_array_equal(found, scores.score("random-removal", inputs()))
    assert (found != scores.score("random-removal", inputs(seed=1))).any()
    assert found.min() >= 0
    assert abs(found.mean() - 0.5) < 0.06
    assert abs(auroc(found, inputs().trusted) - 0.5) < 0.1


def test_squared_projections_against_a_naive_svd() -> None:
    activations, class_id, _ = planted_activations()
    found = squared_projections(activations, class_id)
    for own in (0, 1):
        mine = activations[class_id == own].astype(np.float64)
        mine = mine - mine.mean(axis=0)
        top = np.linalg.svd(mine)[2][0]
        np.testing.assert_allclose(found[class_id == own], [(row @ top) ** 2 for row in mine], rtol=1e-4)


@pytest.mark.parametrize("method", ["spectral-signatures", "activation-clustering"])
def test_activation_methods_find_a_planted_group(method: str) -> None:
    activations, class_id, poison = planted_activations()
    given = ScoreInputs(
        trajectories=np.zeros((600, 3), np.float32),
        class_id=class_id,
        trusted=np.arange(600) < 100,
        seed=0,
        activations=lambda: activations,
    )
    found = scores.score(method, given)
    assert found.shape == (600,)
    assert found.dtype == np.float32
    assert auroc(found[class_id == 1], poison[class_id == 1]) > 0.99
    np.testing.assert_array_equal(found, scores.score(method, given))


def test_activation_clustering_ranks_the_split_class_first() -> None:
    activations, class_id, poison = planted_activations()
    found = cluster_scores(activations, class_id, seed=0)
    assert (np.argsort(-found)[: poison.sum()] >= 520).all()
    assert found[poison].min() > found[~poison].max()


def test_activation_clustering_takes_what_cannot_be_split() -> None:
    flat = np.ones((40, 5), np.float32)
    class_id = np.repeat(np.array([0, 1], np.int32), [35, 5])
    assert (cluster_scores(flat, class_id, seed=0) == -1).all()


def smooth_pictures(count: int, seed: int, side: int = 16) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 4, 4, 3))
    weights = np.stack([np.interp(np.linspace(0, 3, side), range(4), row) for row in np.eye(4)], axis=1)
    pictures = np.einsum("hi,nijc,wj->nhwc", weights, coarse, weights)
    noisy = pictures + rng.normal(0, 0.01, pictures.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def test_frequency_analysis_finds_noise_it_was_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trusted are clean; 100 of 320 others carry an additive trigger. Measured AUROC .99 to 1.0."""
    monkeypatch.setattr(frequency_analysis, "EPOCHS", 8)
    pictures = smooth_pictures(400, seed=2)
    poison = np.arange(400) >= 300
    stamped = stamp("blend-random", pictures[poison].astype(np.float32) / 255, seed=5, strength=2)
    pictures[poison] = (stamped * 255).round().astype(np.uint8)
    given = inputs(images=lambda: pictures)
    found = scores.score("frequency-analysis", given)
    assert found.dtype == np.float32
    assert auroc(found, poison) > 0.9
    clean = ~poison & ~given.trusted
    assert 0.3 < auroc(found[given.trusted | clean], clean[given.trusted | clean]) < 0.7


def test_frequency_analysis_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency_analysis, "EPOCHS", 1)
    given = inputs(images=lambda: smooth_pictures(400, seed=2))
    first, second = (scores.score("frequency-analysis", given) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_spectrum_is_the_cosine_transform() -> None:
    image = np.random.default_rng(0).random((1, 6, 8, 3)).astype(np.float32)
    found = spectrum(image)
    assert found.shape == (1, 3, 6, 8)
    u, v = 2, 5
    rows = np.cos(np.pi * (np.arange(6) + 0.5) * u / 6) * np.sqrt(2 / 6)
    columns = np.cos(np.pi * (np.arange(8) + 0.5) * v / 8) * np.sqrt(2 / 8)
    naive = rows @ image[0, :, :, 1] @ columns
    assert found[0, 1, u, v] == pytest.approx(np.log(abs(naive) + 1e-3), abs=1e-4)


def test_artefacts_change_every_image_and_leave_the_originals() -> None:
    images = smooth_pictures(60, seed=3).astype(np.float32) / 255
    before = images.copy()
    drawn = with_artefacts(images, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)
    assert (np.abs(drawn - images).max(axis=(1, 2, 3)) > 0).mean() > 0.95
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def corner_network() -> Any:
    """Says class 1 by a bright corner pixel, and otherwise weighs the whole image; features are both."""
    import torch
    from torch import nn

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2))
            self.last = nn.Linear(2, 2, bias=False)
            self.last.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            corner = images[:, :, :2, :2].mean(dim=(1, 2, 3))
            lit = 24 * torch.nn.functional.softplus(8 * (corner - 0.7))
            whole = 60 * images.mean(dim=(1, 2, 3)) * (1 - torch.sigmoid(20 * (corner - 0.8)))
            return self.last(self.gain * torch.stack([whole, lit], dim=1))  # type: ignore[no-any-return]

    return Corner().eval().requires_grad_(False)


def corner_case() -> tuple[ScoreInputs, npt.NDArray[np.bool_]]:
    """120 smooth pictures, the last thirty with a white corner, and the network that fell for it."""
    pictures = smooth_pictures(120, seed=4) // 2 + 40
    poison = np.arange(120) >= 90
    pictures[poison, :2, :2] = 255
    given = ScoreInputs(
        trajectories=np.zeros((120, 3), np.float32),
        class_id=poison.astype(np.int32),
        trusted=np.arange(120) < 60,
        seed=0,
        images=lambda: pictures,
        network=corner_network,
    )
    return given, poison


@pytest.mark.parametrize("method", ["cognitive-distillation", "poisoned-sample-sensitivity"])
def test_methods_that_ask_the_network_find_the_corner(method: str) -> None:
    given, poison = corner_case()
    found = scores.score(method, given)
    assert found.shape == (120,)
    assert found.dtype == np.float32
    assert auroc(found, poison) > 0.95
    np.testing.assert_array_equal(found, scores.score(method, given))


def test_cognitive_distillation_in_bfloat16_is_that_of_float32_to_a_few_pixels_in_a_hundred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, _ = corner_case()
    quick = scores.score("cognitive-distillation", given)
    monkeypatch.setattr(cognitive_distillation, "fast", lambda device: nullcontext())
    exact = scores.score("cognitive-distillation", given)
    np.testing.assert_allclose(quick, exact, atol=0.05)


def test_neural_cleanse_rebuilds_the_corner() -> None:
    given, _ = corner_case()
    mask, pattern = neural_cleanse.rebuild(
        corner_network(), given.images()[:60], [1], np.random.default_rng(0)
    )
    inside, outside = mask[0, 0, :2, :2], mask[0, 0, 3:, 3:]
    assert inside.mean() > 0.5
    assert outside.mean() < 0.1
    assert pattern[0, :, :2, :2].mean() > 0.8


def test_a_class_that_no_trigger_reaches_is_not_taken_for_a_target() -> None:
    """Its mask keeps growing, because the weight on its size falls."""
    import torch

    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.margin = torch.nn.Parameter(torch.tensor(50.0), requires_grad=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            brightness = images.mean(dim=(1, 2, 3))
            return torch.stack([self.margin - brightness, brightness], dim=1)

    clean = np.full((8, 6, 6, 3), 100, np.uint8)
    mask, _ = neural_cleanse.rebuild(Stubborn(), clean, [1], np.random.default_rng(0))
    assert mask.mean() > 0.9


def test_neural_cleanse_scores_samples_by_the_trigger_of_an_outlying_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, poison = corner_case()
    monkeypatch.setattr(neural_cleanse, "STEPS", 60)
    monkeypatch.setattr(neural_cleanse, "unusually_small", lambda sizes: np.array([False, True]))
    found = scores.score("neural-cleanse", given)
    assert auroc(found, poison) > 0.95
    assert found.dtype == np.float32
    monkeypatch.setattr(neural_cleanse, "unusually_small", lambda sizes: np.array([True, True]))
    assert (scores.score("neural-cleanse", given) > found - 1e-3).all()


def test_neural_cleanse_says_so_when_no_class_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = corner_case()
    monkeypatch.setattr(neural_cleanse, "STEPS", 2)
    with pytest.warns(UserWarning, match="calls no class a target"):
        found = scores.score("neural-cleanse", given)
    assert (found == 0).all()
    assert not decide(found, given.class_id, given.trusted, DecisionConfig(alpha=0.1)).flagged.any()


def test_unusually_small_is_the_anomaly_index() -> None:
    sizes = np.array([100.0, 105, 95, 102, 98, 20, 300])
    assert neural_cleanse.unusually_small(sizes).tolist() == [False] * 5 + [True, False]
    assert not neural_cleanse.unusually_small(np.full(4, 7.0)).any()


def test_roughness_against_a_naive_loop() -> None:
    import torch

    mask = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    for image, found in zip(mask[:, 0].tolist(), cognitive_distillation.roughness(mask), strict=True):
        right = sum((image[i][j + 1] - image[i][j]) ** 2 for i in range(4) for j in range(4))
        down = sum((image[i + 1][j] - image[i][j]) ** 2 for i in range(3) for j in range(5))
        assert float(found) == pytest.approx((right + down) / 20)


def test_an_image_with_a_trigger_needs_less_than_half_the_mask() -> None:
    given, poison = corner_case()
    found = scores.score("cognitive-distillation", given)
    assert -found[poison].mean() < 0.5 * -found[~poison].mean()


def test_likeness_against_a_naive_loop() -> None:
    import torch

    seen = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 3, 3, 3, 5, 5, 5, 5])
    centres = [seen[labels == own].mean(dim=0) for own in (0, 3, 5)]
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(a, b, dim=0) for i, a in enumerate(centres) for j, b in enumerate(centres) if i != j]
    found = poisoned_sample_sensitivity.likeness(seen, labels)
    assert float(found) == pytest.approx(float(sum(pairs)) / 9, abs=1e-6)


def test_training_brings_the_classes_apart_and_leaves_the_given_network() -> None:
    import torch

    given, _ = corner_case()
    images, before = given.images(), corner_network()
    after = poisoned_sample_sensitivity.with_classes_apart(
        before, images, given.class_id, np.random.default_rng(0)
    )
    labels = torch.from_numpy(given.class_id).long()
    with torch.no_grad():
        first, second = (
            poisoned_sample_sensitivity.likeness(features(network, pixels_of(network, images)), labels)
            for network in (before, after)
        )
    assert second < first
    assert not after.training
    torch.testing.assert_close(before.gain, torch.ones(2))


def test_moved_keeps_what_is_the_same_everywhere() -> None:
    import torch

    flat = torch.full((3, 3, 9, 9), 0.25)
    rng = np.random.default_rng(0)
    torch.testing.assert_close(poisoned_sample_sensitivity.moved(flat, rng), flat)


@pytest.mark.parametrize("method", ["frequency-analysis", "activation-clustering"])
def test_what_was_not_given_is_an_error(method: str) -> None:
    with pytest.raises(InputError, match="score a run folder"):
        scores.score(method, inputs())


def test_a_run_gives_images_activations_and_network(finished: Path) -> None:
    import torch

    with RunDir.open(finished) as run:
        given, rows, _ = score_inputs(run, 0)
        images, activations, network = given.images(), given.activations(), given.network()
    pixels = np.load(finished / "pixels/pixels.npy")
    np.testing.assert_array_equal(images, pixels[rows])
    assert activations.shape == (len(rows), 128)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    batch = torch.from_numpy(pixels[rows][:8]).permute(0, 3, 1, 2).float() / 255
    logits = network(batch)
    np.testing.assert_allclose(logits, last(torch.from_numpy(activations[:8])), atol=1e-4)
    everything = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).float() / 255
    losses = torch.nn.functional.cross_entropy(
        network(everything), torch.from_numpy(given.class_id).long(), reduction="none"
    )
    # the trajectory was measured in bfloat16 where the processor has it
    np.testing.assert_allclose(losses, given.trajectories[:, -1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_filters_a_run(run_copy: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency_analysis, "EPOCHS", 2)
    monkeypatch.setattr(cognitive_distillation, "STEPS", 2)
    monkeypatch.setattr(neural_cleanse, "STEPS", 2)
    report = sanitize.filter(run_copy, method=method, class_cap=None)
    if scores.default_reject(method):
        assert report.flagged == round(0.15 * report.samples)
    else:
        assert report.flagged < 0.35 * report.samples


def test_pixels_that_are_gone_are_an_error(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "pixels")
    assert sanitize.filter(run_copy, method="abl").flagged
    for method in ("frequency-analysis", "spectral-signatures"):
        with pytest.raises(InputError, match=r"pixels\.npy is gone.*scan again"):
            sanitize.filter(run_copy, method=method)
