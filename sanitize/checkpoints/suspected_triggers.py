"""Triggers that turn images into one class far more easily than the like turns them into others.

A large enough mask, change, patch or wave turns images into any class. A backdoor's class takes far less, and
what it takes tells its trigger. Which kind it is nobody knows beforehand, so each is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from sanitize.checkpoints import plane_waves
from sanitize.checkpoints.anomalies import COMBINED, anomalies, averaged
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trigger_inversion import (
    LONG_S,
    WORKS,
    InversionConfig,
    Triggers,
    estimated_s,
    evaluate,
    frozen,
    masked_triggers,
    predict,
    stamp,
)
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.checkpoints.tuning import batch_rows
from sanitize.checkpoints.universal_changes import comparable_changes, moved_within, steps_of
from sanitize.dynamics.proxy import seeded
from sanitize.progress import Progress
from sanitize.scores.network import fast

SMALL = 2.2
"""How many times smaller than the median class's a mask is to be suspected. Of 15 clean networks 1.65 at
most, of the other classes of backdoored ones 2.1; 2.6 and more for most patches (docs/experiments.md)."""
UNLIKE = 0.85
"""Score of a class by mask and universal change, on the images that both were sought on. From here on its
mask or its change is suspected, however little smaller the mask is: a mask where the trigger is a patch, a
change where it is a faint picture. Of nine clean networks 0.55 at most, of the other classes of backdoored
ones 0.74 (docs/experiments.md)."""
FEWEST_IMAGES = 150
"""For such a score; a quarter of 200 is held out. With 60 images clean networks of toy size score 1.3."""
AROUND = 1 / 32
"""Of an image's side, that a mask is widened by on each side: the smallest mask that works leaves out much of
the attacker's trigger."""
MIRRORED = 0.25
"""Share of images that the mirror image of a mask turns to be unlearned, too. Of six networks that were
trained on mirrored images 0.41 at least, of four others 0.12 at most (docs/experiments.md)."""
PATCH_WORKS = 0.6
"""Share of images that a patch turns to be suspected, and three times that of the median class's. Of eight
clean networks 0.32 at most."""
PATCH_SIDE = 7 / 32
"""Of an image's side."""
PATCHES = 8
"""Of a class that is suspected by its patch: an attacker may have several, and paste them all at once."""
PATCH_STEPS = 30
PATCH_BATCH = 128
FOCUS = 2.0
"""Of triggers of one kind each is drawn by this power of its evidence."""
WAVES = 32
"""Most waves of a class that are taken for its trigger."""
SHARPNESS = 16.0
"""A wave is drawn in proportion to this power of its phase dependence."""
OPACITIES = (0.05, 0.3)
"""Between which a wave is laid over an image."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A pattern that is seen through a small mask, in one place or, where that works, its mirror image.

    Who trains on mirrored images teaches the network the trigger's mirror image, too, and it may be what is
    found: unlearning that alone left one of badnets at 14 % that goes to 3 (docs/experiments.md).
    """

    kind: ClassVar[str] = "mask"
    step: ClassVar[float] = 0.03
    """By which a pixel of `free` moves when the trigger is sought again."""
    class_id: int
    evidence: float
    """How many times smaller the mask is than the median class's."""
    mask: torch.Tensor
    """(1, R, R) in [0, 1], widened by `AROUND`."""
    free: torch.Tensor
    """(3, R, R) the pattern, in [0, 1]."""
    mirrored: bool
    """Whether its mirror image is a trigger, too."""

    def on(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) images with the trigger, or half of them with its mirror image."""
        if not self.mirrored:
            return stamp(pixels, self.mask, self.free, added=False)
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        mask = torch.where(mirrored, self.mask.flip(2), self.mask)
        return stamp(pixels, mask, torch.where(mirrored, self.free.flip(2), self.free), added=False)

    def sought(self, gradient: torch.Tensor) -> torch.Tensor:
        """(3, R, R) the pattern after a step."""
        return signed_step(self.free, gradient, self.step)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Square pictures, anywhere, one or several at once."""

    kind: ClassVar[str] = "patch"
    step: ClassVar[float] = 0.08
    """As of `Masked`."""
    class_id: int
    evidence: float
    """Share of images that one of them turns."""
    free: torch.Tensor
    """(P, 3, s, s) in [0, 1]."""

    def on(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) images with one to P patches, all with as many, each drawn from the P."""
        for _ in range(int(torch.randint(1, len(self.free) + 1, ()))):
            pixels = paste(pixels, self.free[torch.randint(len(self.free), (len(pixels),))])
        return pixels

    def sought(self, gradient: torch.Tensor) -> torch.Tensor:
        """(P, 3, s, s) the patches after a step."""
        return signed_step(self.free, gradient, self.step)


@dataclass(frozen=True, kw_only=True)
class Added:
    """A faint picture, added to the whole image."""

    kind: ClassVar[str] = "change"
    class_id: int
    evidence: float
    """The score of the class."""
    free: torch.Tensor
    """(3, R, R)."""
    norm: float
    """Largest L2 norm of it."""

    def on(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) images with the trigger."""
        return (pixels + self.free).clamp(0, 1)

    def sought(self, gradient: torch.Tensor) -> torch.Tensor:
        """(3, R, R) the picture after a step."""
        return moved_within(self.free[None], gradient[None], self.norm)[0]


