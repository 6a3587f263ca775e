"""Pivotal Unlearning: the pivot's own answers, kept under triggers that turn images into one class.

Our answer to where Pivotal Tuning falls short on small networks; see `start` for what differs and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.suspected_triggers import (
    Added,
    Masked,
    Sought,
    Suspected,
    Waves,
    suspected_triggers,
    with_triggers,
)
from sanitize.checkpoints.trigger_inversion import evaluate
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.checkpoints.tuning import Loss, Schedule, Started, batch_rows
from sanitize.checkpoints.universal_changes import draw_others, first_changes, search
from sanitize.dynamics.proxy import seeded
from sanitize.progress import Progress
from sanitize.scores.network import fast

Put = Callable[[Classifier, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(model in training, (B, 3, R, R) images, as many to seek triggers on, (B,) labels) -> the images with a
trigger each."""
LARGEST_PATCH = 0.6
"""Of an image's area."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=200, learning_rate=0.005, decay=True))
    clean_weight: float = 2.0
    """Of the pivot's answers on images without a change."""
    changed_weight: float = 2.0
    """Of the same answers, given with a trigger on."""
    radius: float = 0.0217
    """Root mean square of a universal change over its pixels and channels, of values in [0, 1]; one that a
    class is suspected by may be larger."""
    search_steps: int = 20
    """Steps that universal changes are sought for before the tuning begins."""
    focus: float = 4.0
    """Classes are drawn by this power of how often their universal change works on the pivot."""
    shift: int = 2
    """Most pixels that an image is moved by; half of them are mirrored, too."""
    patched_ratio: float = 0.5
    """Share of the images that get a patch of another one."""
    waves_ratio: float = 1 / 3
    """Share of the images that get a wave in place of a universal change, of those that get either."""
    waves_focus: float = 8.0
    """Classes of these waves are drawn by this power of their phase dependence."""
    beside_ratio: float = 1 / 3
    """Share of the images that get a universal change or a wave of a class that is not suspected, where
    others are: another backdoor may not stand out beside one that does."""


FEW = Settings(schedule=Schedule(steps=200, learning_rate=0.0025, batch=192, decay=True))
"""For fewer than 256 images: half the rate and larger steps. With 150 images that spared a point of accuracy
or two, with 380 success paid for it (docs/experiments.md)."""
LARGE = Settings(schedule=Schedule(steps=2_000, learning_rate=5e-4, decay=True, measure_every=200))
"""For 1,000 classes; not measured."""


def start(
    classifier: Classifier, work: TrustedImages, settings: Settings, seed: int, progress: Progress
) -> Started:
    """Give the pivot's answers on clean images, and the same ones with a trigger on.

    Triggers that stand out among the classes (`suspected_triggers`) are unlearned. For a class that does, but
    not by its mask alone, there are two ways: with its mask, and with its universal change. Where no class
    does, and third where nothing but such classes do, it is a universal change a class, of a small fixed
    norm, drawn the more often the more images it turns on the pivot, and the waves whose phase each class
    depends on most. A third of the images get these, of classes that are not suspected, where others are:
    one backdoor is easily found, and another beside it is not. All but waves are sought again all along on
    the model in training. Half of the images have a patch of another one pasted in, and the pivot is asked
    what it calls that: a few hundred images are soon known by heart, their mixtures are not. Networks run in
    bfloat16 where the processor multiplies it faster, which takes half the time.

    Why it differs from Pivotal Tuning, measured in docs/experiments.md: on networks of 0.3 million parameters
    hard labels of a few hundred images cost four points of accuracy within 50 steps, so the pivot's own
    answers, on moved and mirrored images, take the place of cross-entropy; and latent orthogonalisation moves
    all classes to be rid of one, so what is unlearned is sought for.

    Source: ours. Unlearning a rebuilt trigger as in Wang et al., IEEE S&P 2019; universal changes as in Zeng
    et al., ICLR 2022 (I-BAU); answers of the original network as in Hinton et al., 2015; patches as in Yun et
    al., ICCV 2019 (CutMix).
    """
    pivot = classifier.clone().requires_grad_(False)
    side = work.pixels.shape[1]
    norm = settings.radius * (3 * side * side) ** 0.5
    looked = suspected_triggers(pivot, work, norm, seed, progress)

    changes, success = universal_changes(pivot, work, norm, settings, seed)
    waves = looked.waves if looked else []

    def of_all_classes() -> Started:
        own = changes.clone()
        put = changes_and_waves(own, success, waves, norm, settings)
        facts: dict[str, Any] = {"suspected_triggers": None if looked is None else []}
        return Started(classifier.clone(), unlearn(pivot, put, settings), [own], facts)

    def started(triggers: Sequence[Suspected]) -> Started:
        triggers = [
            replace(one, free=one.free.clone()) if isinstance(one, Sought) else one for one in triggers
        ]
        sought = [one.free for one in triggers if isinstance(one, Sought)]
        own = changes.clone()
        suspected = sorted({one.class_id for one in triggers})
        of_others = success.index_fill(0, torch.tensor(suspected, device=success.device), 0.0)
        waves_of_others = [wave for wave in waves if wave.class_id not in suspected]
        others = changes_and_waves(own, of_others, waves_of_others, norm, settings)
        put = one_or_the_other(partial(with_triggers, triggers), others, settings.beside_ratio)
        loss = unlearn(pivot, put, settings)
        named = [
            {"kind": one.kind, "class": classifier.label(one.class_id), "evidence": one.evidence}
            for one in triggers
        ]
        facts = {"suspected_triggers": named}
        return Started(classifier.clone(), loss, [*sought, own], facts, found_of(triggers))

    if looked is None or not looked.suspected:
        return of_all_classes()
    first, others = started(looked.suspected), looked.otherwise

    def otherwise() -> Started:
        third = of_all_classes if all(isinstance(one, Added) for one in others) else None
        return started(others)._replace(otherwise=third)

    return first if found_of(others) == first.found else first._replace(otherwise=otherwise)


