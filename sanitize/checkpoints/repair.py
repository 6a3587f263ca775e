"""Take a backdoor out of a trained classifier with a few hundred trusted images: `sanitize repair`.

The story: hold some trusted images out, let a method tune a copy (`start` of its file, the loop in
`tuning`), keep the last copy whose held-out accuracy is within Δ of the original's, say what changed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sanitize.checkpoints import (
    fine_pruning,
    neural_attention_distillation,
    neural_cleanse_unlearning,
    pivotal_tuning,
    pivotal_unlearning,
    weight_decay,
)
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import TrustedImages, split
from sanitize.checkpoints.tuning import (
    MISTAKEN,
    Schedule,
    Started,
    Task,
    Tuned,
    changed,
    correctness,
    predict,
    spoils_less,
    tune,
)
from sanitize.config import _require
from sanitize.errors import InputError, TrainingError, UsageError
from sanitize.progress import Progress, Silent

_METHODS: dict[str, ModuleType] = {
    "pivotal-unlearning": pivotal_unlearning,
    "pivotal-tuning": pivotal_tuning,
    "weight-decay": weight_decay,
    "fine-pruning": fine_pruning,
    "nad": neural_attention_distillation,
    "neural-cleanse": neural_cleanse_unlearning,
}
DEFAULT = "pivotal-unlearning"
"""Of 54 repairs that were measured Pivotal Tuning kept four models, each with its backdoor
(docs/experiments.md)."""
LARGE_HEAD = 200
"""Classes from which on a method takes its settings for ImageNet."""
FEW_IMAGES = 256
"""Images to tune on below which a method takes its settings for few, where it has any."""
_FOR_FEW = {"pivotal-unlearning": pivotal_unlearning.FEW}


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """How to repair."""

    method: str = DEFAULT
    """One of `methods()`."""
    max_accuracy_loss: float = 0.02
    """Δ, how far held-out accuracy may fall, as a fraction."""
    held_out_ratio: float = 0.25
    """Share of the trusted images that accuracy is measured on."""
    seed: int = 0
    """Of the split, the order of the images, and what a method draws."""
    settings: dict[str, float] = field(default_factory=dict)
    """Changes to the method's settings, as `--calibrate` finds them; empty: as `settings_of` has them."""

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UsageError(f"--method {self.method}: expected {', '.join(_METHODS)}")
        _require(
            0 <= self.max_accuracy_loss <= 1,
            f"--max-accuracy-loss {self.max_accuracy_loss}: expected a fraction from 0 to 1",
        )
        _require(
            0 < self.held_out_ratio < 1, f"held_out_ratio {self.held_out_ratio}: expected between 0 and 1"
        )
        _require(0 <= self.seed < 2**31, f"--seed {self.seed}: expected 0 to {2**31 - 1}")


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A repaired classifier, in eval mode, and what was done."""

    classifier: Classifier
    """The last one within Δ; the original's copy where there was none (`facts["repaired"]` is false)."""
    history: list[dict[str, Any]]
    """One entry a measurement: step, loss in nats, held_out_accuracy."""
    facts: dict[str, Any]
    """For the JSON file: method, settings, before, after, parameter_distance, seconds and more."""


def methods() -> tuple[str, ...]:
    """Every method."""
    return tuple(_METHODS)


def repair_classifier(
    classifier: Classifier,
    trusted: TrustedImages,
    config: RepairConfig,
    progress: Progress | None = None,
    state: Path | None = None,
) -> Repaired:
    """Repair a copy of a classifier, in memory, on the device that it is on.

    Args:
        classifier: left as it is.
        trusted: at least two images a class and two classes.
        state: file for an interrupted run to go on from; None: nowhere.

    Raises:
        InputError: trusted images or a network that a repair makes no sense with.
        UsageError: the method does not suit the network.
        TrainingError: the loss is not finite.
    """
    check(classifier, trusted)
    progress = progress or Silent()
    began = time.monotonic()
    work, held_out = split(trusted, config.held_out_ratio, config.seed)
    settings = settings_of(config.method, classifier.classes, len(work), config.settings)
    task = Task(
        work=work,
        held_out=held_out,
        max_accuracy_loss=config.max_accuracy_loss,
        seed=config.seed,
        state=state,
    )
    started = _METHODS[config.method].start(classifier, work, settings, config.seed, progress)
    started, tuned, passed_over = best_way(classifier, started, settings.schedule, task, progress)
    facts = {
        "method": config.method,
        "settings": dataclasses.asdict(settings),
        "max_accuracy_loss": config.max_accuracy_loss,
        "seed": config.seed,
        **started.facts,
        "passed_over": passed_over,
        **compare(classifier, tuned, work, held_out, config.max_accuracy_loss),
        "seconds": round(time.monotonic() - began, 1),
    }
    return Repaired(classifier=tuned.model, history=tuned.history, facts=facts)


