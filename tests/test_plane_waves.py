from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from report_page import Page
from small_models import network, trained
from test_inspect import CLASSES, SIDE, TARGET, config, images, model
from test_repair_file import checkpoint_and_shards

from sanitize.checkpoints import plane_waves
from sanitize.checkpoints import references as references_module
from sanitize.checkpoints.audit import audit
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import inspect_classifier
from sanitize.checkpoints.references import natural_scores
from sanitize.errors import InputError, UsageError
from sanitize.progress import Silent

WAVE = np.array([2, 1, 3])


def twin(seed: int) -> Classifier:
    """A clean network of the same classes, trained by someone else."""
    other = model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


def three() -> dict[str, Classifier]:
    return {name: twin(seed) for seed, name in enumerate("abc")}


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


def test_answers_are_shares_and_do_not_depend_on_scale_or_how_many_waves_go_together(monkeypatch) -> None:
    together = plane_waves.answers(fires_on_a_wave(), images())
    assert together.shape == (1680, CLASSES)
    np.testing.assert_allclose(together.sum(axis=1), 1)
    scaled = fires_on_a_wave()
    with torch.no_grad():
        scaled.head.weight *= 0.01
    np.testing.assert_allclose(plane_waves.answers(scaled, images()), together, atol=0.07)
    monkeypatch.setattr(plane_waves, "images_at_once", lambda device, side: 1)
    told: list[int] = []
    np.testing.assert_array_equal(plane_waves.answers(fires_on_a_wave(), images(), told.append), together)
    assert sum(told) == 1680


def test_the_wave_that_means_a_class_to_the_model_alone_is_found() -> None:
    found = inspect_classifier(fires_on_a_wave(), images(), config(), references=three())
    assert found.verdict.suspected == TARGET
    assert found.verdict.backdoored
    assert int(np.nanargmax(found.class_scores["waves"])) == TARGET
    made = found.triggers["waves"]
    shown = made.pattern[TARGET, :, :, 0]
    np.testing.assert_allclose(shown, plane_waves.wave(WAVE, SIDE), atol=1e-6)
    assert made.success[TARGET] > 0.9


def test_the_report_shows_the_wave_strong_enough_to_be_seen(tmp_path: Path) -> None:
    report = audit(fires_on_a_wave(), images(), config(), tmp_path, "m.pt", Silent(), references=three())
    page = Page(report.path.read_text())
    assert page.open == []
    assert "the trigger, on grey, 6 times stronger" in page.text
    assert {row["statistic"] for row in report.facts["statistics"]} >= {"alone", "natural", "waves"}
    assert report.facts["model"]["references"] == list("abc")
    assert "repair a copy" in report.facts["verdict"]["next"][-1]["text"]


def test_what_is_natural_is_taken_off_and_said() -> None:
    alone = inspect_classifier(model(backdoor=4.0), images(), config())
    compared = inspect_classifier(model(backdoor=4.0), images(), config(), references=three())
    scores = compared.class_scores
    expected = np.fmax(alone.class_scores["combined"] - scores["natural"], 0.125 * scores["waves"])
    np.testing.assert_allclose(scores["combined"], expected)
    assert compared.verdict.suspected == TARGET
    assert compared.verdict.threshold != alone.verdict.threshold
    assert "references" in compared.seconds


def test_classes_that_were_not_asked_for_have_no_score() -> None:
    found = inspect_classifier(
        model(backdoor=4.0), images(), config(classes=(0, 1, 2, 3, 4)), references=three()
    )
    assert np.isnan(found.class_scores["combined"]).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: setattr(one, "class_names", list("abcdef")), "reference b: its output 0 is 'a', the"),
        (lambda one: setattr(one, "resolution", 2 * SIDE), "reference b: it takes 16 px, the checkpoint 8"),
        (lambda one: one.load_state_dict(model().state_dict()), "reference b: it has the very weights"),
        (lambda one: torch.nn.init.zeros_(one.head.weight), "reference b: the model calls every trusted"),
    ],
)
def test_a_reference_that_cannot_be_compared_is_refused_by_its_name(change: Any, message: str) -> None:
    references = three()
    with torch.no_grad():
        change(references["b"])
    with pytest.raises(InputError, match=message):
        inspect_classifier(model(), images(), config(), references=references)


def test_only_the_default_method_takes_references_and_three_or_more() -> None:
    with pytest.raises(UsageError, match="--reference and --method neural-cleanse: only combined"):
        inspect_classifier(model(), images(), config(method="neural-cleanse"), references=three())
    with pytest.raises(UsageError, match="--reference: 2 given; 3 or more are needed"):
        inspect_classifier(model(), images(), config(), references={"a": twin(0), "b": twin(1)})


