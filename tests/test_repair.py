"""Repair in memory and of files: what it removes, where it stops, what it refuses, how it goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CLASSES, images, success, trained

from sanitize.checkpoints import repair, tuning
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.fine_pruning import last_convolution
from sanitize.checkpoints.neural_attention_distillation import stage_names
from sanitize.checkpoints.pivotal_unlearning import with_patches
from sanitize.checkpoints.repair import RepairConfig, Repaired, methods, repair_classifier, settings_of
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.checkpoints.tuning import Started, Tuned, accuracy, spoils_less
from sanitize.errors import InputError, UsageError
from sanitize.progress import Silent

SHORT = {"steps": 60, "measure_every": 20}


def repaired(model: Classifier, state: Path | None = None, **changes: object) -> Repaired:
    defaults = {"method": "pivotal-tuning", "settings": SHORT, "held_out_ratio": 0.4}
    config = RepairConfig(**{**defaults, **changes})  # type: ignore[arg-type]
    return repair_classifier(model, images(160, 5), config, state=state)


def same(one: Classifier, other: Classifier) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", methods())
def test_every_method_repairs_a_copy_and_leaves_the_original(method: str) -> None:
    model = trained(30)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changes = {**SHORT, "teacher_steps": 20} if method == "nad" else SHORT
    found = repaired(model, method=method, settings=changes, max_accuracy_loss=1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not same(model, found.classifier)
    assert not found.classifier.training
    assert [entry["step"] for entry in found.history] == [0, 20, 40, 60]
    assert found.facts["kept_step"] == 60
    assert found.facts["parameter_distance"]["l2"] > 0


def test_pivotal_tuning_takes_the_backdoor_out() -> None:
    model = trained(30)
    assert success(model) > 0.9
    # the published pull is for millions of parameters
    found = repaired(model, settings={"steps": 200, "parameter_weight": 100.0, "latent_weight": 0.2})
    assert found.facts["repaired"]
    assert success(found.classifier) < 0.4  # 0.20 on two cores
    assert accuracy(found.classifier, images(400, 9)) > 0.95


def test_pivotal_unlearning_takes_the_backdoor_out() -> None:
    model = trained(30)
    # the trigger of this network is larger than those of the networks that the settings were chosen on
    found = repaired(model, method="pivotal-unlearning", settings={"steps": 200, "radius": 0.1})
    assert found.facts["repaired"]
    assert success(found.classifier) < 0.2  # 0.00 on two cores, from 0.99
    assert accuracy(found.classifier, images(400, 9)) > 0.95


def test_the_last_model_within_the_limit_is_kept() -> None:
    model = trained(30)
    found = repaired(model, settings={"steps": 40, "measure_every": 1, "learning_rate": 0.5})
    assert found.facts["stopped"] == "accuracy"
    within = [
        -e["accuracy_change"] <= 0.02 + min(e["accuracy_change_se"], 0.02) + 1e-9 for e in found.history
    ]
    assert [e["within"] for e in found.history] == within
    assert within[0]
    assert not within[-1]
    kept = [e["step"] for e in found.history[1:] if e["within"]]
    assert found.facts["kept_step"] == (kept[-1] if kept else None)


def test_the_change_of_accuracy_is_measured_image_by_image() -> None:
    before = np.array([1.0, 0.6, 0.0, 1.0])
    found = tuning.changed(before, np.array([0.8, 0.6, 0.2, 0.6]))
    assert found.accuracy == pytest.approx(0.55)
    assert found.change == pytest.approx(-0.1)
    assert found.standard_error == 0.25  # of one changed image; the spread alone would be 0.13
    assert found.confidence(0.1) == pytest.approx(0.5)
    assert found.within(0.05)
    # a standard error is more than that, but no loss over twice the limit passes
    assert not found.within(0.04)
    assert not tuning.Change(0.5, -0.2, 0.1).within(0.09)


def test_images_that_did_not_change_do_not_make_it_certain() -> None:
    same = tuning.changed(np.ones(50), np.ones(50))
    assert (same.change, same.standard_error) == (0, 0.02)
    assert same.within(0.0)
    assert same.confidence(0.0) == pytest.approx(0.5)
    assert same.confidence(0.02) == pytest.approx(0.841, abs=0.001)
    all_lost = tuning.changed(np.ones(50), np.zeros(50))
    assert not all_lost.within(0.95)
    assert all_lost.confidence(0.9) < 1e-6


def test_a_held_out_image_is_judged_moved_by_a_pixel_each_way() -> None:
    whole = images(8, 5)
    right = tuning.correctness(trained(0), whole)
    assert right.shape == (8,)
    assert set((right * len(tuning.VIEWS)).round(6)) <= set(range(len(tuning.VIEWS) + 1))
    moved = np.pad(whole.pixels, ((0, 0), (1, 0), (0, 0), (0, 0)), mode="edge")[:, :-1]
    views = list(tuning._views(whole.pixels))
    assert np.array_equal(views[0], whole.pixels)
    assert any(np.array_equal(view, moved) for view in views)


@pytest.mark.parametrize(
    ("first", "first_kept", "other", "other_kept", "taken"),
    [
        ((-0.010, -0.010), 20, (0.005, 0.005), 20, "first"),
        ((-0.010, -0.030), 20, (-0.030, -0.009), 20, "other"),
        ((-0.010, -0.030), 20, (-0.030, -0.011), 20, "first"),
        ((-0.010, -0.045), 10, (-0.040, -0.039), 20, "first"),
        ((-0.050, -0.045), None, (-0.030, -0.041), 10, "other"),
        ((-0.050, -0.045), None, (-0.045, -0.041), None, "first"),
        ((-0.030, -0.035), 20, (-0.001, -0.041), None, "first"),
    ],
)
def test_another_way_is_taken_where_what_it_keeps_spoils_less(
    first: tuple[float, float],
    first_kept: int | None,
    other: tuple[float, float],
    other_kept: int | None,
    taken: str,
) -> None:
    def ended(changes: tuple[float, float], step: int | None) -> Tuned:
        history = [
            {"step": at, "accuracy_change": change} for at, change in zip((10, 20), changes, strict=True)
        ]
        return Tuned(model=trained(30), step=step, history=history, stopped="steps")

    assert spoils_less(ended(other, other_kept), ended(first, first_kept), 0.02) == (taken == "other")


@pytest.mark.parametrize(
    ("changes", "taken"),
    [((-0.01, -0.03), 0), ((-0.04, -0.01), 1), ((-0.04, -0.03, -0.05), 0), ((-0.03, -0.04, -0.02), 2)],
)
def test_a_third_way_is_tuned_where_neither_of_two_will_do(
    changes: tuple[float, ...], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, begun, states = trained(30), [], []

    def begin(number: int) -> Started:
        begun.append(number)
        otherwise = partial(begin, number + 1) if number < 2 else None
        return Started(model, tuning.cross_entropy, (), {"number": number}, otherwise=otherwise)

    def tune(
        original: Classifier, started: Started, schedule: Any, task: tuning.Task, progress: Any
    ) -> Tuned:
        number = started.facts["number"]
        states.append(task.state)
        history = [{"step": 20, "accuracy_change": changes[number]}]
        return Tuned(model=model, step=20, history=history, stopped="steps")

    monkeypatch.setattr(repair, "tune", tune)
    task = tuning.Task(
        work=images(8, 1), held_out=images(8, 2), max_accuracy_loss=0.02, seed=0, state=Path("state.pt")
    )
    schedule = tuning.Schedule(steps=20, learning_rate=1.0)
    way, tuned, passed_over = repair.best_way(model, begin(0), schedule, task, Silent())
    assert way.facts["number"] == taken
    assert tuned.change == changes[taken]
    assert sorted(one["number"] for one in passed_over) == sorted({*range(len(changes))} - {taken})
    assert all(one["accuracy_change"] == changes[one["number"]] for one in passed_over)
    assert len(set(states)) == len(changes), "a state file each"
    assert begun == list(range(len(changes))), "no way is begun for nothing"


def test_none_within_the_limit_gives_the_original_and_says_so() -> None:
    model = trained(30)
    found = repaired(model, settings={"steps": 3, "measure_every": 3, "learning_rate": 50.0})
    assert not found.facts["repaired"]
    assert found.facts["kept_step"] is None
    assert found.facts["confidence_within"] is None
    assert same(model, found.classifier)


def test_the_same_seed_gives_the_same_model_and_another_one_another() -> None:
    model = trained(30)
    assert same(repaired(model).classifier, repaired(model).classifier)
    assert not same(repaired(model).classifier, repaired(model, seed=1).classifier)


@pytest.mark.parametrize("method", methods())
def test_a_killed_run_goes_on_and_gives_the_same_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(30)
    changes = {"steps": 30, "measure_every": 5, **({"teacher_steps": 5} if method == "nad" else {})}
    whole = repaired(model, method=method, settings=changes, max_accuracy_loss=1.0)
    monkeypatch.setattr(tuning, "SAVE_EVERY", 1)
    real = tuning.take_step

    def killed_at_17(*arguments: object) -> torch.Tensor:
        if arguments[-1] == 17:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "take_step", killed_at_17)
    with pytest.raises(KeyboardInterrupt):
        repaired(model, tmp_path / "state.pt", method=method, settings=changes, max_accuracy_loss=1.0)
    monkeypatch.setattr(tuning, "take_step", real)
    rest = repaired(model, tmp_path / "state.pt", method=method, settings=changes, max_accuracy_loss=1.0)
    assert rest.history == whole.history
    assert same(rest.classifier, whole.classifier)


def test_settings_depend_on_the_head_and_can_be_changed() -> None:
    assert settings_of("pivotal-tuning", 10, 400, {}).parameter_weight == 20_000
    assert settings_of("pivotal-tuning", 1_000, 400, {}).parameter_weight == 150_000
    changed = settings_of("nad", 10, 400, {"attention_weight": 5, "steps": 7})
    assert (changed.attention_weight, changed.schedule.steps) == (5, 7)
    with pytest.raises(UsageError, match="weight-decay has no setting latent_weight; it has batch, "):
        settings_of("weight-decay", 10, 400, {"latent_weight": 1})


def test_few_images_are_tuned_on_at_half_the_rate_in_larger_steps() -> None:
    many = settings_of("pivotal-unlearning", 10, 256, {}).schedule
    few = settings_of("pivotal-unlearning", 10, 255, {"steps": 7}).schedule
    assert (few.learning_rate, few.steps) == (many.learning_rate / 2, 7)
    assert len(tuning.batch_rows(150, few.batch, 0, 0)) == 150
    assert len(tuning.batch_rows(255, few.batch, 0, 0)) == 128
    large = settings_of("pivotal-unlearning", 1_000, 255, {}).schedule
    assert large == settings_of("pivotal-unlearning", 1_000, 256, {}).schedule
    assert settings_of("nad", 10, 255, {}) == settings_of("nad", 10, 256, {})
    config = RepairConfig(method="pivotal-unlearning", settings={"steps": 1})
    found = repair_classifier(trained(30), images(300, 6), config)
    assert found.facts["trusted"]["tuned_on"] < 256
    assert found.facts["settings"]["schedule"]["learning_rate"] == few.learning_rate


def relabelled(change: np.ndarray) -> TrustedImages:
    return TrustedImages(pixels=images(len(change), 5).pixels, class_id=change.astype(np.int64))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(40) % 5, "trusted label 4 is outside the model's head of 4 classes"),
        (np.zeros(40), "of 1 class; a repair needs two or more"),
        (np.array([0] * 20 + [1] * 20 + [2]), "class 2 has one trusted image"),
    ],
)
def test_trusted_images_that_will_not_do(labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        repair_classifier(trained(0), relabelled(labels), RepairConfig())


def test_networks_that_will_not_do() -> None:
    broken = trained(0).clone()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"the checkpoint's 8\.bias holds NaN"):
        repair_classifier(broken, images(40, 5), RepairConfig())
    constant = trained(0).clone()
    with torch.no_grad():
        constant.head.bias[2] = 1e6
    with pytest.raises(InputError, match="calls every trusted image 2"):
        repair_classifier(constant, images(40, 5), RepairConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "--method magic: expected pivotal-unlearning"),
        ({"max_accuracy_loss": 2.0}, "--max-accuracy-loss 2.0"),
        ({"held_out_ratio": 1.0}, "held_out_ratio 1.0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RepairConfig(**changes)  # type: ignore[arg-type]


def test_networks_without_convolutions_are_told_what_to_take() -> None:
    plain = Classifier(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, CLASSES)),
        head="1",
        resolution=12,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        architecture="plain",
    )
    for method in ("fine-pruning", "nad"):
        with pytest.raises(UsageError, match=r"plain has no .*; take pivotal-unlearning"):
            repair_classifier(plain, images(40, 5), RepairConfig(method=method))


def test_a_transformer_has_one_convolution_and_that_is_not_pruned() -> None:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(16, 4, 1, 2, 32, 32, num_classes=CLASSES)
    vit = Classifier(
        network, head="heads.head", resolution=16, mean=[0.5] * 3, std=[0.5] * 3, architecture="vit"
    )
    with pytest.raises(UsageError, match="no second convolution"):
        last_convolution(vit, [torch.rand(2, 3, 16, 16)])


def test_attention_is_taken_at_the_ends_of_stages() -> None:
    from torchvision.models import resnet50

    network = resnet50(num_classes=CLASSES)
    classifier = Classifier(
        network, head="fc", resolution=64, mean=[0.5] * 3, std=[0.5] * 3, architecture="resnet50"
    )
    assert stage_names(classifier, torch.rand(1, 3, 64, 64)) == [
        "relu",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]


def test_auxiliary_heads_are_left_alone() -> None:
    from torchvision.models import GoogLeNet

    network = GoogLeNet(num_classes=CLASSES, aux_logits=True, init_weights=False)
    classifier = Classifier(
        network, head="fc", resolution=96, mean=[0.5] * 3, std=[0.5] * 3, architecture="googlenet"
    ).train()
    assert classifier(torch.rand(2, 3, 96, 96)).shape == (2, CLASSES)


def test_patches_of_other_images() -> None:
    pixels = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 3, 12, 12)
    torch.manual_seed(0)
    mixed = with_patches(pixels, 0.5)
    other = mixed != pixels
    share = other[:, 0].float().mean(dim=(1, 2))
    assert (share > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert share.max() <= 0.75  # 0.6 of the area, and up to a pixel more each way
    for row in (share > 0).nonzero()[:20, 0]:
        foreign = mixed[row][other[row]]
        assert len(foreign.unique()) == 1
        inside = other[row, 0]
        assert inside.sum() == inside.any(0).sum() * inside.any(1).sum()  # one rectangle
    assert torch.equal(with_patches(pixels, 0.0), pixels)
