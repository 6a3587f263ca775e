"""Plane waves over the whole image: by their phase, and next to what reference networks call them.

Every network takes some wave for some class: texture is a feature. Networks that learned the same classes
agree in which, so a wave that means a class to one of them alone is no texture of the class. And texture is
the same wherever it begins, so a class that depends on the phase of a wave was taught that wave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trigger_inversion import (
    Advance,
    Triggers,
    evaluate,
    frozen,
    timed_step,
    triggers_of,
)
from sanitize.checkpoints.trusted import TrustedImages, images_at_once, to_pixels
from sanitize.scores.network import fast

Answers = npt.NDArray[np.float64]

OPACITY = 0.15
"""Of a wave, from black to white, over an image."""
FASTEST = 14
"""Most periods down or across an image."""
PHASES = 4
"""Of each wave, a quarter of a period apart: a network that was taught a wave knows it by its phase, too."""
IMAGES = 64
"""Trusted images that each wave is laid over."""
FAINT = 0.075
"""Opacity at which the phases of a wave are told apart: no picture is drowned in it."""
BROAD = 3
"""Waves of fewer periods than this say by their phase which part of an image is dark: that is no secret."""
FEATURE_GRIDS = (4, 7)
"""Sides of the last grid of features of usual networks, or divisors of them. A wave of a multiple of that
many periods down and across looks alike from each of its cells, and any network tells its phases apart."""
PHASE = 7.0
"""From which dependence on the phase on a class is suspected. Of 15 clean small networks 6.2 at most,
of a clean one of three strided convolutions 6.7."""
LARGEST = 4.0
"""The median class's largest dependence, in root mean squares; 3.3 to 4.2 in small networks."""
LEAST = 0.12
"""Root mean square of the amplitudes in standard deviations between waves; 0.12 to 0.18 in small networks."""
FEWEST_CLASSES, MOST_CLASSES = 5, 100
"""Below the first "unlike the other classes" means little; above the second it was not looked at."""
SPREAD = 0.1
"""Of shares: references that agree by chance make no outlier of the model."""


def kinds() -> npt.NDArray[np.int64]:
    """(W, 3) periods down and across, and phase in quarters; of a direction and its reverse only one."""
    found = np.mgrid[0 : FASTEST + 1, -FASTEST : FASTEST + 1, 0:PHASES].reshape(3, -1).T
    kept: npt.NDArray[np.int64] = found[(found[:, 0] > 0) | (found[:, 1] > 0)]
    return kept


def wave(kind: npt.ArrayLike, side: int) -> npt.NDArray[np.float32]:
    """(R, R) a cosine from 0 to 1, 0 in the top left corner at phase 0; phases need not be whole quarters."""
    down, across, quarter = np.asarray(kind)
    rows, columns = np.mgrid[:side, :side] / side
    return np.asarray(
        0.5 - 0.5 * np.cos(2 * np.pi * (down * rows + across * columns - quarter / PHASES)), np.float32
    )


def pictures(kinds: npt.ArrayLike, side: int, device: torch.device) -> torch.Tensor:
    """(K, R, R) float32, the `wave` of each of (K, 3) kinds."""
    return torch.from_numpy(np.stack([wave(kind, side) for kind in np.asarray(kinds)])).to(device)


def answers(classifier: Classifier, work: TrustedImages, advance: Advance = lambda steps: None) -> Answers:
    """(W, C) share of images that a network calls each class, with each of the waves on.

    Shares, not probabilities: these grow with the scale of the logits, which whoever trained it may choose.

    Args:
        work: up to `IMAGES` of them, evenly spaced, are taken.
        advance: told how many of the waves are done.
    """

    def shares(logits: torch.Tensor) -> torch.Tensor:
        return functional.one_hot(logits.argmax(2), classifier.classes).double().mean(1)

    return _laid(classifier, work, OPACITY, shares, advance)


class Phases(NamedTuple):
    """What the classes make of where a wave begins, for each direction and number of periods."""

    dependence: Answers
    """(W / 4, C) amplitude of a class over the phases, next to those of the other waves and classes; 0 for
    waves that nothing is learned from."""
    quarters: Answers
    """(W / 4, C) the phase at which the class's logit is largest, 0 to 4."""


