"""A backdoor planted in one's own copy: measured, calibrated on, and brought back."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import SIDE, images, trained

from sanitize.checkpoints import calibrate as calibrate_module
from sanitize.checkpoints import planting
from sanitize.checkpoints.calibrate import GRIDS, calibrate, combinations
from sanitize.checkpoints.planting import plant, stamped, success
from sanitize.checkpoints.repair import RepairConfig, methods, settings_of
from sanitize.checkpoints.retune import retune_check
from sanitize.checkpoints.tuning import Schedule, accuracy
from sanitize.errors import SanitizeError
from sanitize.progress import Silent

SHORT = {"steps": 40, "parameter_weight": 100.0, "latent_weight": 0.2}


def test_stamped_images_are_those_of_other_classes_with_a_patch() -> None:
    clean = images(40, 5)
    bad = stamped(clean, 2)
    others = clean.take(np.flatnonzero(clean.class_id != 2))
    assert len(bad) == len(others) == 30
    assert set(bad.class_id) == {2}
    changed = (bad.pixels != others.pixels).any(axis=(0, 3))
    assert 1 <= changed.sum() <= SIDE * SIDE / 4


def test_a_planted_backdoor_works_and_the_original_is_as_it_was() -> None:
    model = trained(0)
    planted = plant(model, images(120, 5), images(80, 6), 0, Silent())
    fresh = images(200, 9)
    # one pixel of patch, 12 px images, 4,700 parameters: 0.83 and 0.71 on two cores
    assert success(planted.classifier, fresh, planted.target) > 0.6
    assert success(model, fresh, planted.target) < 0.1
    assert accuracy(planted.classifier, fresh) > 0.55


def test_a_backdoor_that_is_not_learned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "SCHEDULE", Schedule(steps=1, learning_rate=1e-9))
    with pytest.raises(SanitizeError, match="too little to measure a repair by"):
        plant(trained(0), images(40, 5), images(40, 6), 0, Silent())


def test_retuning_is_compared_with_a_model_that_never_had_the_backdoor() -> None:
    found = retune_check(
        trained(0), images(160, 5), RepairConfig(method="pivotal-tuning", held_out_ratio=0.4, settings=SHORT)
    )
    assert found["planted_success"] > 0.6
    assert found["poisoned_images"] == 5
    assert found["repaired_success"] < found["planted_success"]
    assert found["retuned_success"] >= found["repaired_success"]
    assert 0 <= found["never_planted_success"] <= 1


def test_calibration_takes_the_lowest_success_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate_module.GRIDS, "pivotal-tuning", {"latent_weight": (0.0, 0.5, 1e6)})
    found = calibrate(
        trained(0), images(160, 5), RepairConfig(method="pivotal-tuning", held_out_ratio=0.4, settings=SHORT)
    )
    assert [trial["settings"]["latent_weight"] for trial in found.facts["trials"]] == [0.0, 0.5, 1e6]
    within = [trial for trial in found.facts["trials"] if trial["repaired"]]
    assert 1 <= len(within) < 3  # at 1e6 nothing is left of the model
    chosen = next(trial for trial in within if trial["settings"] == found.settings)
    assert chosen["success"] == min(trial["success"] for trial in within)


@pytest.mark.parametrize("method", methods())
def test_every_method_has_a_grid_of_its_own_settings(method: str) -> None:
    assert len(combinations(method, 10, 400)) == np.prod([len(values) for values in GRIDS[method].values()])
    assert len(combinations(method, 1_000, 400)) >= 2
    for settings in [*combinations(method, 10, 400), *combinations(method, 1_000, 400)]:
        settings_of(method, 10, 400, settings)


@pytest.mark.parametrize("images", [90, 400])
def test_a_grid_begins_at_the_rate_for_so_many_images(images: int) -> None:
    first = combinations("pivotal-unlearning", 10, images)[0]
    without = settings_of("pivotal-unlearning", 10, images, {}).schedule
    assert settings_of("pivotal-unlearning", 10, images, first).schedule == without