def noted(classifier: Classifier, references: dict[str, Classifier]) -> str:
    return " ".join(inspect_classifier(classifier, images(), config(), references=references).notes)


def test_what_weakens_a_comparison_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = twin(0)
    with torch.no_grad():
        worse.head.weight[:] = worse.head.weight.roll(1, 0)
    assert "Reference x gets" in noted(model(), three() | {"x": worse})
    other = twin(4)
    other.network.more = torch.nn.Parameter(torch.zeros(1))
    assert "Reference x has other parameters, columns" in noted(model(), three() | {"x": other})
    assert "References a and b descend from the same weights" in noted(model(), three())
    assert "Reference x descends from the same weights" in noted(model(), three() | {"x": twin(3)})
    monkeypatch.setattr(references_module, "RELATED", 0)
    assert "descends" not in noted(model(), three() | {"x": twin(3)})


def test_a_backdoor_that_a_reference_shares_is_noted() -> None:
    shared = {name: model(backdoor=strength) for name, strength in zip("xyz", (3.5, 3.6, 3.7), strict=True)}
    notes = noted(model(backdoor=4.0), shared)
    assert "Reference x looks backdoored itself, towards class 2" in notes
    assert "Without the references class 2 has a score of" in notes


NATURAL = np.array([0.9, 0.1, -0.6, 0.0])


def test_natural_scores_are_means_of_what_can_be_compared() -> None:
    nothing, own = np.zeros(4), {"a": np.array([1.0, 0.0, 0.0, 0.2]), "b": NATURAL}
    full, silent = {"a": NATURAL, "b": NATURAL}, {"a": nothing, "b": nothing}
    without_a = {"a": nothing, "b": NATURAL}
    centred = NATURAL - 0.05
    for references, expected, why in (
        ([full] * 3 + [silent], centred, "a reference without a statistic is left out of its mean"),
        ([without_a] * 3, centred / 2, "nothing is natural in a, and all of the model's a counts"),
        ([full] * 2 + [without_a], centred / 2, "two are too few to say what is natural"),
    ):
        found = natural_scores(own, references, ["a", "b"])
        np.testing.assert_allclose(found, expected, err_msg=why)
    made_up = natural_scores(silent, [full] * 3, ["a", "b"])
    np.testing.assert_array_equal(
        made_up, 0, err_msg="a model that cannot be compared is not far from natural"
    )


def test_a_network_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="references c and x are the same network"):
        inspect_classifier(model(), images(), config(), references=three() | {"x": twin(2)})


def test_large_images_go_through_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    classifier = fires_on_a_wave()
    classifier.network.columns.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    monkeypatch.setattr(plane_waves, "images_at_once", lambda device, side: 7)
    plane_waves.answers(classifier, images())
    assert max(seen) == 7


def test_the_command_compares_with_references_and_the_report_says_so(tmp_path: Path) -> None:
    line = checkpoint_and_shards(tmp_path)
    for seed in (1, 2, 3):
        torch.save(trained(0, seed).network.state_dict(), tmp_path / f"clean-{seed}.pt")
    asked = ["inspect", *line[1:4], *line[6:], "--out", tmp_path / "report"]
    given = [word for seed in (1, 2, 3) for word in ("--reference", tmp_path / f"clean-{seed}.pt")]
    done = run_cli(*asked, *given, "--json")
    assert done.code == 0, done.err
    assert f"reference {tmp_path}/clean-2.pt: accuracy on the" in done.err
    facts = json.loads(done.out)
    assert facts["model"]["references"] == [str(tmp_path / f"clean-{seed}.pt") for seed in (1, 2, 3)]
    assert {"natural", "waves"} <= {row["statistic"] for row in facts["statistics"]}
    assert "--reference" not in json.dumps(facts["verdict"]["next"])
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.open == []
    assert "natural score" in page.text
    assert "plane wave" in page.text
    twice = run_cli(*asked, *given[:4], "--reference", f"{tmp_path}/./clean-1.pt")
    assert twice.code == 2
    assert "was given before" in twice.err
    torch.save(network(5).state_dict(), tmp_path / "five.pt")
    other = run_cli(*asked, *given[:4], "--reference", tmp_path / "five.pt")
    assert other.code == 3
    assert "five.pt: the checkpoint does not fit --arch" in other.err
    alone = run_cli(*asked, "--json")
    advice = [step.get("command", "") for step in json.loads(alone.out)["verdict"]["next"]]
    backdoored = json.loads(alone.out)["verdict"]["backdoored"]
    assert any("--reference CLEAN_1" in command for command in advice) != backdoored
