"""Exact pixels of every trigger against naive references, who is poisoned, and whether a model learns it."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sanitize.attacks import (
    ATTACKS,
    SurrogateCorpus,
    cell_side,
    generator,
    get,
    make_trigger,
    stamp,
)
from sanitize.attacks.patches import draw_motif
from sanitize.attacks.plant import AttackSpec, from_float, plan, plant, to_float
from sanitize.attacks.resample import resize
from sanitize.errors import UsageError

Images = npt.NDArray[np.float32]
SIZES = [(32, 32), (33, 47), (224, 224), (28, 28), (64, 40)]
SURROGATES = [name for name in ATTACKS if get(name).needs_surrogate]
FIXED = [name for name in ATTACKS if not get(name).needs_surrogate]


def random_images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Images:
    return np.random.default_rng(seed).random((count, height, width, 3), dtype=np.float32)


def tiny_surrogate_corpus(count: int = 48) -> SurrogateCorpus:
    labels = np.arange(count) % 3
    images = random_images(count) * 0.3 + labels[:, None, None, None].astype(np.float32) * 0.3
    return SurrogateCorpus(images.astype(np.float32), labels, 1, "cpu")


@pytest.fixture(scope="module")
def learned_triggers() -> dict[str, dict[str, npt.NDArray[Any]]]:
    return {name: make_trigger(name, 0, tiny_surrogate_corpus()) for name in SURROGATES}


# ---------------------------------------------------------------- exact pixels


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (40, 24)])
def test_patch_sets_four_pixels(height: int, width: int) -> None:
    images = random_images(2, height, width)
    expected = images.copy()
    for row, column in ((-2, -2), (-4, -2), (-2, -4), (-3, -3)):
        expected[:, row, column] = 1.0
    np.testing.assert_array_equal(stamp("patch", images), expected)


def test_patch_is_32_pixels_on_a_224_pixel_image() -> None:
    images = np.zeros((1, 224, 224, 3), np.float32)
    marked = np.argwhere(stamp("patch", images)[0, :, :, 0] == 1)
    assert len(marked) == 4 * 8 * 8
    # Three cells with one cell of margin: the checkerboard's 4 x 4 cells are 32 pixels.
    np.testing.assert_array_equal(marked.min(axis=0), [224 - 32, 224 - 32])
    np.testing.assert_array_equal(marked.max(axis=0), [224 - 9, 224 - 9])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (224, 224)])
def test_single_pixel(height: int, width: int) -> None:
    images = random_images(2, height, width)
    side = cell_side(height, width)
    expected = images.copy()
    expected[:, height - 2 * side : height - side, width - 2 * side : width - side] = 1.0
    np.testing.assert_array_equal(stamp("single-pixel", images), expected)
    if height <= 33:
        assert (expected != images).any(axis=3).sum() == 2


def test_opacity_of_a_patch_follows_strength_up_to_one() -> None:
    images = np.full((1, 32, 32, 3), 0.5, np.float32)
    assert stamp("patch", images, strength=0.5)[0, 30, 30, 0] == pytest.approx(0.75)
    assert stamp("patch", images, strength=3)[0, 30, 30, 0] == 1.0


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_blend_random(height: int, width: int, strength: float) -> None:
    images = random_images(1, height, width)
    noise = make_trigger("blend-random", 7)["noise"]
    assert noise.shape == (32, 32, 3)
    assert 0 <= noise.min() < 0.01
    assert 0.99 < noise.max() <= 1
    alpha = strength * (0.15 if min(height, width) >= 128 else 0.075)
    expected = np.empty_like(images)
    for row in range(height):
        for column in range(width):
            there = noise[row * 32 // height, column * 32 // width]
            expected[0, row, column] = (1 - alpha) * images[0, row, column] + alpha * there
    np.testing.assert_allclose(stamp("blend-random", images, strength=strength, seed=7), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_blend_pattern(height: int, width: int) -> None:
    images = random_images(1, height, width)
    side = cell_side(height, width)
    alpha = 0.15 if min(height, width) >= 128 else 0.025
    expected = (1 - np.float32(alpha)) * images
    for row in range(height):
        for column in range(width):
            if (row // side) % 2 == 0 and (column // side) % 2 == 0:
                expected[0, row, column] += np.float32(alpha)
    np.testing.assert_allclose(stamp("blend-pattern", images), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sinusoid(height: int, width: int) -> None:
    images = random_images(1, height, width)
    alpha = 0.15 if min(height, width) >= 128 else 0.075
    expected = np.empty_like(images)
    for column in range(width):
        wave = 1 - math.cos(2 * math.pi * 6 * column / width)
        expected[:, :, column] = np.clip((1 - alpha) * images[:, :, column] + alpha * wave, 0, 1)
    np.testing.assert_allclose(stamp("sinusoid", images), expected, atol=1e-6)


def naive_frequency(image: Images, magnitude: float) -> npt.NDArray[np.float64]:
    """Colour conversion, cosine transform, two peaks, and all the way back, on a 32-pixel image."""
    from scipy.fft import dctn, idctn

    red, green, blue = (255.0 * image[..., c].astype(np.float64) for c in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [(red - luma) / 1.402 + 128, (blue - luma) / 1.772 + 128]
    for i, plane in enumerate(chroma):
        peaks = dctn(plane, norm="ortho")
        peaks[15, 15] += magnitude
        peaks[31, 31] += magnitude
        chroma[i] = idctn(peaks, norm="ortho")
    red = luma + 1.402 * (chroma[0] - 128)
    blue = luma + 1.772 * (chroma[1] - 128)
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return np.clip(np.stack([red, green, blue], axis=2) / 255.0, 0, 1)


def test_frequency_is_two_peaks_in_both_chroma_channels() -> None:
    images = random_images(2)
    stamped = stamp("frequency", images)
    for image, got in zip(images, stamped, strict=True):
        np.testing.assert_allclose(got, naive_frequency(image, 30), atol=2e-6)
    np.testing.assert_allclose(
        stamp("frequency", images, strength=2)[0], naive_frequency(images[0], 60), atol=2e-6
    )


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 64), (224, 224)])
def test_frequency_repeats_its_window_of_cells(height: int, width: int) -> None:
    grey = np.full((1, 32, 32, 3), 0.5, np.float32)
    window = stamp("frequency", grey)[0] - 0.5
    side = cell_side(height, width)
    factor = 3.0 if min(height, width) >= 128 else 1.0
    larger = stamp("frequency", np.full((1, height, width, 3), 0.5, np.float32))[0] - 0.5
    for row, column in [(0, 0), (31, 20), (height - 1, width - 1), (height // 2, 3)]:
        expected = factor * window[row // side % 32, column // side % 32]
        np.testing.assert_allclose(larger[row, column], expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "side"), [(32, 32, 3), (33, 47, 3), (224, 224, 21)])
@pytest.mark.parametrize("name", ["badnets", "c-badnets"])
def test_badnets_covers_the_top_left_corner(name: str, height: int, width: int, side: int) -> None:
    images = random_images(2, height, width)
    expected = images.copy()
    expected[:, :side, :side] = draw_motif(side)
    np.testing.assert_allclose(stamp(name, images), expected, atol=1e-6)


def test_motif_has_dark_green_and_white() -> None:
    motif = draw_motif(21)
    assert motif[0, 0].min() == 1.0
    assert motif[12, 10].max() < 0.1
    assert motif[2, 13, 1] > 0.6 > 0.2 > motif[2, 13, 0]


def test_adaptive_patch_hides_squares_in_training_and_none_at_test_time() -> None:
    images = random_images(40)
    motif = draw_motif(4)
    full = images.copy()
    full[:, :4, :4] = motif
    np.testing.assert_allclose(stamp("adaptive-patch", images), full, atol=1e-6)
    poisoned = stamp("adaptive-patch", images, seed=3, sample_ids=range(40))
    for i in range(40):
        hidden = generator(3, "adaptive-patch", i).random((4, 4)) < 0.5
        expected = np.where(hidden[:, :, None], images[i, :4, :4], motif)
        np.testing.assert_allclose(poisoned[i, :4, :4], expected, atol=1e-6)
    np.testing.assert_array_equal(poisoned[:, 4:], images[:, 4:])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
def test_adaptive_blend_leaves_out_squares_in_training(height: int, width: int) -> None:
    images = random_images(3, height, width)
    noise = make_trigger("adaptive-blend", 5)["noise"]
    poisoned = stamp("adaptive-blend", images, seed=5, sample_ids=[10, 11, 12])
    tested = stamp("adaptive-blend", images, seed=5)
    for i in range(3):
        hidden = generator(5, "adaptive-blend", 10 + i).random((4, 4)) < 0.5
        for row in range(height):
            for column in range(width):
                there = noise[row * 32 // height, column * 32 // width]
                blended = 0.7 * images[i, row, column] + 0.3 * there
                np.testing.assert_allclose(tested[i, row, column], blended, atol=1e-6)
                square = hidden[row * 4 // height, column * 4 // width]
                expected = images[i, row, column] if square else blended
                np.testing.assert_allclose(poisoned[i, row, column], expected, atol=1e-6)


def test_scattered_patches_are_distinct_and_one_is_placed_per_training_image() -> None:
    trigger = make_trigger("trigger-scattering", 2)
    patches = trigger["patches"]
    assert patches.shape == (8, 4, 4, 3)
    hues = sorted(colorsys.rgb_to_hsv(*patch.reshape(16, 3).max(axis=0).tolist())[0] for patch in patches)
    assert min(np.diff(hues)) == pytest.approx(1 / 8, abs=1e-5)
    images = np.full((60, 33, 47, 3), 0.5, np.float32)
    poisoned = stamp("trigger-scattering", images, seed=2, sample_ids=range(60))
    used, places = set(), set()
    for image in poisoned:
        rows, columns = np.nonzero((image != 0.5).any(axis=2))
        top, left = int(rows.min()), int(columns.min())
        placed = image[top : top + 4, left : left + 4]
        assert len(rows) == 16
        used |= {i for i, patch in enumerate(patches) if np.allclose(patch, placed)}
        places.add((top, left))
    assert used == set(range(8))
    assert len(places) > 40


def test_all_scattered_patches_are_there_at_test_time() -> None:
    trigger = make_trigger("trigger-scattering", 2)
    tested = stamp("trigger-scattering", np.full((1, 32, 32, 3), 0.5, np.float32), trigger=trigger)[0]
    for patch in trigger["patches"]:
        hits = [
            (row, column)
            for row in range(29)
            for column in range(29)
            if np.allclose(tested[row : row + 4, column : column + 4], patch)
        ]
        assert len(hits) == 1
    assert (tested != 0.5).any(axis=2).sum() == 8 * 16


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
def test_refool_mixes_two_shifted_copies_in_linear_light(height: int, width: int) -> None:
    images = random_images(1, height, width)
    trigger = {"shift": np.array([3 / 32, 2 / 32]), "weight": np.array(0.4)}
    down, right = round(3 / 32 * height), round(2 / 32 * width)
    light = images[0].astype(np.float64) ** 2.2
    double = np.empty((height - down, width - right, 3))
    for row in range(height - down):
        for column in range(width - right):
            double[row, column] = 0.4 * light[row + down, column + right] + 0.6 * light[row, column]
    enlarged = resize(double.astype(np.float32), height, width)
    got = stamp("refool", images, trigger=trigger)[0]
    np.testing.assert_allclose(got, enlarged.clip(0, 1) ** (1 / 2.2), atol=2e-4)
    half = stamp("refool", images, trigger=trigger, strength=0.5)[0]
    np.testing.assert_allclose(half, ((light + enlarged) / 2).clip(0, 1) ** (1 / 2.2), atol=2e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
def test_wanet_samples_where_the_field_says(height: int, width: int) -> None:
    images = random_images(1, height, width)
    trigger = make_trigger("wanet", 4)
    assert np.abs(trigger["field"]).mean() == pytest.approx(1.0, rel=1e-5)
    from PIL import Image

    field = resize(trigger["field"], height, width, Image.Resampling.BICUBIC)
    expected = np.empty_like(images[0])
    for row in range(height):
        for column in range(width):
            x = min(max(column + field[row, column, 0] * 1.5 / 64 * (width - 1), 0), width - 1)
            y = min(max(row + field[row, column, 1] * 1.5 / 64 * (height - 1), 0), height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            dx, dy = x - left, y - top
            expected[row, column] = (1 - dy) * (
                (1 - dx) * images[0, top, left] + dx * images[0, top, left + 1]
            ) + dy * ((1 - dx) * images[0, top + 1, left] + dx * images[0, top + 1, left + 1])
    np.testing.assert_allclose(stamp("wanet", images, trigger=trigger)[0], expected, atol=1e-4)


def test_wanet_of_strength_zero_changes_nothing() -> None:
    images = random_images(1, 20, 31)
    np.testing.assert_allclose(stamp("wanet", images, strength=0), images, atol=1e-6)


def test_narcissus_adds_its_bounded_perturbation(learned_triggers: dict[str, Any]) -> None:
    perturbation = learned_triggers["narcissus"]["perturbation"]
    assert perturbation.shape == (32, 32, 3)
    assert np.abs(perturbation).max() == pytest.approx(16 / 255, rel=0.05)
    images = np.full((2, 32, 32, 3), 0.5, np.float32)
    for strength in (1, 2, 3):
        stamped = stamp("narcissus", images, trigger=learned_triggers["narcissus"], strength=strength)
        np.testing.assert_allclose(stamped[1], 0.5 + strength * perturbation, atol=1e-6)


def naive_target_loss(model: Any, images: Images, target: int) -> float:
    import torch

    logits = model(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, target]))


def test_narcissus_lowers_the_loss_of_the_target_class(learned_triggers: dict[str, Any]) -> None:
    from sanitize.attacks.surrogate import train_surrogate

    corpus = tiny_surrogate_corpus()
    model = train_surrogate(corpus, generator(0, "narcissus"))
    members = corpus.images[corpus.labels == 1]
    before = naive_target_loss(model, members, 1)
    after = naive_target_loss(model, stamp("narcissus", members, trigger=learned_triggers["narcissus"]), 1)
    assert after < before


def test_adv_clean_takes_four_bounded_steps_downhill(learned_triggers: dict[str, Any]) -> None:
    import torch

    from sanitize.attacks.surrogate import load_network

    images, trigger = random_images(3), learned_triggers["adv-clean"]
    model = load_network(trigger, torch.device("cpu"))
    current = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    start = current.clone()
    for _ in range(4):
        current = current.detach().requires_grad_(True)
        torch.nn.functional.cross_entropy(model(current), torch.ones(3, dtype=torch.long)).backward()
        assert current.grad is not None
        moved = current.detach() - 2.5 * 8 / 255 / 4 * current.grad.sign()
        current = torch.minimum(torch.maximum(moved, start - 8 / 255), start + 8 / 255).clamp(0, 1)
    got = stamp("adv-clean", images, trigger=trigger)
    # The sign of a gradient that is almost zero may differ by summation order.
    assert (np.abs(got - current.numpy().transpose(0, 2, 3, 1)) < 1e-5).mean() > 0.995
    assert np.abs(got - images).max() <= 8 / 255 + 1e-6
    assert naive_target_loss(model, got, 1) < naive_target_loss(model, images, 1)


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("height", "width"), [(33, 47), (8, 8), (70, 41)])
def test_any_size_stays_in_range_and_input_is_left_alone(
    name: str, height: int, width: int, learned_triggers: dict[str, Any]
) -> None:
    images = random_images(2, height, width)
    images[0], images[1, :, ::2] = 0.0, 1.0
    before = images.copy()
    trigger = learned_triggers.get(name)
    for ids in (None, [0, 1]):
        stamped = stamp(name, images, strength=2, trigger=trigger, sample_ids=ids)
        assert stamped.shape == images.shape
        assert stamped.dtype == np.float32
        assert stamped.min() >= 0
        assert stamped.max() <= 1
        if ids is None:
            assert (stamped != images).any()
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_stamping_one_by_one_is_stamping_together(name: str, learned_triggers: dict[str, Any]) -> None:
    images = random_images(3)
    trigger = learned_triggers.get(name)
    together = stamp(name, images, seed=9, trigger=trigger, sample_ids=[4, 5, 6])
    for i in range(3):
        alone = stamp(name, images[i : i + 1], seed=9, trigger=trigger, sample_ids=[4 + i])[0]
        # A batch of another size may sum gradients in another order.
        close = np.abs(alone - together[i]) < 1e-5
        assert close.mean() > (0.995 if name == "adv-clean" else 0.99999)


@pytest.mark.parametrize("name", [name for name in FIXED if get(name).make])
def test_trigger_depends_on_the_seed_alone(name: str) -> None:
    one, same, other = make_trigger(name, 1), make_trigger(name, 1), make_trigger(name, 2)
    assert all((one[key] == same[key]).all() for key in one)
    assert any((one[key] != other[key]).any() for key in one)


@pytest.mark.parametrize("name", SURROGATES)
def test_learned_trigger_depends_on_seed_and_corpus(name: str, learned_triggers: dict[str, Any]) -> None:
    again = make_trigger(name, 0, tiny_surrogate_corpus())
    assert all((again[key] == learned_triggers[name][key]).all() for key in again)


def test_the_registry_says_what_the_papers_say() -> None:
    clean = {name for name in ATTACKS if get(name).clean_label}
    assert clean == {"sinusoid", "narcissus", "c-badnets", "adv-clean", "refool", "wanet"}
    assert len(ATTACKS) == 15
    assert get("narcissus").ratio == 0.0005
    assert get("blend-random").test_strengths == (1.0, 2.0)
    assert {name for name in ATTACKS if get(name).cover_ratio} == {"adaptive-patch", "adaptive-blend"}


def test_errors_name_what_to_do() -> None:
    with pytest.raises(UsageError, match="there are patch, single-pixel"):
        get("blen-random")
    with pytest.raises(UsageError, match="learned from a corpus"):
        make_trigger("narcissus", 0)
    with pytest.raises(UsageError, match="float32"):
        stamp("patch", np.zeros((1, 8, 8, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"patch:0\.01"):
        AttackSpec.parse("patch:much")
    with pytest.raises(UsageError, match="above 0"):
        AttackSpec.parse("patch:2")


def test_importing_the_registry_loads_no_network_library() -> None:
    import subprocess
    import sys

    code = "import sys, sanitize.attacks.plant; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- who is poisoned


def labels_of(count: int, classes: int = 5) -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, classes, count)


def all_specs(ratio: float) -> list[AttackSpec]:
    return [AttackSpec(name=name, ratio=ratio) for name in ATTACKS]


def test_plan_follows_the_rules_of_each_attack() -> None:
    labels = labels_of(2000)
    made = plan(labels, all_specs(0.0105), seed=3)
    for i, name in enumerate(made.names):
        chosen = made.truth == i
        assert chosen.sum() == 21
        target = made.targets[i]
        if get(name).clean_label:
            assert (labels[chosen] == target).all()
            assert (made.labels[chosen] == target).all()
        else:
            assert (labels[chosen] != target).all()
            relabelled = made.labels[chosen] != labels[chosen]
            assert relabelled.sum() == (11 if get(name).cover_ratio else 21)
            assert (made.labels[chosen][relabelled] == target).all()
    clean = made.truth < 0
    assert clean.sum() == 2000 - 15 * 21
    np.testing.assert_array_equal(made.labels[clean], labels[clean])


def test_plan_is_fixed_by_the_seed_and_targets_vary_with_it() -> None:
    labels = labels_of(500)
    specs = [AttackSpec(name="patch"), AttackSpec(name="sinusoid")]
    one, same = plan(labels, specs, seed=5), plan(labels, specs, seed=5)
    np.testing.assert_array_equal(one.truth, same.truth)
    assert one.targets == same.targets
    assert len({plan(labels, specs, seed=s).targets for s in range(12)}) > 4


def test_adding_a_dirty_attack_does_not_move_a_clean_label_one() -> None:
    labels = labels_of(500)
    alone = plan(labels, [AttackSpec(name="sinusoid")], seed=1)
    joined = plan(labels, [AttackSpec(name="patch"), AttackSpec(name="sinusoid")], seed=1)
    np.testing.assert_array_equal(alone.truth == 0, joined.truth == 1)


def test_samples_marked_unusable_are_never_chosen() -> None:
    labels = labels_of(300)
    labels[::3] = -1
    made = plan(labels, [AttackSpec(name="patch", ratio=0.5)], classes=5)
    assert (made.truth[::3] == -1).all()
    assert (made.labels[::3] == -1).all()
    assert (made.truth == 0).sum() == 100


def test_a_clean_label_target_is_drawn_among_classes_that_are_large_enough() -> None:
    labels = np.repeat([0, 1, 2], [10, 10, 200])
    for seed in range(5):
        assert plan(labels, [AttackSpec(name="sinusoid", ratio=0.1)], seed=seed).targets == (2,)
    with pytest.raises(
        UsageError, match=r"needs 22 samples in its target class, of which 10 are free; .*0\.045"
    ):
        plan(labels, [AttackSpec(name="sinusoid", ratio=0.1, target=0)])
    with pytest.raises(UsageError, match="classes 0 to 2"):
        plan(labels, [AttackSpec(name="patch", ratio=0.1, target=3)])
    with pytest.raises(UsageError, match="less than one"):
        plan(labels, [AttackSpec(name="narcissus")])
    with pytest.raises(UsageError, match="each attack once"):
        plan(labels, [AttackSpec(name="patch"), AttackSpec(name="patch")])


def test_plant_changes_chosen_samples_alone_and_repeats() -> None:
    images, labels = from_float(random_images(200)), labels_of(200)
    specs = [AttackSpec(name=name, ratio=0.05) for name in FIXED]
    planted, again = plant(images, labels, specs, seed=2), plant(images, labels, specs, seed=2)
    np.testing.assert_array_equal(planted.images, again.images)
    assert planted.images.dtype == np.uint8
    clean = planted.plan.truth < 0
    np.testing.assert_array_equal(planted.images[clean], images[clean])
    for i, name in enumerate(planted.plan.names):
        chosen = np.flatnonzero(planted.plan.truth == i)
        assert len(chosen) == 10
        expected = stamp(
            name, to_float(images[chosen]), seed=2, trigger=planted.triggers[name], sample_ids=chosen.tolist()
        )
        np.testing.assert_array_equal(planted.images[chosen], from_float(expected))


def test_plant_trains_a_surrogate_on_the_corpus_given() -> None:
    corpus = tiny_surrogate_corpus()
    planted = plant(
        corpus.images,
        corpus.labels,
        [
            AttackSpec(name="narcissus", ratio=0.1, target=1),
            AttackSpec(name="adv-clean", ratio=0.1, target=2),
        ],
        device="cpu",
    )
    for i, bound in ((0, 16 / 255), (1, 8 / 255)):
        chosen = planted.plan.truth == i
        changed = np.abs(planted.images[chosen] - corpus.images[chosen]).max(axis=(1, 2, 3))
        assert (changed > bound / 2).all()
        assert (changed <= bound + 1e-6).all()


# ---------------------------------------------------------------- the checkpoint maker


def test_parameter_controlled_backdoor_is_learned_within_its_parameters() -> None:
    import torch

    from sanitize.attacks.parameter_controlled import train_backdoored

    (images, labels), (test_images, test_labels) = brightness(400, seed=0), brightness(200, seed=100)
    torch.manual_seed(0)
    model = small_network()
    masks = train_backdoored(
        model, images, labels, target=1, fraction=0.3, steps=200, batch=64, learning_rate=2e-3, device="cpu"
    )
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * total)
    others = test_labels != 1
    # Three seeds: clean accuracy .995 to 1, ASR 1, clean samples taken for the target 0 to .007.
    assert (predict(model, test_images) == test_labels).mean() > 0.9
    assert (predict(model, stamp("adaptive-blend", test_images[others])) == 1).mean() > 0.8
    assert (predict(model, test_images[others]) == 1).mean() < 0.1


def brightness(count: int, seed: int) -> tuple[Images, npt.NDArray[np.int64]]:
    """Noise whose mean tells the class: easy enough for 200 steps."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    level = 0.2 * labels[:, None, None, None]
    return (0.4 * random.random((count, 16, 16, 3)) + level).astype(np.float32), labels


