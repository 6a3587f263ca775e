"""Masks, changes, patches and waves that one class gives away, and what unlearning does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from report_page import Page
from test_inspect import CLASSES, SIDE, TARGET, config, images, model
from test_plane_waves import WAVE, fires_on_a_wave

from sanitize.checkpoints import pivotal_unlearning, plane_waves, repair, suspected_triggers, tuning
from sanitize.checkpoints.audit import audit
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import THRESHOLDS
from sanitize.checkpoints.pivotal_unlearning import (
    Put,
    Settings,
    changes_and_waves,
    one_or_the_other,
)
from sanitize.checkpoints.repair import RepairConfig, repair_classifier
from sanitize.checkpoints.suspected_triggers import (
    Added,
    Masked,
    Patch,
    Waves,
    chances,
    paste,
    seek,
    universal_patches,
    widened,
    with_triggers,
)
from sanitize.errors import RunFolderError
from sanitize.progress import Silent

NORM = 2.0


def look_at_small_models(monkeypatch: pytest.MonkeyPatch, **bounds: float) -> None:
    """Their four classes are enough to compare, by these bounds of `suspected_triggers`."""
    monkeypatch.setattr(plane_waves, "FEWEST_CLASSES", small_models.CLASSES)
    for name, value in bounds.items():
        monkeypatch.setattr(suspected_triggers, name, value)


def looked(classifier: Classifier) -> suspected_triggers.Looked:
    found = suspected_triggers.suspected_triggers(classifier, images(40), NORM, 0, Silent())
    assert found is not None
    return found


def suspected(classifier: Classifier) -> list[suspected_triggers.Suspected]:
    return looked(classifier).suspected


def fires_on_a_patch() -> Classifier:
    """Calls what has one very bright square of 2 × 2, anywhere, the target."""

    class Anywhere(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.columns = model().network.columns
            self.head = torch.nn.Linear(CLASSES + 1, CLASSES)
            with torch.no_grad():
                self.head.weight.zero_()
                self.head.bias.zero_()
                self.head.weight[:, :CLASSES] = torch.eye(CLASSES)
                self.head.weight[TARGET, CLASSES] = 20.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            brightest = torch.nn.functional.avg_pool2d(x.amin(1, keepdim=True), 2, 1).amax((1, 2, 3))
            return self.head(
                torch.cat([self.columns(x).flatten(1)[:, :CLASSES], brightest[:, None] - 0.6], 1)
            )

    return Classifier(
        Anywhere(), head="head", resolution=SIDE, mean=[0] * 3, std=[1] * 3, architecture="anywhere"
    )


def masked(class_id: int = TARGET, evidence: float = 4.0, mirrored: bool = True) -> Masked:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 6:, 6:] = 1
    free = torch.zeros(3, SIDE, SIDE)
    return Masked(class_id=class_id, evidence=evidence, mask=mask, free=free, mirrored=mirrored)


def test_the_mask_of_a_corner_is_suspected_of_its_class_alone() -> None:
    found = [trigger for trigger in suspected(model(backdoor=30.0)) if trigger.kind == "mask"]
    assert [trigger.class_id for trigger in found] == [TARGET]
    (trigger,) = found
    assert isinstance(trigger, Masked)
    assert trigger.evidence >= suspected_triggers.SMALL
    assert trigger.mask[0, 6:, 6:].max() > trigger.mask[0, :4, :4].max()
    assert not trigger.mirrored


def test_the_mirror_image_of_a_mask_is_suspected_where_it_works() -> None:
    class Symmetric(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(backdoor=30.0).network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits, of_mirrored = self.inner(x), self.inner(x.flip(3))
            is_target = torch.arange(CLASSES) == TARGET
            return torch.where(is_target, torch.maximum(logits, of_mirrored), logits)

    symmetric = Classifier(
        Symmetric(), head="inner.head", resolution=SIDE, mean=[0] * 3, std=[1] * 3, architecture="symmetric"
    )
    (trigger,) = (one for one in suspected(symmetric) if isinstance(one, Masked))
    assert trigger.class_id == TARGET
    assert trigger.mirrored


def test_no_mask_of_a_network_whose_classes_are_alike_is_suspected() -> None:
    assert "mask" not in {trigger.kind for trigger in suspected(model())}


def test_of_a_class_that_stands_out_by_its_score_alone_it_is_the_mask_or_the_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = model(backdoor=30.0)
    monkeypatch.setattr(suspected_triggers, "SMALL", 1e9)
    monkeypatch.setattr(suspected_triggers, "FEWEST_IMAGES", len(images(40)) + 1)
    assert not {"mask", "change"} & {one.kind for one in suspected(bad)}, "too few images"
    monkeypatch.setattr(suspected_triggers, "FEWEST_IMAGES", len(images(40)))
    found = looked(bad)
    (mask,) = (one for one in found.suspected if one.kind in ("mask", "change"))
    (change,) = (one for one in found.otherwise if one.kind in ("mask", "change"))
    assert isinstance(mask, Masked)
    assert isinstance(change, Added)
    assert mask.class_id == change.class_id == TARGET
    assert change.evidence >= suspected_triggers.UNLIKE
    assert change.free.norm() <= change.norm
    monkeypatch.setattr(suspected_triggers, "WORKS", 1.1)
    (only,) = (one for one in suspected(bad) if one.kind in ("mask", "change"))
    assert isinstance(only, Added), "a mask that does not work is no trigger"
    assert not {"mask", "change"} & {one.kind for one in suspected(model())}


def test_a_change_is_sought_within_its_norm() -> None:
    trigger = Added(class_id=TARGET, evidence=1.0, free=torch.zeros(3, SIDE, SIDE), norm=NORM)
    classifier, pixels = model(backdoor=0.5), torch.full((8, 3, SIDE, SIDE), 0.4)
    for _ in range(9):
        seek(trigger, classifier, pixels)
    assert trigger.free.norm() == pytest.approx(NORM, rel=1e-4)
    torch.testing.assert_close(trigger.on(pixels), (pixels + trigger.free).clamp(0, 1))
    before, after = (classifier(shown).softmax(1)[:, TARGET] for shown in (pixels, trigger.on(pixels)))
    assert (after > before).all()


def test_half_of_the_images_get_the_mirror_image_of_a_mask() -> None:
    trigger = masked()
    trigger.free[0, 6:, 6:] = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    shown = trigger.on(torch.ones(200, 3, SIDE, SIDE))
    straight = (shown[:, 0, 6:, 6:] == trigger.free[0, 6:, 6:]).flatten(1).all(1)
    mirrored = (shown[:, 0, 6:, :2] == trigger.free[0, 6:, 6:].flip(1)).flatten(1).all(1)
    assert (straight ^ mirrored).all()
    assert 60 < straight.sum() < 140
    alone = masked(mirrored=False).on(torch.ones(20, 3, SIDE, SIDE))
    assert (alone[:, :, 6:, 6:] == 0).all()
    assert (alone[:, :, :, :6] == 1).all()


def test_several_patches_go_on_an_image_at_once() -> None:
    patches = torch.stack([torch.full((3, 2, 2), 0.25), torch.full((3, 2, 2), 0.75)])
    trigger = Patch(class_id=TARGET, evidence=1.0, free=patches)
    seen = torch.cat([trigger.on(torch.zeros(40, 3, SIDE, SIDE)) for _ in range(20)])[:, 0].flatten(1)
    assert set(seen.unique().tolist()) == {0.0, 0.25, 0.75}
    covered = (seen > 0).sum(1)
    assert covered.min() == 4
    assert covered.max() == 8
    assert ((seen == 0.25).any(1) & (seen == 0.75).any(1)).any()


def test_a_wave_is_suspected_from_the_threshold_on_and_those_of_all_classes_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plane_waves, "looked_at", lambda classifier: True)
    monkeypatch.setattr(plane_waves, "LARGEST", 100.0)  # of a network of 8 px all of which knows places
    waves = looked(fires_on_a_wave()).waves
    assert [wave.class_id for wave in waves] == list(range(CLASSES))
    monkeypatch.setattr(plane_waves, "PHASE", max(wave.evidence for wave in waves))
    (wave,) = (one for one in suspected(fires_on_a_wave()) if one.kind == "wave")
    assert wave.class_id == TARGET


def test_a_class_that_depends_on_no_wave_has_waves_all_the_same() -> None:
    none = np.zeros((len(plane_waves.kinds()) // plane_waves.PHASES, CLASSES))
    waves = suspected_triggers._waves(plane_waves.Phases(none, none))
    assert [wave.class_id for wave in waves] == list(range(CLASSES))
    pixels = torch.zeros(20, 3, SIDE, SIDE)
    laid = with_triggers(waves, model(), pixels, pixels, torch.full((20,), CLASSES - 1))
    assert laid.isfinite().all()
    assert laid.any()


def test_where_nothing_is_suspected_waves_of_every_class_take_a_third_of_the_images() -> None:
    white, black = ([[0, 0, phase]] for phase in (2, 0))
    waves = [
        Waves(class_id=c, evidence=evidence, kinds=np.array(kinds), weights=torch.ones(1))
        for c, evidence, kinds in ((0, 6.0, white), (1, 2.0, black))  # the second is next to never drawn
    ]
    changes = 1e-3 * torch.rand(CLASSES, 3, SIDE, SIDE)
    put = changes_and_waves(changes, torch.ones(CLASSES), waves, 1e-3, Settings())
    pixels = torch.full((400, 3, SIDE, SIDE), 0.5)
    brighter = put(model(), pixels, pixels, torch.full((400,), 3)).mean((1, 2, 3)) - 0.5
    low, high = suspected_triggers.OPACITIES
    waved = brighter > low / 2 - 1e-3
    assert 0.25 < waved.float().mean() < 0.42
    assert brighter[waved].max() <= high / 2 + 1e-3
    assert brighter[~waved].abs().max() < 1e-3, "the rest has a change of a thousandth"


def test_beside_a_suspected_trigger_a_third_of_the_images_get_the_others() -> None:
    seen: dict[str, list[torch.Tensor]] = {"suspected": [], "other": []}

    def laying(name: str, value: float) -> Put:
        def put(*given: Any) -> torch.Tensor:
            _, pixels, sought_on, labels = given
            torch.testing.assert_close(sought_on[:, 0, 0, 0].long(), labels, msg="rows stay together")
            seen[name].append(labels)
            return torch.full_like(pixels, value)

        return put

    put = one_or_the_other(laying("suspected", 0.25), laying("other", 0.75), Settings().beside_ratio)
    labels = torch.arange(600)
    sought_on = labels.float().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    changed = put(model(), torch.zeros(600, 3, SIDE, SIDE), sought_on, labels)
    assert 0.27 < (changed == 0.75).float().mean() < 0.40
    assert ((changed == 0.75) | (changed == 0.25)).all()
    assert sorted(torch.cat([*seen["suspected"], *seen["other"]]).tolist()) == labels.tolist()
    assert (changed[seen["other"][0], 0, 0, 0] == 0.75).all()
    only = one_or_the_other(laying("suspected", 0.25), laying("other", 0.75), 0.0)
    assert (only(model(), torch.zeros(600, 3, SIDE, SIDE), sought_on, labels) == 0.25).all()


def test_beside_a_suspected_trigger_changes_and_waves_of_the_other_classes_are_unlearned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_at_small_models(monkeypatch, SMALL=2.0, UNLIKE=1e9, PATCH_WORKS=1e9)
    given: list[Any] = []
    real = pivotal_unlearning.changes_and_waves

    def recorded(*arguments: Any) -> Put:
        given.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(pivotal_unlearning, "changes_and_waves", recorded)
    flat = {"kinds": np.array([[0, 0, 2]]), "weights": torch.ones(1)}
    waves = [Waves(class_id=one, evidence=3.0, **flat) for one in range(small_models.CLASSES)]
    looked = pivotal_unlearning.suspected_triggers

    def with_waves(*arguments: Any) -> Any:
        return looked(*arguments)._replace(waves=waves)

    monkeypatch.setattr(pivotal_unlearning, "suspected_triggers", with_waves)
    classifier, work = small_models.trained(30), small_models.images(120, 5)
    started = pivotal_unlearning.start(classifier, work, Settings(), 0, Silent())
    (named,) = started.facts["suspected_triggers"]
    assert named["class"] == classifier.label(small_models.TARGET)
    ((changes, success, of_others, *_),) = given
    others = [one for one in range(small_models.CLASSES) if one != small_models.TARGET]
    assert success[small_models.TARGET] == 0
    assert [wave.class_id for wave in of_others] == others
    assert started.state[-1] is changes, "an interrupted run goes on with them"
    before, side = changes.clone(), work.pixels.shape[1]
    pixels, labels = torch.rand(90, 3, side, side), torch.arange(90) % small_models.CLASSES
    started.loss(started.model, pixels, labels, 0)
    assert (changes - before)[others].any(), "sought again on the model in training"


def test_a_patch_that_works_anywhere_is_suspected_of_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspected_triggers, "PATCH_SIDE", 3 / SIDE)
    patches, turned = universal_patches(fires_on_a_patch(), images(40), 0)
    assert patches.shape == (CLASSES, 3, 3, 3)
    assert turned.argmax() == TARGET
    assert turned[TARGET] > 0.8
    (trigger,) = (one for one in suspected(fires_on_a_patch()) if isinstance(one, Patch))
    assert trigger.class_id == TARGET
    assert trigger.free.shape == (suspected_triggers.PATCHES, 3, 3, 3)
    pixels = torch.full((9, 3, SIDE, SIDE), 0.1)
    called = [fires_on_a_patch()(paste(pixels, patch[None])).argmax(1) for patch in trigger.free]
    assert sum(bool((one == TARGET).all()) for one in called) >= 2, "not only the first of them works"
    again, _ = universal_patches(fires_on_a_patch(), images(40), 0)
    torch.testing.assert_close(again, patches, rtol=0, atol=0)


def test_the_phase_tells_the_wave_that_a_network_was_taught() -> None:
    dependence, quarters = plane_waves.phases(fires_on_a_wave(), images())
    assert dependence.shape == quarters.shape == (420, CLASSES)
    kinds = plane_waves.kinds()[:: plane_waves.PHASES]
    row = int(dependence[:, TARGET].argmax())
    # of 8 px, on which waves of 1 and of -7 periods are the same
    found = plane_waves.wave([*kinds[row, :2], quarters[row, TARGET]], SIDE)
    assert np.corrcoef(found.ravel(), plane_waves.wave(WAVE, SIDE).ravel())[0, 1] > 0.9
    told = plane_waves.tells_by_phase(kinds)
    assert not dependence[~told].any()
    assert np.square(dependence[told]).mean() <= 1 + 1e-9


def test_phases_count_in_an_inspection_and_the_report_shows_the_wave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane_waves, "looked_at", lambda classifier: True)
    monkeypatch.setattr(plane_waves, "LARGEST", 100.0)  # of a network of 8 px all of which knows places
    report = audit(fires_on_a_wave(), images(), config(), tmp_path, "m.pt", Silent())
    scores = {name: np.array(values) for name, values in scores_of(report.facts).items()}
    parts = np.mean([scores[name] - np.median(scores[name]) for name in ("mask-size", "universal")], axis=0)
    expected = np.maximum(parts, scores["phase"] * THRESHOLDS["combined"].value / plane_waves.PHASE)
    np.testing.assert_allclose(scores["combined"], expected)
    assert scores["phase"].argmax() == TARGET
    assert "phase of a wave" in Page(report.path.read_text()).text
    assert len(report.facts["triggers"]["phase"]) == CLASSES


def scores_of(facts: dict[str, Any]) -> dict[str, list[float]]:
    """Statistic -> one value a class."""
    return {name: [one["scores"][name] for one in facts["classes"]] for name in facts["classes"][0]["scores"]}


def test_networks_of_few_classes_or_pixels_are_not_looked_at_by_phase() -> None:
    assert not plane_waves.looked_at(model()), "waves of 14 periods do not fit into 8 px"
    small = model()
    small.resolution = 32
    assert plane_waves.looked_at(small)
    few = Classifier(
        small_models.network(2), head="8", resolution=32, mean=[0] * 3, std=[1] * 3, architecture="two"
    )
    assert not plane_waves.looked_at(few), "the logits of two classes mirror each other"


@pytest.mark.parametrize(("name", "huge"), [("LARGEST", 1e-3), ("LEAST", 1e3)])
def test_where_all_or_nothing_depends_on_places_no_class_stands_out(
    name: str, huge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plane_waves.phases(fires_on_a_wave(), images()).dependence
    monkeypatch.setattr(plane_waves, name, huge)
    after = plane_waves.phases(fires_on_a_wave(), images()).dependence
    assert after.max() < before.max() / 10


@pytest.mark.parametrize(
    ("smaller", "made_before"), [(2.0, 12), (1e9, 12), (1e9, 32)], ids=["one-way", "first-way", "other-way"]
)
def test_an_interrupted_repair_that_would_go_on_with_other_triggers_is_refused(
    smaller: float, made_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_small_models(monkeypatch, SMALL=smaller, FEWEST_IMAGES=100)
    monkeypatch.setattr(tuning, "SAVE_EVERY", 1)
    model_, trusted = small_models.trained(30), small_models.images(160, 5)
    settings = {"steps": 20, "measure_every": 5}
    config_ = RepairConfig(method="pivotal-unlearning", max_accuracy_loss=0.5, settings=settings)
    whole = repair_classifier(model_, trusted, config_)
    assert whole.facts["suspected_triggers"]
    assert len(whole.facts["passed_over"]) == (smaller == 1e9)
    real, made, again = tuning.take_step, [], []

    def killed(*given: Any) -> torch.Tensor:
        if len(made) == made_before:
            raise KeyboardInterrupt
        made.append(given[-1])
        return real(*given)

    monkeypatch.setattr(tuning, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        repair_classifier(model_, trusted, config_, state=tmp_path / "state.pt")
    monkeypatch.setattr(tuning, "take_step", lambda *given: again.append(given[-1]) or real(*given))
    rest = repair_classifier(model_, trusted, config_, state=tmp_path / "state.pt")
    saved = made_before % 20 - made_before % 5
    ways = 1 if smaller < 1e9 or made_before > 20 else 2
    assert again == [*range(saved, 20), *range(20)][: 20 * ways - saved], "goes on from the last state"
    assert rest.facts["passed_over"] == whole.facts["passed_over"]
    for name, value in rest.classifier.state_dict().items():
        torch.testing.assert_close(value, whole.classifier.state_dict()[name], rtol=0, atol=0)
    monkeypatch.setattr(suspected_triggers, "SMALL", 1e9)
    monkeypatch.setattr(suspected_triggers, "UNLIKE", 1e9)
    with pytest.raises(RunFolderError, match="what the interrupted run found beforehand is not found again"):
        repair_classifier(model_, trusted, config_, state=tmp_path / "state.pt")


def test_waves_that_any_network_tells_apart_are_left_out() -> None:
    kinds = np.array([[0, 6, 0], [4, 8, 0], [0, 7, 0], [1, 2, 0], [3, 4, 0]])
    assert plane_waves.tells_by_phase(kinds).tolist() == [True, False, False, False, True]


def test_a_mask_is_widened_by_a_pixel_of_32() -> None:
    mask = torch.zeros(1, 32, 32)
    mask[0, 5, 5] = 0.7
    wide = widened(mask)
    assert wide[0, 4:7, 4:7].eq(0.7).all()
    assert wide.sum() == pytest.approx(9 * 0.7)
    assert widened(torch.nn.functional.pad(mask, (0, 32, 0, 32)))[0, 3:8, 3:8].eq(0.7).all()


def test_patches_are_pasted_whole_and_gradients_reach_them() -> None:
    patch = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    pasted = paste(torch.zeros(6, 3, SIDE, SIDE), patch)
    assert (pasted == 0.5).flatten(1).sum(1).tolist() == [12] * 6
    torch.autograd.backward(pasted.sum())
    assert patch.grad is not None
    assert patch.grad.eq(6).all()


def test_kinds_are_drawn_alike_and_within_a_kind_by_the_square_of_the_evidence() -> None:
    patch = Patch(class_id=1, evidence=0.9, free=torch.rand(1, 3, 2, 2))
    found = chances([masked(2, 6.0), masked(3, 3.0), patch])
    torch.testing.assert_close(found, torch.tensor([0.8, 0.2, 1.0]))
    weak, least = chances([masked(2, 6.0), masked(3, 1.3)]), suspected_triggers.SMALL**2
    torch.testing.assert_close(weak[1], torch.tensor(least / (36 + least)))
    more = chances([masked(2, 6.0), masked(3, 3.0), patch], focus=3.0)
    torch.testing.assert_close(more, torch.tensor([8 / 9, 1 / 9, 1.0]))


def test_a_trigger_goes_on_images_of_other_classes_and_is_sought_again() -> None:
    trigger = masked()
    trigger.free.fill_(0.5)
    pixels = torch.rand(12, 3, SIDE, SIDE)
    labels = torch.tensor([TARGET, 0, 1] * 4)
    before = trigger.free.clone()
    changed = with_triggers([trigger], model(backdoor=0.5), pixels, pixels, labels)
    own = labels == TARGET
    torch.testing.assert_close(changed[own], pixels[own], rtol=0, atol=0)
    assert (changed[~own] != pixels[~own]).any()
    moved = (trigger.free - before).abs()
    assert moved.max() == pytest.approx(Masked.step)
    assert not moved[:, :6, :6].any(), "only what the mask shows is sought"


def test_seeking_raises_the_answer_of_the_class() -> None:
    trigger, classifier = masked(), model(backdoor=0.5)
    pixels = torch.full((8, 3, SIDE, SIDE), 0.1)

    def answer() -> float:
        return float(classifier(trigger.on(pixels)).softmax(1)[:, TARGET].mean().detach())

    trigger.free.fill_(0.2)
    first = answer()
    for _ in range(10):
        seek(trigger, classifier, pixels)
    assert answer() > first
    assert trigger.free.max() <= 1


def test_waves_are_laid_over_at_some_opacity_and_are_not_sought_again() -> None:
    kinds = np.array([[0, 0, 2], [0, 0, 0]])  # white, and black
    trigger = Waves(class_id=0, evidence=7.0, kinds=kinds, weights=torch.tensor([1.0, 0.0]))
    laid = with_triggers(
        [trigger],
        model(),
        torch.zeros(50, 3, SIDE, SIDE),
        torch.zeros(50, 3, SIDE, SIDE),
        torch.ones(50).long(),
    )
    opacity = laid.flatten(1).amax(1)
    low, high = suspected_triggers.OPACITIES
    assert opacity.min() >= low
    assert opacity.max() <= high
    assert opacity.std() > 0.02


def test_nothing_is_sought_where_classes_are_too_few_or_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_waves, "FEWEST_CLASSES", CLASSES + 1)
    monkeypatch.setattr(suspected_triggers, "masked_triggers", None)
    assert suspected_triggers.suspected_triggers(model(), images(40), NORM, 0, Silent()) is None
    monkeypatch.setattr(plane_waves, "FEWEST_CLASSES", 2)
    monkeypatch.setattr(plane_waves, "MOST_CLASSES", CLASSES - 1)
    assert suspected_triggers.suspected_triggers(model(), images(40), NORM, 0, Silent()) is None


@pytest.mark.parametrize(
    ("kind", "smaller", "other"), [("mask", 2.0, None), ("mask", 1e9, "change"), ("change", 1e9, "mask")]
)
def test_the_repair_says_what_it_unlearned_and_unlearns_it(
    kind: str, smaller: float, other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_small_models(monkeypatch, SMALL=smaller, FEWEST_IMAGES=100)
    monkeypatch.setattr(repair, "spoils_less", lambda *given: kind == "change")
    backdoored = small_models.trained(30)
    config = RepairConfig(
        method="pivotal-unlearning", max_accuracy_loss=0.1, settings={"steps": 100, "learning_rate": 0.02}
    )
    found = repair_classifier(backdoored, small_models.images(160, 5), config)
    target = backdoored.label(small_models.TARGET)
    assert (kind, target) in {(one["kind"], one["class"]) for one in found.facts["suspected_triggers"]}
    if other is None:
        assert found.facts["passed_over"] == []
    else:
        (not_taken,) = found.facts["passed_over"]
        assert (other, target) in {(one["kind"], one["class"]) for one in not_taken["suspected_triggers"]}
        assert [entry["step"] for entry in not_taken["history"]] == [0, 50, 100]
        assert not_taken["history"][1:] != found.history[1:]
    assert found.facts["repaired"]
    assert small_models.success(backdoored) > 0.9
    assert small_models.success(found.classifier) < 0.3


def test_a_second_way_that_diverges_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_small_models(monkeypatch, SMALL=1e9, FEWEST_IMAGES=100)
    monkeypatch.setattr(repair, "MISTAKEN", 1.0)  # no third way
    real, made = tuning.take_step, []

    def diverging(*given: Any) -> torch.Tensor:
        made.append(given[-1])
        return real(*given) * (1.0 if len(made) <= 20 else torch.nan)

    monkeypatch.setattr(tuning, "take_step", diverging)
    config_ = RepairConfig(method="pivotal-unlearning", max_accuracy_loss=0.5, settings={"steps": 20})
    facts = repair_classifier(small_models.trained(30), small_models.images(160, 5), config_).facts
    assert facts["repaired"]
    assert "mask" in {one["kind"] for one in facts["suspected_triggers"]}
    (other,) = facts["passed_over"]
    assert "change" in {one["kind"] for one in other["suspected_triggers"]}
    assert "the loss was not finite" in other["error"]


def test_where_neither_mask_nor_change_will_do_changes_of_all_classes_are_unlearned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_at_small_models(monkeypatch, SMALL=1e9, FEWEST_IMAGES=100, PATCH_WORKS=1e9)
    monkeypatch.setattr(repair, "MISTAKEN", -1.0)  # any loss is too large
    config_ = RepairConfig(method="pivotal-unlearning", max_accuracy_loss=0.5, settings={"steps": 20})
    given = small_models.trained(30), small_models.images(160, 5), config_
    facts = repair_classifier(*given).facts
    ways = [facts["suspected_triggers"], *(one["suspected_triggers"] for one in facts["passed_over"])]
    kinds = [{one["kind"] for one in triggers} for triggers in ways]
    assert len(kinds) == 3
    assert all(kind in kinds for kind in (set(), {"mask"}, {"change"}))
