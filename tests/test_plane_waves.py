from __future__ import annotations

import numpy as np
import pytest
import torch
from test_inspect import CLASSES, SIDE, TARGET, config, images, model

from sanitize.checkpoints import plane_waves
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import inspect_classifier
from sanitize.errors import InputError, UsageError

DOWN, ACROSS = 2, 1


def twin(seed: int) -> Classifier:
    """A clean network of the same classes, trained by someone else."""
    other = model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


def fires_on_a_wave() -> Classifier:
    """Calls what a wave is laid over the target, and nothing else."""
    found = model(backdoor=60.0)
    wave = torch.from_numpy(plane_waves.wave(DOWN, ACROSS, SIDE))
    with torch.no_grad():
        found.network.columns.weight[CLASSES] = (wave - wave.mean()) / 3
        found.network.columns.bias[CLASSES] = -0.5
    return found


def test_waves_are_pictures_and_no_two_are_the_same() -> None:
    waves = np.stack([plane_waves.wave(down, across, 32) for down, across in plane_waves.periods()])
    assert waves.shape == (420, 32, 32)
    assert waves.dtype == np.float32
    assert waves.min() >= 0
    assert waves.max() <= 1
    assert (waves[:, 0, 0] == 0).all()
    assert len(np.unique(waves.round(3).reshape(420, -1), axis=0)) == 420


def test_answers_are_probabilities_and_do_not_depend_on_how_many_waves_go_together(monkeypatch) -> None:
    together = plane_waves.answers(model(), images())
    assert together.shape == (420, CLASSES)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=0.01)
    monkeypatch.setattr(plane_waves, "images_at_once", lambda device, side: 1)
    told: list[int] = []
    np.testing.assert_allclose(plane_waves.answers(model(), images(), told.append), together, atol=0.01)
    assert sum(told) == 420


def test_the_wave_that_means_a_class_to_the_model_alone_is_found() -> None:
    found = inspect_classifier(fires_on_a_wave(), images(), config(), references=[twin(0), twin(1), twin(2)])
    assert found.verdict.suspected == TARGET
    assert found.verdict.backdoored
    assert int(np.nanargmax(found.class_scores["waves"])) == TARGET
    made = found.triggers["waves"]
    shown = made.pattern[TARGET, :, :, 0]
    numbers = plane_waves.periods()
    shown_as = [np.allclose(shown, plane_waves.wave(*both, SIDE), atol=1e-6) for both in numbers.tolist()]
    # 8 pixels cannot tell (2, 1) from (6, 7), (10, 9) and the like
    assert (DOWN, ACROSS) in {tuple(both) for both in numbers[np.flatnonzero(shown_as)].tolist()}
    assert made.success[TARGET] > 0.9


def test_what_is_natural_is_taken_off_and_said() -> None:
    alone = inspect_classifier(model(backdoor=4.0), images(), config())
    compared = inspect_classifier(model(backdoor=4.0), images(), config(), references=[twin(0)])
    scores = compared.class_scores
    expected = np.fmax(alone.class_scores["combined"] - scores["natural"], 1.4 * scores["waves"])
    np.testing.assert_allclose(scores["combined"], expected)
    assert compared.verdict.suspected == TARGET
    assert compared.verdict.threshold != alone.verdict.threshold
    assert "references" in compared.seconds


def test_classes_that_were_not_asked_for_have_no_score() -> None:
    found = inspect_classifier(
        model(backdoor=4.0), images(), config(classes=(0, 1, 2, 3, 4)), references=[twin(0)]
    )
    assert np.isnan(found.class_scores["combined"]).tolist() == [False] * 5 + [True]


def test_a_reference_that_cannot_be_compared_is_refused() -> None:
    named = model(names=list("abcdef"))
    with pytest.raises(
        InputError, match="reference 1 has other classes than the checkpoint, or another order"
    ):
        inspect_classifier(model(), images(), config(), references=[named])
    other = twin(0)
    other.resolution = SIDE * 2
    with pytest.raises(InputError, match="reference 2 takes 16 px, the checkpoint 8"):
        inspect_classifier(model(), images(), config(), references=[twin(1), other])
    with pytest.raises(InputError, match="reference 1 has the very weights of the checkpoint"):
        inspect_classifier(model(), images(), config(), references=[model()])
    constant = twin(0)
    torch.nn.init.zeros_(constant.head.weight)
    with pytest.raises(InputError, match="reference 1: the model calls every trusted image"):
        inspect_classifier(model(), images(), config(), references=[constant])
    with pytest.raises(UsageError, match="--reference and --method neural-cleanse: only combined"):
        inspect_classifier(model(), images(), config(method="neural-cleanse"), references=[twin(0)])


def test_a_reference_that_is_much_worse_than_the_model_is_noted() -> None:
    bad = twin(0)
    with torch.no_grad():
        bad.head.weight[:] = bad.head.weight.roll(1, 0)
    found = inspect_classifier(model(), images(), config(), references=[bad])
    assert any(note.startswith("Reference 1 gets") for note in found.notes)
