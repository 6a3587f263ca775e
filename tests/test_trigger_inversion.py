from __future__ import annotations

import numpy as np
import pytest
import torch
from test_inspect import CLASSES, SIDE, TARGET, images, model

from sanitize.checkpoints import trigger_inversion
from sanitize.checkpoints.trigger_inversion import (
    InversionConfig,
    calibrated_triggers,
    estimated_s,
    evaluate,
    frozen,
    masked_triggers,
    predict,
    stamp,
)
from sanitize.checkpoints.trusted import split, to_pixels
from sanitize.scores.network import fast

CONFIG = InversionConfig(steps=40, batch=24, learning_rate=0.05, radius=12.0)
CPU = torch.device("cpu")


def test_a_trigger_that_only_the_backdoored_model_falls_for() -> None:
    """The clean twin stands for the perfectly repaired copy."""
    work, held_out = split(images(), 0.5, 0)
    found = calibrated_triggers(model(backdoor=4.0), model(), work, held_out, range(CLASSES), CONFIG, 0)
    assert found.repaired_success is not None
    assert found.repaired_kept is not None
    apart = found.success - found.repaired_success
    assert apart.argmax() == TARGET
    assert apart[TARGET] > 0.9
    assert np.delete(apart, TARGET).max() < 0.5
    assert found.repaired_kept[TARGET] > 0.9
    corner = np.abs(found.pattern[TARGET, 6:, 6:]).mean()
    assert corner > 2 * np.abs(found.pattern[TARGET, :6]).mean()


def test_triggers_stay_within_the_radius() -> None:
    work, held_out = split(images(), 0.5, 0)
    config = InversionConfig(steps=10, batch=24, radius=1.0)
    found = calibrated_triggers(model(4.0), model(), work, held_out, range(CLASSES), config, 0)
    norms = np.linalg.norm(found.pattern.reshape(CLASSES, -1), axis=1)
    assert norms.max() <= 1.0 * SIDE / 32 + 1e-4


@pytest.mark.parametrize("calibrated", [True, False])
def test_classes_together_or_one_by_one_give_the_same(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups only save memory; the naive loop has one class a group."""
    work, held_out = split(images(), 0.5, 0)
    monkeypatch.setattr(trigger_inversion, "fast", lambda device: torch.autocast("cpu", enabled=False))

    def all_classes() -> trigger_inversion.Triggers:
        if calibrated:
            return calibrated_triggers(model(4.0), model(), work, held_out, range(CLASSES), CONFIG, 0)
        return masked_triggers(model(4.0), work, held_out, range(CLASSES), CONFIG, 0)

    together = all_classes()
    monkeypatch.setattr(trigger_inversion, "CPU_PIXELS", 1)
    alone = all_classes()
    np.testing.assert_allclose(together.pattern, alone.pattern, atol=2e-3)
    np.testing.assert_allclose(together.mask, alone.mask, atol=2e-3)
    np.testing.assert_allclose(together.success, alone.success, atol=0.05)


def test_success_is_counted_outside_the_class_on_the_images_given() -> None:
    classifier, held_out = model(), images(2)
    mask = torch.zeros(CLASSES, 1, SIDE, SIDE)
    success, kept = evaluate(
        classifier, held_out, range(CLASSES), mask, torch.zeros(CLASSES, 3, SIDE, SIDE), added=True
    )
    np.testing.assert_array_equal(success, 0)
    np.testing.assert_array_equal(kept, 1)
    only = held_out.take(np.flatnonzero(held_out.class_id == 1))
    success, _ = evaluate(classifier, only, [0, 1], mask[:2], torch.zeros(2, 3, SIDE, SIDE), added=True)
    assert success[0] == 0
    assert np.isnan(success[1]), "no image of another class"


def test_stamp_by_hand() -> None:
    pixels = torch.full((1, 3, 2, 2), 0.5)
    assert stamp(pixels, torch.zeros(1, 2, 2), torch.full((3, 2, 2), 0.7), added=True).unique() == 1.0
    half = stamp(pixels, torch.full((1, 2, 2), 0.5), torch.ones(3, 2, 2), added=False)
    torch.testing.assert_close(half, torch.full((1, 3, 2, 2), 0.75))


def test_frozen_puts_back_what_it_found() -> None:
    classifier = model()
    classifier.head.bias.requires_grad_(False)
    with frozen(classifier):
        assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert classifier.head.weight.requires_grad
    assert not classifier.head.bias.requires_grad
    assert not classifier.network.training


def test_bfloat16_calls_images_as_float32_does() -> None:
    classifier, given = model(), images()
    with torch.inference_mode():
        exact = classifier(to_pixels(given.pixels, CPU)).argmax(1).numpy()
    np.testing.assert_array_equal(predict(classifier, given.pixels), exact)
    assert fast(CPU) is not None


def test_the_estimate_grows_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_inversion, "timed_step", lambda model, work, images: 0.01 * images)
    few, many = (estimated_s(model(), images(), classes, CONFIG) for classes in (10, 1000))
    assert many == pytest.approx(100 * few)
    assert few == pytest.approx(2 * 40 * 10 * 24 * 0.01)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_cuda_device() -> None:
    work, held_out = split(images(), 0.5, 0)
    bad, clean = model(backdoor=4.0).cuda(), model().cuda()
    found = calibrated_triggers(bad, clean, work, held_out, range(CLASSES), CONFIG, 0)
    assert found.repaired_success is not None
    assert (found.success - found.repaired_success).argmax() == TARGET