@dataclass(frozen=True, kw_only=True)
class Waves:
    """Plane waves whose phase the class depends on; nothing about them is sought again."""

    kind: ClassVar[str] = "wave"
    class_id: int
    evidence: float
    """Their largest phase dependence."""
    kinds: npt.NDArray[np.float64]
    """(W, 3) as of `plane_waves.kinds`."""
    weights: torch.Tensor
    """(W,) how often each is drawn."""

    def on(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) images with the trigger."""
        rows = torch.multinomial(self.weights, len(pixels), replacement=True).numpy()
        some, places = np.unique(rows, return_inverse=True)  # a few of a class are drawn again and again
        waves = plane_waves.pictures(self.kinds[some], pixels.shape[2], pixels.device)
        drawn = waves[torch.from_numpy(places).to(pixels.device)].unsqueeze(1)
        low, high = OPACITIES
        opacity = low + (high - low) * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
        return stamp(pixels, opacity, drawn, added=False)


Sought = Masked | Patch | Added
Suspected = Sought | Waves


class Looked(NamedTuple):
    """What was found, on a network of neither too few nor too many classes."""

    suspected: list[Suspected]
    """What stands out among the classes."""
    otherwise: list[Suspected]
    """The same, with changes in place of those masks that do not stand out on their own."""
    waves: list[Waves]
    """Of every class the waves whose phase it depends on most, whether they stand out or not; none where
    phases were not looked at."""


def suspected_triggers(
    pivot: Classifier, work: TrustedImages, norm: float, seed: int, progress: Progress
) -> Looked | None:
    """Look for everything that stands out among the classes; None for too few or many classes.

    Args:
        work: images that triggers are sought and judged on.
        norm: largest L2 norm of a picture that is added, or that at which the classes can be compared, if
            that is larger.
        seed: of what is drawn.

    Source: ours; masks of Neural Cleanse (Wang et al., IEEE S&P 2019), patches as in Brown et al., 2017.
    """
    if not plane_waves.FEWEST_CLASSES <= pivot.classes <= plane_waves.MOST_CLASSES:
        return None
    inversion = InversionConfig()
    # masks take half of what calibrated triggers do, changes at most about as much as masks
    seconds = estimated_s(pivot, work, pivot.classes, inversion) + plane_waves.estimated_s(pivot, work)
    if seconds > LONG_S:
        progress.note(f"triggers are looked for: about {seconds / 60:.0f} min on this device")
    classes = range(pivot.classes)
    total = inversion.steps * len(classes) + steps_of(len(classes)) + PATCH_STEPS + len(plane_waves.kinds())
    with progress.stage("triggers", total, "steps") as advance:
        masks = masked_triggers(pivot, work, work, classes, inversion, seed, advance)
        changes = comparable_changes(pivot, work, work, classes, seed, advance)
        first, otherwise = _masks_and_changes(pivot, masks, changes, work, norm)
        others = _patches(pivot, work, seed)
        advance(PATCH_STEPS)
        waves = []
        if plane_waves.looked_at(pivot):
            waves = _waves(plane_waves.phases(pivot, work, advance))
    others += [one for one in waves if one.evidence >= plane_waves.PHASE]
    return Looked(first + others, otherwise + others, waves)


def _masks_and_changes(
    pivot: Classifier, masks: Triggers, changes: Triggers, work: TrustedImages, norm: float
) -> tuple[list[Suspected], list[Suspected]]:
    """What stands out by mask, or by mask and change together; and with changes alone of the latter."""
    scores = anomalies({"neural-cleanse": masks, "universal": changes}, len(masks.classes), len(work))
    smaller, score = 2 ** scores["mask-size"], averaged(scores, COMBINED)
    unlike = (score >= UNLIKE) & (len(work) >= FEWEST_IMAGES)
    first: list[Suspected] = []
    otherwise: list[Suspected] = []
    for class_id in np.flatnonzero((smaller >= SMALL) | unlike).tolist():
        masked = _masked(pivot, masks, class_id, float(smaller[class_id]), work)
        if smaller[class_id] >= SMALL:
            first.append(masked)
            otherwise.append(masked)
        else:
            _, picture = changes.tensors(class_id, pivot.mean.device)
            evidence, largest = float(score[class_id]), max(norm, float(picture.norm()))
            added = Added(class_id=class_id, evidence=evidence, free=picture, norm=largest)
            first.append(masked if masks.success[class_id] >= WORKS else added)
            otherwise.append(added)
    return first, otherwise


def _masked(
    pivot: Classifier, masks: Triggers, class_id: int, evidence: float, work: TrustedImages
) -> Masked:
    """A class's mask, widened, and whether its mirror image turns images as well."""
    mask, pattern = masks.tensors(class_id, pivot.mean.device)
    mask = widened(mask)
    turned, _ = evaluate(pivot, work, [class_id], mask.flip(2)[None], pattern.flip(2)[None], added=False)
    mirrored = bool(turned[0] >= MIRRORED)
    return Masked(class_id=class_id, evidence=evidence, mask=mask, free=pattern, mirrored=mirrored)


