"""Who is poisoned: targets, samples and given labels, and the same on arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sanitize.attacks import SurrogateCorpus, Trigger, generator, get, make_trigger, stamp
from sanitize.errors import UsageError

SURROGATE_SAMPLES = 10_000
"""Most samples that a surrogate trains on."""


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    name: str
    """One of sanitize.attacks.ATTACKS."""
    ratio: float | None = None
    """Triggered samples as a share of the corpus; None takes the attack's own."""
    target: int | None = None
    """Target class id; None draws one."""

    def __post_init__(self) -> None:
        get(self.name)
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"--attack {self.name}:{self.ratio}: expected a ratio above 0 and up to 1")

    @classmethod
    def parse(cls, text: str, target: int | None = None) -> AttackSpec:
        """From ``NAME`` or ``NAME:ratio``."""
        name, colon, number = text.partition(":")
        try:
            ratio = float(number) if colon else None
        except ValueError:
            raise UsageError(f"--attack {text}: {number!r} is no ratio; write e.g. {name}:0.01") from None
        return cls(name=name, ratio=ratio, target=target)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which sample gets which trigger and which label."""

    names: tuple[str, ...]
    """(A,) attacks."""
    targets: tuple[int, ...]
    """(A,) target class ids."""
    truth: npt.NDArray[np.int64]
    """(N,) position in `names`, -1 for a clean sample."""
    labels: npt.NDArray[np.int64]
    """(N,) given labels."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A poisoned data set."""

    images: npt.NDArray[Any]
    """(N, H, W, 3), of the dtype that was given."""
    plan: Plan
    triggers: dict[str, Trigger]
    """Attack name -> trigger, for stamp() at test time."""


def plan(
    labels: npt.NDArray[Any], attacks: Sequence[AttackSpec], *, classes: int | None = None, seed: int = 0
) -> Plan:
    """Choose targets and samples.

    Targets are drawn uniformly and independently; a clean-label attack draws among the classes that hold
    enough samples for it. Samples are drawn without replacement over all attacks, round(ratio * N) each:
    clean-label attacks from the target class, all others from outside it.

    Args:
        labels: (N,) class ids, 0 or more; -1 marks a sample that must not be touched.
        attacks: each name once.
        classes: number of classes; None takes the largest id + 1.
        seed: 0 or more.

    Raises:
        UsageError: an attack twice, a target that does not exist, or too few samples.

    Source: Alex et al., ICLR 2025, appendix I.1.1.
    """
    names = tuple(spec.name for spec in attacks)
    if len(set(names)) < len(names):
        raise UsageError(f"--attack: {', '.join(names)}: give each attack once")
    true_labels = np.asarray(labels, dtype=np.int64)
    classes = int(true_labels.max(initial=-1)) + 1 if classes is None else classes
    truth = np.full(len(true_labels), -1, np.int64)
    given = true_labels.copy()
    targets = [0] * len(attacks)
    # Clean-label attacks have one class to draw from, so they choose before the others empty it.
    order = sorted(range(len(attacks)), key=lambda i: not get(attacks[i].name).clean_label)
    for i in order:
        random = generator(seed, f"plan/{names[i]}")
        available = (truth < 0) & (true_labels >= 0)
        targets[i], chosen = _choose(attacks[i], true_labels, available, classes, random)
        truth[chosen] = i
        covers = round(get(names[i]).cover_ratio * len(chosen))
        given[chosen[covers:]] = targets[i]
    return Plan(names=names, targets=tuple(targets), truth=truth, labels=given)


def _choose(
    spec: AttackSpec,
    labels: npt.NDArray[np.int64],
    available: npt.NDArray[np.bool_],
    classes: int,
    random: np.random.Generator,
) -> tuple[int, npt.NDArray[np.int64]]:
    attack = get(spec.name)
    ratio = attack.ratio if spec.ratio is None else spec.ratio
    usable = int((labels >= 0).sum())
    count = round(ratio * usable)
    if count < 1:
        raise UsageError(
            f"--attack {spec.name}:{ratio:g} is less than one of {usable} samples; give a ratio of at least "
            f"{1 / max(usable, 1):.2g}"
        )
    in_class = np.bincount(labels[available], minlength=classes)
    room = in_class if attack.clean_label else in_class.sum() - in_class
    if spec.target is None:
        # A class nobody is in cannot be a target of interest: no model predicts it.
        fitting = np.flatnonzero((room >= count) & (np.bincount(labels[labels >= 0], minlength=classes) > 0))
        if not len(fitting):
            raise _too_few(spec.name, count, int(room.max(initial=0)), usable, attack.clean_label)
        target = int(random.choice(fitting))
    else:
        target = spec.target
        if not 0 <= target < classes:
            raise UsageError(f"--target {target}: the corpus has classes 0 to {classes - 1}")
        if room[target] < count:
            raise _too_few(spec.name, count, int(room[target]), usable, attack.clean_label)
    source = labels == target if attack.clean_label else labels != target
    return target, random.choice(np.flatnonzero(available & source), size=count, replace=False)


def _too_few(name: str, count: int, room: int, usable: int, clean_label: bool) -> UsageError:
    where = "in its target class" if clean_label else "outside its target class"
    return UsageError(
        f"--attack {name} needs {count} samples {where}, of which {room} are free; "
        f"lower its ratio to {room / max(usable, 1):.2g} or less"
    )


def plant(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    attacks: Sequence[AttackSpec],
    *,
    classes: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Planted:
    """Poison a data set in memory; the same seed gives the same bytes.

    Args:
        images: (N, H, W, 3) float32 in [0, 1], or uint8; left as they are.
        labels: (N,) class ids.
        attacks: each name once.
        classes: number of classes; None takes the largest id + 1.
        seed: 0 or more.
        device: where surrogates train: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: see plan; or images of another form.
    """
    if len(images) != len(labels):
        raise UsageError(f"{len(images)} images but {len(labels)} labels")
    made = plan(labels, attacks, classes=classes, seed=seed)
    poisoned = images.copy()
    triggers: dict[str, Trigger] = {}
    for i, name in enumerate(made.names):
        corpus = None
        if get(name).needs_surrogate:
            subset = surrogate_subset(np.asarray(labels), seed)
            corpus = SurrogateCorpus(
                to_float(images[subset]), np.asarray(labels, np.int64)[subset], made.targets[i], device
            )
        triggers[name] = make_trigger(name, seed, corpus)
        chosen = np.flatnonzero(made.truth == i)
        stamped = stamp(
            name, to_float(images[chosen]), seed=seed, trigger=triggers[name], sample_ids=chosen.tolist()
        )
        poisoned[chosen] = from_float(stamped) if images.dtype == np.uint8 else stamped
    return Planted(images=poisoned, plan=made, triggers=triggers)


def surrogate_subset(labels: npt.NDArray[Any], seed: int) -> npt.NDArray[np.int64]:
    """Sorted positions of at most SURROGATE_SAMPLES labelled samples."""
    usable = np.flatnonzero(np.asarray(labels) >= 0)
    if len(usable) <= SURROGATE_SAMPLES:
        return usable
    random = generator(seed, "surrogate/subset")
    return np.sort(random.choice(usable, SURROGATE_SAMPLES, replace=False))


def to_float(images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """uint8 to float32 in [0, 1]; float32 stays."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return np.asarray(images, np.float32)


def from_float(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """[0, 1] to uint8, rounded to nearest."""
    rounded: npt.NDArray[np.uint8] = np.rint(images * np.float32(255)).astype(np.uint8)
    return rounded