def found_of(triggers: Sequence[Suspected]) -> list[tuple[str, int, bool]]:
    """What an interrupted run has to find again: kind and class of each, and whether it is mirrored."""
    return [(one.kind, one.class_id, isinstance(one, Masked) and one.mirrored) for one in triggers]


def unlearn(pivot: Classifier, put: Put, settings: Settings) -> Loss:
    """The loss of giving the pivot's answers on clean images, and the same with what `put` puts on them."""
    device = pivot.mean.device

    def loss(model: Classifier, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        moved = augment(pixels, settings.shift)
        mixed = with_patches(moved, settings.patched_ratio)
        with fast(device):
            changed = put(model, mixed, moved, labels)
            with torch.no_grad():
                answers = pivot(mixed).float().softmax(1)
            # one pass for both, so that batch norm sees what it will see at either
            clean, under_change = model(torch.cat([mixed, changed])).float().log_softmax(1).chunk(2)
        return settings.clean_weight * functional.kl_div(
            clean, answers, reduction="batchmean"
        ) + settings.changed_weight * functional.kl_div(under_change, answers, reduction="batchmean")

    return loss


def one_or_the_other(often: Put, seldom: Put, ratio: float) -> Put:
    """Each image gets what `seldom` puts on it with a chance of `ratio`, and else what `often` does."""

    def put(
        model: Classifier, pixels: torch.Tensor, sought_on: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        second = torch.rand(len(pixels)) < ratio
        changed = pixels.clone()
        for lay, rows in ((often, ~second), (seldom, second)):
            if rows.any():
                place = torch.nonzero(rows).squeeze(1).to(pixels.device)
                changed[place] = lay(model, pixels[place], sought_on[place], labels[place])
        return changed

    return put


def universal_changes(
    pivot: Classifier, work: TrustedImages, norm: float, settings: Settings, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, 3, R, R) a change a class, sought on the pivot, and (C,) share of the images that each turns."""
    device = pivot.mean.device
    classes = torch.arange(pivot.classes, device=device)
    changes = first_changes(pivot.classes, work.pixels.shape[1], seed, device)
    uniform = torch.ones(pivot.classes, device=device)
    for step in range(settings.search_steps):
        rows = batch_rows(len(work), settings.schedule.batch, seed, step)
        labels = torch.from_numpy(work.class_id[rows]).to(device)
        with seeded(device, seed + step):
            search(pivot, changes, classes, to_pixels(work.pixels[rows], device), labels, uniform, norm)
    no_mask = torch.zeros_like(changes[:, :1])
    success, _ = evaluate(pivot, work, range(pivot.classes), no_mask, changes, added=True)
    return changes, torch.from_numpy(success).to(device).nan_to_num()


def changes_and_waves(
    changes: torch.Tensor,
    success: torch.Tensor,
    waves: Sequence[Waves],
    norm: float,
    settings: Settings,
) -> Put:
    """A change on most images, sought again, and a wave on the others, drawn by success and evidence."""
    classes = torch.arange(len(changes), device=changes.device)
    chances = success.pow(settings.focus) + 1e-6

    def put(
        model: Classifier, pixels: torch.Tensor, sought_on: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        search(model, changes, classes, sought_on, labels, chances, norm)
        changed = (pixels + changes[draw_others(labels, classes, chances)]).clamp(0, 1)
        if not waves:
            return changed
        waved = torch.rand(len(pixels), 1, 1, 1, device=changes.device) < settings.waves_ratio
        laid = with_triggers(waves, model, pixels, sought_on, labels, settings.waves_focus)
        return torch.where(waved, laid, changed)

    return put


def augment(pixels: torch.Tensor, shift: int) -> torch.Tensor:
    """Half of the images mirrored, and each moved by up to `shift` pixels over its mirrored border."""
    flip = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    padded = functional.pad(torch.where(flip, pixels.flip(3), pixels), (shift,) * 4, mode="reflect")
    side = pixels.shape[2]
    moves = torch.randint(0, 2 * shift + 1, (len(pixels), 2)).tolist()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, moves, strict=True)])


def with_patches(pixels: torch.Tensor, ratio: float) -> torch.Tensor:
    """(B, 3, R, R) images, a share of them with a square of another one in the same place.

    A square covers up to `LARGEST_PATCH` of an image, all areas alike.
    """
    count, side = len(pixels), pixels.shape[2]
    size = (LARGEST_PATCH * torch.rand(count, 1) * (torch.rand(count, 1) < ratio)).sqrt() * side
    first = torch.rand(count, 2) * (side - size)
    along = torch.arange(side)
    inside = (along >= first[:, :, None]) & (along < (first + size)[:, :, None])
    square = (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1).to(pixels.device)
    return torch.where(square, pixels[torch.randperm(count)], pixels)