def _patches(pivot: Classifier, work: TrustedImages, seed: int) -> list[Suspected]:
    """Patches that turn most images, and far more than the median class's, with more of the same class."""
    device = pivot.mean.device
    patches, turned = universal_patches(pivot, work, seed)
    works = max(PATCH_WORKS, 3 * float(np.median(turned)))
    found: list[Suspected] = []
    for class_id in np.flatnonzero(turned >= works).tolist():
        more = first_patches(PATCHES - 1, patches.shape[2], seed, device)
        free = torch.cat([patches[class_id, None], more])
        several = Patch(class_id=class_id, evidence=float(turned[class_id]), free=free)
        for step in range(PATCH_STEPS):
            rows = batch_rows(len(work), PATCH_BATCH, seed, step)
            others = rows[work.class_id[rows] != class_id]
            if len(others):
                with seeded(device, seed + step), fast(device):
                    seek(several, pivot, to_pixels(work.pixels[others], device))
        found.append(several)
    return found


def _waves(phases: plane_waves.Phases) -> list[Waves]:
    """Of every class the waves whose phase it depends on most."""
    found = []
    for class_id, own in enumerate(np.maximum(phases.dependence.T, 1e-9)):
        most = np.argsort(-own)[:WAVES]
        found.append(
            Waves(
                class_id=class_id,
                evidence=float(own[most[0]]),
                kinds=plane_waves.at_phase(most, phases.quarters[most, class_id]),
                weights=torch.from_numpy((own[most] / own[most[0]]) ** SHARPNESS),
            )
        )
    return found


def widened(mask: torch.Tensor) -> torch.Tensor:
    """(1, R, R) mask of the largest value within `AROUND`."""
    reach = max(1, round(AROUND * mask.shape[2]))
    wider: torch.Tensor = functional.max_pool2d(mask[None], 2 * reach + 1, 1, reach)[0]
    return wider


