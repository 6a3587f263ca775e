from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli
from report_page import Page
from small_models import trained
from test_inspect import CLASSES, SIDE, TARGET, config, images, model
from test_repair_file import checkpoint_and_shards

from sanitize.checkpoints import plane_waves
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import inspect_classifier
from sanitize.errors import InputError, UsageError

WAVE = np.array([2, 1, 3])


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
    wave = torch.from_numpy(plane_waves.wave(WAVE, SIDE))
    with torch.no_grad():
        found.network.columns.weight[CLASSES] = (wave - wave.mean()) / 3
        found.network.columns.bias[CLASSES] = -0.5
    return found


def test_waves_are_pictures_and_no_two_are_the_same() -> None:
    waves = np.stack([plane_waves.wave(kind, 32) for kind in plane_waves.kinds()])
    assert waves.shape == (1680, 32, 32)
    assert waves.dtype == np.float32
    assert waves.min() >= 0
    assert waves.max() <= 1
    np.testing.assert_array_equal(waves[plane_waves.kinds()[:, 2] == 0, 0, 0], 0)
    assert len(np.unique(waves.round(3).reshape(1680, -1), axis=0)) == 1680


def test_answers_are_probabilities_and_do_not_depend_on_how_many_waves_go_together(monkeypatch) -> None:
    together = plane_waves.answers(model(), images())
    assert together.shape == (1680, CLASSES)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=0.01)
    monkeypatch.setattr(plane_waves, "images_at_once", lambda device, side: 1)
    told: list[int] = []
    np.testing.assert_allclose(plane_waves.answers(model(), images(), told.append), together, atol=0.01)
    assert sum(told) == 1680


def test_the_wave_that_means_a_class_to_the_model_alone_is_found() -> None:
    found = inspect_classifier(fires_on_a_wave(), images(), config(), references=[twin(0), twin(1), twin(2)])
    assert found.verdict.suspected == TARGET
    assert found.verdict.backdoored
    assert int(np.nanargmax(found.class_scores["waves"])) == TARGET
    made = found.triggers["waves"]
    shown = made.pattern[TARGET, :, :, 0]
    np.testing.assert_allclose(shown, plane_waves.wave(WAVE, SIDE), atol=1e-6)
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


def test_the_command_compares_with_references_and_the_report_says_so(tmp_path: Path) -> None:
    line = checkpoint_and_shards(tmp_path)
    for seed in (1, 2):
        torch.save(trained(0, seed).network.state_dict(), tmp_path / f"clean-{seed}.pt")
    asked = ["inspect", *line[1:4], *line[6:], "--out", tmp_path / "report"]
    given = [word for seed in (1, 2) for word in ("--reference", tmp_path / f"clean-{seed}.pt")]
    done = run_cli(*asked, *given, "--json")
    assert done.code == 0, done.err
    assert "reference 2 of 2" in done.err
    facts = json.loads(done.out)
    assert facts["model"]["references"] == [str(tmp_path / f"clean-{seed}.pt") for seed in (1, 2)]
    assert {"natural", "waves"} <= {row["statistic"] for row in facts["statistics"]}
    assert "--reference" not in json.dumps(facts["verdict"]["next"])
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.open == []
    assert "natural score" in page.text
    assert "plane wave" in page.text
    alone = run_cli(*asked, "--json")
    advice = [step.get("command", "") for step in json.loads(alone.out)["verdict"]["next"]]
    backdoored = json.loads(alone.out)["verdict"]["backdoored"]
    assert any("--reference CLEAN_NETWORK" in command for command in advice) != backdoored