def best_way(
    original: Classifier, started: Started, schedule: Schedule, task: Task, progress: Progress
) -> tuple[Started, Tuned, list[dict[str, Any]]]:
    """Tune in each way that there is reason to; the one that is taken, and facts of the others.

    A third way is tuned where the better of the first two lost over `MISTAKEN`: then neither was right.
    """
    taken = started, tune(original, started, schedule, task, progress)
    passed_over: list[dict[str, Any]] = []
    by, number, otherwise = MISTAKEN, 2, started.otherwise
    while otherwise is not None and (number == 2 or taken[1].change < -MISTAKEN):
        progress.note("the trigger may be another; repaired again for that one")
        way = otherwise()
        state = None if task.state is None else task.state.with_name(f"way-{number}-{task.state.name}")
        try:
            tuned = tune(original, way, schedule, replace(task, state=state), progress)
        except TrainingError as error:
            passed_over.append({**way.facts, "error": str(error)})
        else:
            other = way, tuned
            if spoils_less(tuned, taken[1], by):
                taken, other = other, taken
            passed_over.append(
                {**other[0].facts, "accuracy_change": other[1].change, "history": other[1].history}
            )
        by, number, otherwise = 0.0, number + 1, way.otherwise
    return *taken, passed_over


def settings_of(method: str, classes: int, images: int, changes: dict[str, float]) -> Any:
    """A method's settings for a head of that size and so many images to tune on, with changes.

    The settings are those published, where they are; changes may be of the schedule, too.

    Raises:
        UsageError: no such setting.
    """
    module = _METHODS[method]
    settings = module.LARGE if classes >= LARGE_HEAD else module.Settings()
    if few_images(classes, images):
        settings = _FOR_FEW.get(method, settings)
    own = {entry.name for entry in dataclasses.fields(settings)} - {"schedule", "inversion"}
    timing = {entry.name for entry in dataclasses.fields(settings.schedule)}
    unknown = changes.keys() - own - timing
    if unknown:
        raise UsageError(
            f"--method {method} has no setting {min(unknown)}; it has {', '.join(sorted(own | timing))}"
        )
    schedule = replace(settings.schedule, **{k: v for k, v in changes.items() if k in timing})
    return replace(settings, schedule=schedule, **{k: v for k, v in changes.items() if k in own})


def few_images(classes: int, images: int) -> bool:
    """Whether there are so few images to tune on, and the head is not large, that settings for few apply."""
    return classes < LARGE_HEAD and images < FEW_IMAGES


def check(classifier: Classifier, trusted: TrustedImages) -> None:
    """Refuse what no repair can work with.

    Raises:
        InputError: labels outside the head, one class, a class with one image, parameters that are not
            finite, or a network that gives every image one class.
    """
    counts = np.bincount(trusted.class_id, minlength=classifier.classes) if len(trusted) else np.zeros(1, int)
    present = np.flatnonzero(counts)
    if len(counts) > classifier.classes:
        raise InputError(
            f"trusted label {present[-1]} is outside the model's head of {classifier.classes} classes; "
            "check --label, or the order of the class names"
        )
    if len(present) < 2:
        raise InputError(f"the trusted images are of {len(present)} class; a repair needs two or more")
    if counts[present].min() < 2:
        lonely = classifier.label(int(present[counts[present].argmin()]))
        raise InputError(f"class {lonely} has one trusted image; give two or more of each class")
    for name, value in classifier.network.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"the checkpoint's {name} holds NaN or infinite values; it cannot be repaired")
    called = np.unique(predict(classifier, trusted))
    if len(called) == 1:
        raise InputError(
            f"the model calls every trusted image {classifier.label(int(called[0]))}; check --arch and the "
            "preprocessing (--mean, --std, --resolution)"
        )


def compare(
    original: Classifier,
    tuned: Tuned,
    work: TrustedImages,
    held_out: TrustedImages,
    max_accuracy_loss: float,
) -> dict[str, Any]:
    """Facts of before and after: held-out accuracy with its standard error, and how far the weights went."""
    before = correctness(original, held_out)
    found = changed(before, correctness(tuned.model, held_out))
    return {
        "repaired": tuned.step is not None,
        "kept_step": tuned.step,
        "stopped": tuned.stopped,
        "trusted": {"tuned_on": len(work), "held_out": len(held_out)},
        "before": {"held_out_accuracy": float(before.mean())},
        "after": {"held_out_accuracy": found.accuracy},
        "accuracy_change": found.change,
        "accuracy_change_se": found.standard_error,
        "confidence_within": None if tuned.step is None else found.confidence(max_accuracy_loss),
        "parameter_distance": parameter_distance(original, tuned.model),
    }


def parameter_distance(one: Classifier, other: Classifier) -> dict[str, float]:
    """Euclidean distance of all parameters, and its ratio to the first model's norm."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    apart = math.sqrt(sum(float((a - b).detach().double().square().sum()) for a, b in pairs))
    norm = math.sqrt(sum(float(a.detach().double().square().sum()) for a, _ in pairs))
    return {"l2": apart, "relative": apart / max(norm, 1e-12)}
