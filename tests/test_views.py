"""Each view shows what it is for, in images of very different texture and in classes of a few hundred."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from sanitize.attacks import stamp
from sanitize.scores import ScoreInputs, class_mixtures, views

torch = pytest.importorskip("torch")
CLASSES, PER_CLASS, SIDE = 3, 400, 32
View = Callable[[ScoreInputs], Iterator[tuple[str, npt.NDArray[np.intp], "torch.Tensor"]]]


def textures(seed: int, channels: int = 3) -> npt.NDArray[np.float32]:
    """(1200, 32, 32, 3): blurred noise of two scales; one image in ten has five times the texture."""
    rng = np.random.default_rng(seed)
    samples = CLASSES * PER_CLASS
    noise = rng.normal(size=(2, samples, channels, SIDE, SIDE)).astype(np.float32)
    coarse, fine = (
        torch.nn.functional.avg_pool2d(torch.from_numpy(each), size, 1, size // 2).numpy()
        for each, size in zip(noise, (9, 3), strict=True)
    )
    texture = np.where(rng.random(samples) < 0.1, 0.3, 0.06)[:, None, None, None]
    images = 0.45 + coarse + texture * fine
    images = np.moveaxis(images, 1, 3).repeat(3 // channels, 3)
    return np.asarray(images.clip(0, 1), np.float32)


def inputs_of(images: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]) -> ScoreInputs:
    return ScoreInputs(
        trajectories=np.ones((len(images), 3), np.float32),
        class_id=class_id,
        trusted=np.arange(len(images)) < 75,
        seed=0,
        images=lambda: np.rint(255 * images).astype(np.uint8),
    )


def labels() -> npt.NDArray[np.int32]:
    return np.arange(CLASSES * PER_CLASS, dtype=np.int32) % CLASSES


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[View], None]:
    return lambda view: monkeypatch.setattr(class_mixtures, "VIEWS", (view,))


@pytest.mark.parametrize(
    ("view", "attack"),
    [
        (views.contrasts, "patch"),
        (views.contrasts, "sinusoid"),
        (views.frequencies, "blend-random"),
        (views.frequencies, "frequency"),
    ],
)
def test_a_trigger_is_a_group_of_a_small_class(view: View, attack: str, only: Callable[[View], None]) -> None:
    only(view)
    images, class_id = textures(0), labels()
    chosen = np.flatnonzero(class_id == 1)[-40:]
    images[chosen] = stamp(attack, images[chosen])
    groups = class_mixtures.find(inputs_of(images, class_id), []).suspected
    assert {group.class_id for group in groups} == {1}
    assert {group.signal for group in groups} == {view.__name__}
    assert np.isin(chosen, groups[0].rows).mean() >= 0.95
    assert np.isin(groups[0].rows, chosen).mean() >= 0.95


def test_a_faint_picture_is_a_group_by_its_pattern(
    only: Callable[[View], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(views.pixels)
    images, class_id = textures(0), labels()
    chosen = np.flatnonzero(class_id == 1)[-40:]
    images[chosen] = 0.6 * images[chosen] + 0.4 * textures(9)[3]
    inputs = inputs_of(images, class_id)
    assert {group.signal for group in class_mixtures.find(inputs, []).suspected} <= {"pixels"}, (
        "too few samples"
    )
    monkeypatch.setattr(views, "SIDES", (8,))
    groups = class_mixtures.find(inputs, []).suspected
    assert {(group.class_id, group.signal) for group in groups} == {(1, "patterns")}
    assert np.isin(chosen, groups[0].rows).mean() >= 0.9


def test_an_edge_is_a_signed_root_and_grey_has_no_colour() -> None:
    part = torch.full((1, 3, 5, 5), 0.25)
    part[0, :, 2, 2] = 0.5
    edges = views._edges(part)[0, 0]
    assert edges[2, 2].item() == pytest.approx(0.5)
    assert edges[1, 1].item() == pytest.approx(-((0.25 / 8) ** 0.5))
    assert edges[0, 0].item() == 0
    waves = views._cosines(part)[0]
    torch.testing.assert_close(waves[1:], torch.zeros(2, 5, 5), atol=1e-6, rtol=0)
    assert waves[0, 0, 0].item() == pytest.approx(3**0.5 * part[0, 0].sum().item() / 5)


def test_copies_with_the_right_label_do_not_hide_the_wrong_ones(only: Callable[[View], None]) -> None:
    """A trigger that every class holds enters a covariance of all classes, but no median."""
    images, class_id = textures(1), labels()
    carriers = np.flatnonzero(class_id == 0)[-30:]
    covers = np.concatenate([np.flatnonzero(class_id == label)[-10:] for label in (1, 2)])
    both = np.concatenate([carriers, covers])
    images[both] = stamp("adaptive-blend", images[both], sample_ids=range(len(both)))
    only(views.frequencies)
    groups = class_mixtures.find(inputs_of(images, class_id), []).suspected
    assert {group.class_id for group in groups} == {0}
    assert np.isin(carriers, groups[0].rows).mean() >= 0.95


@pytest.mark.parametrize("view", [views.pixels, views.frequencies, views.contrasts])
@pytest.mark.parametrize("channels", [1, 3])
def test_texture_alone_is_no_group(view: View, channels: int, only: Callable[[View], None]) -> None:
    only(view)
    for seed in range(3):
        assert class_mixtures.find(inputs_of(textures(seed, channels), labels()), []).suspected == []


@pytest.mark.parametrize("view", [views.frequencies, views.contrasts])
def test_profiles_have_one_norm_and_no_mean(view: View) -> None:
    images = textures(2)
    seen = list(view(inputs_of(images, labels())))
    assert sorted(np.concatenate([rows for _, rows, _ in seen])) == list(range(len(images)))
    for _, rows, values in seen:
        assert values.shape == (len(rows), 1024 * (3 if view is views.frequencies else 1))
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-4, rtol=0)
        assert values.isfinite().all()
        norms = (values.square().mean(1)).sqrt()
        assert (norms - 1).abs().max() < 0.05, "but for the mean of the class, which was taken off"


@pytest.mark.parametrize("view", [views.frequencies, views.contrasts])
def test_large_images_are_reduced(view: View) -> None:
    images = textures(3).repeat(2, 1).repeat(2, 2)
    small = [values for _, _, values in view(inputs_of(textures(3), labels()))]
    large = [values for _, _, values in view(inputs_of(images, labels()))]
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other)


def test_a_hint_points_out_of_fold() -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.normal(size=(303, 7)))
    hint = random.normal(size=303).astype(np.float32)
    high, fold = hint >= np.quantile(hint, 0.9), np.arange(303) % class_mixtures.FOLDS
    expected = np.empty(303)
    for k in range(class_mixtures.FOLDS):
        others, mine = fold != k, fold == k
        direction = values[others & high].mean(0) - values[others & ~high].mean(0)
        along = (values[mine] @ direction).numpy()
        expected[mine] = along / along.std(ddof=1)
    np.testing.assert_allclose(class_mixtures._pointed(values, hint), expected, rtol=1e-6)