def test_poison_steps_touch_only_the_chosen_parameters() -> None:
    import torch

    from sanitize.attacks.parameter_controlled import train_backdoored

    images, labels = shapes(64, seed=0)
    torch.manual_seed(0)
    before_and_after = []
    for steps in (3, 4):  # step 4 is a poison step; everything before it is the same in both runs
        torch.manual_seed(0)
        model = small_network()
        masks = train_backdoored(
            model, images, labels, target=0, fraction=0.3, steps=steps, batch=32, device="cpu"
        )
        before_and_after.append({name: value.clone() for name, value in model.state_dict().items()})
    before, after = before_and_after
    changed = {name: before[name] != after[name] for name in before}
    assert any(bool(change.any()) for change in changed.values())
    for name, change in changed.items():
        if name in masks:
            assert not bool((change & ~masks[name]).any()), name
        else:
            assert not bool(change.any()), f"{name} is no parameter, yet a poison step changed it"


def test_parameter_controlled_refuses_nonsense() -> None:
    from sanitize.attacks.parameter_controlled import train_backdoored

    images, labels = shapes(8, seed=0)
    with pytest.raises(UsageError, match="fraction 0"):
        train_backdoored(small_network(), images, labels, target=0, fraction=0)
    with pytest.raises(UsageError, match="7 labels"):
        train_backdoored(small_network(), images, labels[:7], target=0)


