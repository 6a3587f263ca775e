"""Cheap evidence of a backdoor, without images: the rows of the head, and the largest margin of each class.

Both rest on comparing the classes of one model with each other, so they see a backdoor with one target, and
say little about a head of few classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trigger_inversion import Advance, frozen, pixels_at_once, timed_step
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.scores.network import fast

Scores = npt.NDArray[np.float64]

MARGIN_STARTS = 16
"""Random inputs a class; the largest margin that any of them reaches counts."""
MARGIN_STEPS = 60
MARGIN_RATE = 0.05


def robust_z(values: npt.NDArray[np.floating]) -> Scores:
    """How far each value is above the median, in median absolute deviations times 1.4826.

    Args:
        values: (C,), NaN where not measured, which stays NaN.

    Returns:
        (C,) higher = more unusual. The spread is taken as no less than 1 % of the largest value, so that
        rounding among equal classes is no anomaly.
    """
    found = np.asarray(values, np.float64)
    apart = found - np.nanmedian(found)
    floor = 0.01 * float(np.nanmax(np.abs(found)))
    spread = max(1.4826 * float(np.nanmedian(np.abs(apart))), floor, 1e-30)
    scores: Scores = apart / spread
    return scores


def head_indicators(classifier: Classifier) -> dict[str, Scores]:
    """What is looked at in the rows w_c of the head, with w the mean row taken off.

    Returns:
        (C,) of each: ``norm`` ‖w_c‖, ``sum`` of w_c (features after a ReLU are positive), ``alignment`` −mean
        cosine with the other rows, and ``bias``.
    """
    weight = classifier.head.weight.detach().double().cpu()
    centred = weight - weight.mean(0)
    direction = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine = direction @ direction.T
    count = len(weight)
    found = {
        "norm": centred.norm(dim=1),
        "sum": centred.sum(1),
        "alignment": -(cosine.sum(1) - 1) / max(count - 1, 1),
    }
    if classifier.head.bias is not None:
        found["bias"] = classifier.head.bias.detach().double().cpu()
    return {name: values.numpy() for name, values in found.items()}


def largest_margins(classifier: Classifier, seed: int, advance: Advance = lambda classes: None) -> Scores:
    """The largest margin of each class over the others that gradient ascent from random inputs finds.

    Args:
        seed: of the random inputs.
        advance: told how many classes are done.

    Returns:
        (C,) in logits: max over x in [0, 1] of logit_c(x) − max over k ≠ c of logit_k(x).

    Source: Wang et al., MM-BD, IEEE S&P 2024, arXiv 2205.06900. Where we differ: Adam, fewer and shorter
    climbs, all classes together; the anomaly is a robust z instead of a p-value under a fitted distribution.
    """
    side = classifier.resolution
    at_once = max(1, pixels_at_once(classifier, any_images(side)) // (MARGIN_STARTS * side * side))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(MARGIN_STARTS, 3, side, side, generator=generator)
    found = np.empty(classifier.classes)
    for first in range(0, classifier.classes, at_once):
        classes = torch.arange(first, min(first + at_once, classifier.classes))
        found[first : first + len(classes)] = _climb(classifier, classes, starts)
        advance(len(classes))
    return found


def any_images(side: int) -> TrustedImages:
    """One grey image, to time a step and see what it takes."""
    return TrustedImages(pixels=np.full((1, side, side, 3), 127, np.uint8), class_id=np.zeros(1, np.int64))


def margins_s(classifier: Classifier) -> float:
    """Seconds that the largest margins of all classes will take, from one timed step."""
    step_s = timed_step(classifier, any_images(classifier.resolution), MARGIN_STARTS)
    return MARGIN_STEPS * classifier.classes * step_s


def _climb(classifier: Classifier, classes: torch.Tensor, starts: torch.Tensor) -> Scores:
    device = classifier.mean.device
    wanted = classes.to(device).repeat_interleave(len(starts))
    inputs = starts.repeat(len(classes), 1, 1, 1).to(device).requires_grad_()
    optimizer = torch.optim.Adam([inputs], MARGIN_RATE)
    own = torch.nn.functional.one_hot(wanted, classifier.classes).bool()
    best = torch.full((len(inputs),), -torch.inf, device=device)
    with frozen(classifier), fast(device):
        for _ in range(MARGIN_STEPS):
            logits = classifier(inputs).float()
            margin = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
            best = torch.maximum(best, margin.detach())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(-margin.sum())
            optimizer.step()
            with torch.no_grad():
                inputs.clamp_(0, 1)
    scores: Scores = best.view(len(classes), -1).amax(1).double().cpu().numpy()
    return scores