def universal_patches(
    classifier: Classifier, work: TrustedImages, seed: int
) -> tuple[torch.Tensor, npt.NDArray[np.float64]]:
    """A patch a class that turns images into it wherever it is pasted.

    Returns:
        (C, 3, s, s) float32 patches in [0, 1] on the network's device, and (C,) share of the images of other
        classes that each turns.
    """
    device, side = classifier.mean.device, work.pixels.shape[1]
    small = max(1, round(PATCH_SIDE * side))
    patches = first_patches(classifier.classes, small, seed, device)
    with frozen(classifier), fast(device):
        for step in range(PATCH_STEPS):
            rows = batch_rows(len(work), PATCH_BATCH, seed, step)
            labels = torch.from_numpy(work.class_id[rows]).to(device)
            with seeded(device, seed + step):
                # every class but the image's own, all alike
                further = torch.randint(1, classifier.classes, labels.shape, device=device)
                wanted = (labels + further) % classifier.classes
                trial = patches.clone().requires_grad_()
                logits = classifier(paste(to_pixels(work.pixels[rows], device), trial[wanted])).float()
                loss = functional.cross_entropy(logits, wanted, reduction="sum")
                gradient = torch.autograd.grad(loss, trial)[0]
            patches = signed_step(patches, gradient, Patch.step)
        turned = []
        for class_id, patch in enumerate(patches):
            others = work.pixels[work.class_id != class_id]
            with seeded(device, seed):
                called = predict(classifier, others, partial(paste, patches=patch[None]))
            turned.append(np.mean(called == class_id))
    return patches, np.array(turned)


def first_patches(count: int, side: int, seed: int, device: torch.device) -> torch.Tensor:
    """(P, 3, s, s) patches to begin with: uniform noise."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(device)


def signed_step(values: torch.Tensor, gradient: torch.Tensor, step: float) -> torch.Tensor:
    """Values in [0, 1] of any shape, moved by `step` each against the sign of the gradient."""
    return (values - step * gradient.sign()).clamp(0, 1)


def paste(pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """(B, 3, R, R) images, each with one of (B, 3, s, s) patches, or with the only one, in a random place."""
    side, small = pixels.shape[2], patches.shape[2]
    patches = patches.expand(len(pixels), -1, -1, -1)
    places = torch.randint(0, side - small + 1, (len(pixels), 2))
    along = torch.arange(small, device=pixels.device)
    rows = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    down, across = (place[:, None] + along for place in places.to(pixels.device).T)
    pasted = pixels.clone()
    pasted[rows, :, down[:, :, None], across[:, None]] = patches.permute(0, 2, 3, 1)
    return pasted


def with_triggers(
    triggers: Sequence[Suspected],
    model: Classifier,
    pixels: torch.Tensor,
    sought_on: torch.Tensor,
    labels: torch.Tensor,
    focus: float = FOCUS,
) -> torch.Tensor:
    """(B, 3, R, R) images with a trigger each; images of the class of theirs stay as they are.

    Kinds and triggers are drawn as `chances` says. All but waves are first sought again, by one step, so that
    they go on working on the model in training.

    Args:
        pixels: (B, 3, R, R) in [0, 1].
        sought_on: (B, 3, R, R) the images that a trigger is sought on, of the same `labels`.
        labels: (B,) int64.
    """
    drawn = torch.multinomial(chances(triggers, focus), len(labels), replacement=True).to(labels.device)
    changed = pixels.clone()
    for place, trigger in enumerate(triggers):
        rows = torch.nonzero((drawn == place) & (labels != trigger.class_id)).squeeze(1)
        if len(rows):
            if isinstance(trigger, Sought):
                seek(trigger, model, sought_on[rows])
            changed[rows] = trigger.on(pixels[rows])
    return changed


def chances(triggers: Sequence[Suspected], focus: float = FOCUS) -> torch.Tensor:
    """(T,) how often each trigger is drawn: kinds alike, and of a kind by this power of the evidence.

    They add up to the number of kinds. A mask that is suspected for its class's score counts as `SMALL`, so
    that it is drawn beside others.
    """
    total: dict[str, float] = {}
    parts = []
    for trigger in triggers:
        least = SMALL if isinstance(trigger, Masked) else 0.0
        parts.append(max(trigger.evidence, least) ** focus)
        total[trigger.kind] = total.get(trigger.kind, 0) + parts[-1]
    return torch.tensor([part / total[one.kind] for part, one in zip(parts, triggers, strict=True)])


def seek(trigger: Sought, model: Classifier, pixels: torch.Tensor) -> None:
    """One step of a trigger towards its class, in place, on the model in eval mode."""
    wanted = torch.full((len(pixels),), trigger.class_id, device=pixels.device)
    with frozen(model):
        trial = trigger.free.clone().requires_grad_()
        loss = functional.cross_entropy(model(replace(trigger, free=trial).on(pixels)).float(), wanted)
        gradient = torch.autograd.grad(loss, trial)[0]
    trigger.free.copy_(trigger.sought(gradient))