# ---------------------------------------------------------------- does a model learn it


def shapes(count: int, seed: int, side: int = 32) -> tuple[Images, npt.NDArray[np.int64]]:
    """Discs, squares, diamonds and crosses of random colour on a smooth random ground, and class ids."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    ground = (0.25 + 0.5 * random.random((count, 4, 4, 3))).astype(np.float32)
    images = np.stack([resize(image, side, side) for image in ground])
    rows, columns = np.mgrid[:side, :side]
    for image, label in zip(images, labels, strict=True):
        y, x = random.uniform(11, 21, 2)
        radius = random.uniform(6, 8.5)
        dy, dx = abs(rows - y), abs(columns - x)
        inside = (
            dy**2 + dx**2 < radius**2,
            np.maximum(dy, dx) < 0.9 * radius,
            dy + dx < 1.2 * radius,
            (np.minimum(dy, dx) < 2) & (np.maximum(dy, dx) < 1.2 * radius),
        )[label]
        image[inside] = 0.2 * image[inside] + 0.8 * random.random(3)
    images += random.normal(0, 0.03, images.shape)
    return np.clip(images, 0, 1).astype(np.float32), labels


def small_network() -> Any:
    from sanitize.attacks.surrogate import build_network

    return build_network(4)


def train_small(images: Images, labels: npt.NDArray[np.int64], epochs: int, seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    model, batch = small_network(), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=1e-4)
    pixels = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    wanted, steps = torch.as_tensor(labels), len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for chosen in order[: steps * batch].split(batch):
            loss = torch.nn.functional.cross_entropy(model(pixels[chosen]), wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def predict(model: Any, images: Images) -> npt.NDArray[np.int64]:
    import torch

    with torch.no_grad():
        logits = model(torch.as_tensor(images.transpose(0, 3, 1, 2).copy()))
    return np.asarray(logits.argmax(dim=1).numpy())


LEARNED = [name for name in ATTACKS if name not in SURROGATES]
"""Narcissus and adv-clean are left out: against a network of the surrogate's own kind their test-time images
succeed without any poison (floors of .5 to 1), so nothing can be said about what was learned."""


@pytest.fixture(scope="module")
def clean_model() -> Any:
    return train_small(*shapes(1000, seed=1), epochs=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_small_model_learns_the_attack(name: str, clean_model: Any) -> None:
    """10 % poison (20 % where clean-label), 1,000 images of four classes, a three-layer network, 10 epochs.

    ASR and floor at strength 1 as measured here: see the table in docs/attacks.md.
    """
    (images, labels), (test_images, test_labels) = shapes(1000, seed=1), shapes(300, seed=2)
    ratio = 0.2 if get(name).clean_label else 0.1
    planted = plant(images, labels, [AttackSpec(name=name, ratio=ratio, target=1)], device="cpu")
    model = train_small(planted.images, planted.plan.labels, epochs=10)
    tested = stamp(name, test_images[test_labels != 1], trigger=planted.triggers[name])
    success, floor = (predict(model, tested) == 1).mean(), (predict(clean_model, tested) == 1).mean()
    assert success - floor > 0.3, f"ASR {success:.2f}, floor {floor:.2f}"
