"""Universal changes: one small picture a class that, added to many images, turns them into the class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trigger_inversion import (
    Advance,
    Triggers,
    evaluate,
    frozen,
    pixels_at_once,
    triggers_of,
)
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.checkpoints.tuning import batch_rows
from sanitize.dynamics.proxy import seeded
from sanitize.scores.network import fast

BATCH = 128
STEPS_A_CLASS = 3
"""At each norm there are so many steps times the number of classes; a step looks at `BATCH` images, each with
the change of one class, so that a class's change sees some 400 images whatever their number."""
NORMS = tuple(0.3 * 2 ** (step / 2) for step in range(13))
"""L2 norms that are tried one after the other, at 32 px; they grow with the side of the image."""
COMMON_SUCCESS = 0.4
"""The first norm counts at which the median class's change works on this share of the images."""
JUDGED_ON = 512
"""Most images to optimise on that a norm is judged by."""


def comparable_changes(
    classifier: Classifier,
    work: TrustedImages,
    held_out: TrustedImages,
    classes: Sequence[int],
    seed: int,
    advance: Advance = lambda steps: None,
) -> Triggers:
    """A change a class, all of the first of `NORMS` at which the median class's works on 40 % of `work`.

    Every class of every network has such changes. That of a backdoor's class works on far more images at the
    norm at which the others begin to work, whatever norm that is for the network at hand. If none is large
    enough the last one counts, and if the first is too large, the first. Not measured for more than ten
    classes, or other networks than `small`.

    Args:
        work: images to optimise on.
        held_out: images that success is measured on.
        classes: (K,) outputs of the head, two or more.
        seed: of the first changes, batches and draws.
        advance: told how many of `steps_of(K)` steps are done; the ones not needed are told at the end.

    Returns:
        Added triggers, with no mask.

    Source: ours; universal changes as in Moosavi-Dezfooli et al., CVPR 2017.
    """
    device = classifier.mean.device
    side = work.pixels.shape[1]
    chosen = torch.as_tensor(np.asarray(classes, np.int64), device=device)
    changes = first_changes(len(chosen), side, seed, device)
    uniform = torch.ones(len(chosen), device=device)
    at_once = max(1, min(BATCH, pixels_at_once(classifier, work) // side**2))
    no_mask = torch.zeros(len(chosen), 1, side, side, device=device)
    judged = work.evenly(JUDGED_ON)
    step = 0
    with frozen(classifier), fast(device):
        for norm in NORMS:
            changes *= NORMS[1] / NORMS[0]
            for _ in range(STEPS_A_CLASS * len(chosen)):
                rows = batch_rows(len(work), BATCH, seed, step)
                labels = torch.from_numpy(work.class_id[rows]).to(device)
                pixels = to_pixels(work.pixels[rows], device)
                with seeded(device, seed + step):
                    search(classifier, changes, chosen, pixels, labels, uniform, norm * side / 32, at_once)
                step += 1
                advance(1)
            success, _ = evaluate(classifier, judged, classes, no_mask, changes, added=True)
            if np.nanmedian(success) >= COMMON_SUCCESS:
                break
    advance(steps_of(len(chosen)) - step)
    success, _ = evaluate(classifier, held_out, classes, no_mask, changes, added=True)
    return triggers_of(classes, no_mask, changes, success)


def steps_of(classes: int) -> int:
    """Most steps that changes for so many classes take."""
    return STEPS_A_CLASS * classes * len(NORMS)


def first_changes(count: int, side: int, seed: int, device: torch.device) -> torch.Tensor:
    """(K, 3, R, R) changes to begin with: noise, which the first step cuts to its norm."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, side, side, generator=generator) * 0.01).to(device)


def search(
    model: Classifier,
    changes: torch.Tensor,
    classes: torch.Tensor,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    chances: torch.Tensor,
    norm: float,
    at_once: int = BATCH,
) -> None:
    """One step of each change towards its class, a sixth of `norm` long; in place, on the model in eval mode.

    Args:
        changes: (K, 3, R, R), kept to an L2 norm of at most `norm` each.
        classes: (K,) int64, their classes.
        pixels: (B, 3, R, R) in [0, 1]; each gets the change of one class that is not its own.
        labels: (B,) int64.
        chances: (K,) how often a change is drawn.
        at_once: images that go through the network together, which changes nothing but the memory.
    """
    training = model.training
    model.eval()
    drawn = draw_others(labels, classes, chances)
    places, own = torch.unique(drawn, return_inverse=True)
    trial = changes[places].requires_grad_()
    gradient = torch.zeros_like(trial)
    for part in torch.split(torch.arange(len(pixels), device=pixels.device), at_once):
        called = model((pixels[part] + trial[own[part]]).clamp(0, 1)).float()
        loss = functional.cross_entropy(called, classes[drawn[part]], reduction="sum")
        gradient += torch.autograd.grad(loss, trial)[0]
    changes[places] = moved_within(trial.detach(), gradient, norm)
    model.train(training)


def moved_within(changes: torch.Tensor, gradient: torch.Tensor, norm: float) -> torch.Tensor:
    """(K, 3, R, R) changes a sixth of `norm` further down, kept to an L2 norm of at most `norm` each."""
    moved = changes - norm / 6 * gradient / _norms(gradient)
    return moved * (norm / _norms(moved)).clamp(max=1)


def draw_others(labels: torch.Tensor, classes: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """(B,) for each image the place in the (K,) `classes` of one that is not its own, drawn by `chances`."""
    return torch.multinomial(chances * (labels.unsqueeze(1) != classes), 1).squeeze(1)


def _norms(images: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = images.flatten(1).norm(dim=1)
    return norms.clamp(min=1e-12).view(-1, 1, 1, 1)
