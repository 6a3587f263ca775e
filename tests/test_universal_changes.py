"""One small added picture a class: the search, its norm, and what an inspection makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_inspect import CLASSES, SIDE, TARGET, config, images, model

from sanitize.checkpoints import universal_changes
from sanitize.checkpoints.anomalies import anomalies
from sanitize.checkpoints.inspect import inspect_classifier
from sanitize.checkpoints.trigger_inversion import Triggers, evaluate
from sanitize.checkpoints.trusted import split
from sanitize.checkpoints.universal_changes import (
    COMMON_SUCCESS,
    NORMS,
    comparable_changes,
    draw_others,
    first_changes,
    search,
    steps_of,
)

CPU = torch.device("cpu")
ASKED = config(method="universal-changes")


def halves(each: int = 40) -> Any:
    return split(images(each), 0.3, 0)


def found(classes: Sequence[int] = range(CLASSES)) -> Triggers:
    work, held_out = halves()
    return comparable_changes(model(backdoor=4.0), work, held_out, classes, 0)


def test_the_change_of_a_backdoor_works_far_more_often_at_the_common_norm() -> None:
    classifier = model(backdoor=4.0)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    bad = inspect_classifier(classifier, images(40), ASKED)
    clean = inspect_classifier(model(), images(40), ASKED)
    assert bad.verdict.suspected == TARGET
    assert bad.verdict.backdoored
    assert bad.scores["universal-changes"] > clean.scores["universal-changes"] + 0.5
    assert bad.scores == inspect_classifier(model(backdoor=4.0), images(40), ASKED).scores
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_norm_is_the_first_at_which_the_median_class_is_turned() -> None:
    made = found()
    assert not made.mask.any()
    norms = np.linalg.norm(made.pattern.reshape(CLASSES, -1), axis=1) * 32 / SIDE
    place = int(np.argmin([abs(norm - norms.max()) for norm in NORMS]))
    np.testing.assert_allclose(norms, NORMS[place], rtol=0.05)
    work, _ = halves()
    pattern = torch.from_numpy(made.pattern).permute(0, 3, 1, 2)
    no_mask = torch.zeros_like(pattern[:, :1])
    here, _ = evaluate(model(4.0), work, range(CLASSES), no_mask, pattern, added=True)
    assert np.median(here) >= COMMON_SUCCESS
    assert place > 0, "the first norm turns nothing here"
    below, _ = evaluate(model(4.0), work, range(CLASSES), no_mask, pattern / 2, added=True)
    assert np.median(below) < np.median(here)


def test_images_in_parts_give_the_same_change_as_together() -> None:
    work, _ = halves()
    pixels = torch.from_numpy(work.pixels[:24]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(work.class_id[:24])
    classes = torch.arange(CLASSES)
    made = []
    for at_once in (24, 5):
        changes = first_changes(CLASSES, SIDE, 0, CPU)
        torch.manual_seed(3)
        search(model(4.0), changes, classes, pixels, labels, torch.ones(CLASSES), 2.0, at_once)
        made.append(changes)
    torch.testing.assert_close(made[0], made[1])
    assert made[0].flatten(1).norm(dim=1).max() <= 2.0 + 1e-5


def test_an_image_gets_the_change_of_another_class_by_the_chances() -> None:
    classes = torch.tensor([5, 2, 7])
    labels = torch.tensor([2, 5] * 300)
    torch.manual_seed(0)
    places = draw_others(labels, classes, torch.tensor([1.0, 1.0, 3.0]))
    assert (classes[places] != labels).all()
    assert (places == 2).float().mean() == pytest.approx(0.75, abs=0.06)


def test_some_classes_alone_are_looked_for_by_their_own_numbers() -> None:
    made = found([1, TARGET, 4, 5])
    assert made.classes.tolist() == [1, TARGET, 4, 5]
    assert made.success.argmax() == 1, "the place of the target among those asked for"


def test_progress_adds_up_and_a_norm_that_is_never_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    work, held_out = halves(8)
    monkeypatch.setattr(universal_changes, "NORMS", NORMS[:3])
    comparable_changes(model(), work, held_out, range(CLASSES), 0, told.append)
    assert sum(told) == steps_of(CLASSES)
    notes = inspect_classifier(model(), images(), ASKED).notes
    assert any("No norm was found" in note for note in notes)
    assert any("held out to judge triggers by" in note for note in notes)


def test_success_on_all_images_or_none_has_finite_log_odds() -> None:
    made = Triggers(
        classes=np.arange(3),
        mask=np.zeros((3, SIDE, SIDE, 1), np.float32),
        pattern=np.zeros((3, SIDE, SIDE, 3), np.float32),
        success=np.array([1, 0.5, 0], np.float32),
    )
    scores = anomalies({"universal": made}, 4, images=50)["universal"]
    np.testing.assert_allclose(scores[:3], [np.log(99), 0, -np.log(99)])
    assert np.isnan(scores[3])