def phases(classifier: Classifier, work: TrustedImages, advance: Advance = lambda steps: None) -> Phases:
    """How much each class depends on where a wave begins: its mean logit less that of all classes, by phase.

    The unit is the root mean square of the amplitudes of all waves and classes. Where the median class's
    largest is more than `LARGEST` of these, most classes depend on places, and the unit is a part of that.
    Where it is less than `LEAST` of the spread between waves, nothing depends on places, and it is that.

    Args:
        work: up to `IMAGES` of them, evenly spaced, are taken.
        advance: told how many of the waves are done.

    Source: ours.
    """

    def means(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return (logits - logits.mean(2, keepdim=True)).mean(1).double()

    told = tells_by_phase(kinds()[::PHASES])
    by_phase = _laid(classifier, work, FAINT, means, advance).reshape(-1, PHASES, classifier.classes)
    first_harmonic = np.fft.fft(by_phase, axis=1)[:, 1] * 2 / PHASES
    amplitude = np.abs(first_harmonic) * told[:, None]
    usual = max(
        np.sqrt(np.square(amplitude[told]).mean()),
        np.median(amplitude.max(axis=0)) / LARGEST,
        LEAST * by_phase.mean(axis=1)[told].std(axis=0).mean(),
    )
    quarters = np.mod(-np.angle(first_harmonic) * PHASES / (2 * np.pi), PHASES)
    return Phases(amplitude / (usual + 1e-12), quarters)


def at_phase(rows: npt.NDArray[np.intp], quarters: Answers) -> npt.NDArray[np.float64]:
    """(K, 3) as of `kinds`: the waves of (K,) rows of `Phases`, in (K,) phases."""
    chosen = kinds()[::PHASES][rows].astype(np.float64)
    chosen[:, 2] = quarters
    return chosen


def looked_at(classifier: Classifier) -> bool:
    """Whether `phases` says anything about a network of so many classes and pixels."""
    return FEWEST_CLASSES <= classifier.classes <= MOST_CLASSES and classifier.resolution >= 2 * FASTEST


def tells_by_phase(directions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(W,) for which of (W, 3) `kinds` a network that depends on the phase has learned something odd."""
    periods = directions[:, :2]
    aliased = np.any([(periods % side == 0).all(axis=1) for side in FEATURE_GRIDS], axis=0)
    told: npt.NDArray[np.bool_] = (np.hypot(*periods.T) >= BROAD) & ~aliased
    return told


def _laid(
    classifier: Classifier,
    work: TrustedImages,
    opacity: float,
    of: Callable[[torch.Tensor], torch.Tensor],
    advance: Advance,
) -> Answers:
    """(W, C) `of` the (w, N, C) logits of images with waves laid over them, some waves at a time."""
    device = classifier.mean.device
    pixels = to_pixels(work.evenly(IMAGES).pixels, device)
    side = pixels.shape[2]
    at_once = images_at_once(device, side)
    together = max(1, at_once // len(pixels))
    found = []
    with torch.inference_mode(), frozen(classifier), fast(device):
        for part in np.array_split(kinds(), -(-len(kinds()) // together)):
            waves = pictures(part, side, device)
            laid = (1 - opacity) * pixels[None] + opacity * waves[:, None, None]
            logits = torch.cat([classifier(some) for some in torch.split(laid.flatten(0, 1), at_once)])
            found.append(of(logits.view(len(part), len(pixels), -1)).cpu().numpy())
            advance(len(part))
    return np.concatenate(found)


def estimated_s(classifier: Classifier, work: TrustedImages) -> float:
    """Seconds that `answers` or `phases` takes, from one timed step; forward is a third of both ways."""
    device, side = classifier.mean.device, work.pixels.shape[1]
    timed = min(IMAGES, len(work), images_at_once(device, side))
    return len(kinds()) * min(IMAGES, len(work)) / timed / 3 * timed_step(classifier, work, timed)


def unlike_the_references(
    own: Answers, references: Sequence[Answers]
) -> tuple[Answers, npt.NDArray[np.intp]]:
    """How much more often than the references the model calls images a class, for the wave where it is most.

    Args:
        own: (W, C) `answers` of the model.
        references: (W, C) those of each reference network, two or more.

    Returns:
        (C,) the largest difference to their mean, in standard deviations between them plus `SPREAD`, and (C,)
        the row of its wave.

    Source: ours.
    """
    spread = np.std(references, axis=0, ddof=1) + SPREAD
    apart = (own - np.mean(references, axis=0)) / spread
    return apart.max(axis=0), apart.argmax(axis=0)


def as_triggers(
    classifier: Classifier, held_out: TrustedImages, classes: Sequence[int], kinds: npt.ArrayLike
) -> Triggers:
    """The wave of each class as a trigger: a pattern under a mask that is `OPACITY` everywhere.

    Args:
        classes: (K,) outputs of the head.
        kinds: (C, 3) as of `kinds`, of every class of the head; phases need not be whole quarters.
    """
    device, side = classifier.mean.device, held_out.pixels.shape[1]
    waves = pictures(np.asarray(kinds)[list(classes)], side, device)
    pattern = waves[:, None].expand(-1, 3, -1, -1)
    mask = torch.full_like(pattern[:, :1], OPACITY)
    success, _ = evaluate(classifier, held_out, classes, mask, pattern, added=False)
    return triggers_of(classes, mask, pattern, success)
