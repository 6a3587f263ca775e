"""Triggers rebuilt from a model: Calibrated Trigger Inversion and Neural Cleanse, many classes at once.

Both look, class by class, for one change that turns any image into the class. Every model has such changes;
a backdoor's is unusually good for its size. Neural Cleanse compares the sizes of masks between classes,
Calibrated Trigger Inversion looks only for changes that a repaired copy of the model does not fall for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import CPU_PIXELS, TrustedImages, images_at_once, to_pixels
from sanitize.scores.network import fast
from sanitize.scores.neural_cleanse import rebuild

Advance = Callable[[int], None]

WORKS = 0.5
"""Share of held-out images that a mask has to turn to count by its size."""
LONG_S = 60.0
"""From this many seconds on, the cost is stated beforehand."""
GPU_SHARE = 0.6
"""Of the free memory of a CUDA device."""


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """How triggers are sought."""

    steps: int = 150
    """Steps of Adam a class."""
    batch: int = 32
    """Trusted images a step and class; all that there are, if there are fewer."""
    learning_rate: float = 0.03
    """Of a trigger in [-1, 1]."""
    radius: float = 2.5
    """Largest L2 norm of an added trigger at 32 px; it grows with the side of the image."""


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """One trigger a class, and how well it works on held-out trusted images that are not of the class."""

    classes: npt.NDArray[np.int64]
    """(K,) which classes."""
    mask: npt.NDArray[np.float32]
    """(K, R, R, 1) in [0, 1]: 1 puts the pattern in the pixel's place. All 0 for an added trigger."""
    pattern: npt.NDArray[np.float32]
    """(K, R, R, 3): colours in [0, 1] under a mask, or what is added, in [-1, 1]."""
    success: npt.NDArray[np.float32]
    """(K,) share of images that the model calls the class with the trigger on."""
    repaired_success: npt.NDArray[np.float32] | None = None
    """(K,) the same for the repaired copy."""
    repaired_kept: npt.NDArray[np.float32] | None = None
    """(K,) share of images whose class the repaired copy still gets right with the trigger on."""

    def tensors(self, place: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, R, R) mask and (3, R, R) pattern of one of them, as `stamp` takes them."""
        mask, pattern = (
            torch.from_numpy(images[place]).permute(2, 0, 1).contiguous().to(device)
            for images in (self.mask, self.pattern)
        )
        return mask, pattern


def stamp(pixels: torch.Tensor, mask: torch.Tensor, pattern: torch.Tensor, added: bool) -> torch.Tensor:
    """Put a trigger on images.

    Args:
        pixels: (B, 3, R, R) in [0, 1].
        mask: broadcasts against them.
        pattern: likewise.
        added: whether the pattern is added and clamped, or replaces what the mask covers.
    """
    return (pixels + pattern).clamp(0, 1) if added else pixels * (1 - mask) + mask * pattern


def calibrated_triggers(
    pivot: Classifier,
    repaired: Classifier,
    work: TrustedImages,
    held_out: TrustedImages,
    classes: Sequence[int],
    config: InversionConfig,
    seed: int,
    advance: Advance = lambda steps: None,
) -> Triggers:
    """A trigger a class that works on the model and not on its repaired copy.

    Minimises CE(pivot(x ⊕ T), c) + CE(repaired(x ⊕ T), y) over T of an image's shape, x ⊕ T = clamp(x + T).

    Args:
        pivot: the model as it is.
        repaired: the same after repair.
        work: images to optimise on.
        held_out: images to evaluate on.
        classes: (K,) outputs of the head.
        seed: of initial triggers and batches.
        advance: told after each step how many steps of a class are done.

    Source: Lukas and Kerschbaum, 2023, algorithm 4. Where we differ: all classes see the same images in a
    step, and images of class c itself say nothing about c.
    """
    device = pivot.mean.device
    found = []
    for group in _groups(pivot, work, classes, config):
        found.append(_invert(pivot, repaired, work, group, config, seed, advance))
    pattern = torch.cat(found)
    no_mask = torch.zeros(len(pattern), 1, *pattern.shape[2:], device=device)
    success, _ = evaluate(pivot, held_out, classes, no_mask, pattern, added=True)
    repaired_success, kept = evaluate(repaired, held_out, classes, no_mask, pattern, added=True)
    return triggers_of(classes, no_mask, pattern, success, repaired_success, kept)


def _invert(
    pivot: Classifier,
    repaired: Classifier,
    work: TrustedImages,
    classes: npt.NDArray[np.int64],
    config: InversionConfig,
    seed: int,
    advance: Advance,
) -> torch.Tensor:
    """(K, 3, R, R) triggers of one group of classes."""
    device = pivot.mean.device
    side, count = work.pixels.shape[1], len(classes)
    radius = config.radius * side / 32
    target = torch.from_numpy(classes).to(device)
    # each class draws its own start: the same whatever group it is in
    starts = [np.random.default_rng([seed, 15, int(c)]).normal(0, 0.01, (3, side, side)) for c in classes]
    trigger = torch.from_numpy(np.stack(starts)).float().to(device).requires_grad_()
    optimizer = torch.optim.Adam([trigger], config.learning_rate)
    rng = np.random.default_rng([seed, 13])
    with frozen(pivot), frozen(repaired), fast(device):
        for _ in range(config.steps):
            rows = rng.permutation(len(work))[: config.batch]
            pixels, label = (
                to_pixels(work.pixels[rows], device),
                torch.from_numpy(work.class_id[rows]).to(device),
            )
            stamped = (pixels[None] + trigger[:, None]).clamp(0, 1).flatten(0, 1)
            wanted = target.repeat_interleave(len(rows))
            kept = label.repeat(count)
            other = (wanted != kept).float()
            loss = functional.cross_entropy(pivot(stamped).float(), wanted, reduction="none")
            loss = loss + functional.cross_entropy(repaired(stamped).float(), kept, reduction="none")
            # the triggers of a group share no parameter: one sum optimises each for itself
            total = (loss * other).sum() / len(rows)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            optimizer.step()
            with torch.no_grad():
                trigger *= (
                    (radius / trigger.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
                )
            advance(count)
    return trigger.detach()


def masked_triggers(
    model: Classifier,
    work: TrustedImages,
    held_out: TrustedImages,
    classes: Sequence[int],
    config: InversionConfig,
    seed: int,
    advance: Advance = lambda steps: None,
) -> Triggers:
    """A small mask and a pattern a class: Neural Cleanse, optimised as `sanitize.scores.neural_cleanse` does.

    Source: Wang et al., IEEE S&P 2019, section V; Lukas and Kerschbaum, 2023, algorithm 6.
    """
    device = model.mean.device
    masks, patterns = [], []
    with frozen(model), fast(device):
        for group in _groups(model, work, classes, config):
            rng = np.random.default_rng([seed, 14])
            mask, pattern = rebuild(
                model,
                work.pixels,
                group.tolist(),
                rng,
                steps=config.steps,
                images=config.batch,
                advance=advance,
            )
            masks.append(mask)
            patterns.append(pattern)
    mask, pattern = torch.cat(masks), torch.cat(patterns)
    success, _ = evaluate(model, held_out, classes, mask, pattern, added=False)
    return triggers_of(classes, mask, pattern, success)


def evaluate(
    model: Classifier,
    held_out: TrustedImages,
    classes: Sequence[int],
    mask: torch.Tensor,
    pattern: torch.Tensor,
    *,
    added: bool,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Shares of images outside each class that are called the class, and that are called what they are.

    Args:
        mask: (K, 1, R, R).
        pattern: (K, 3, R, R).

    Returns:
        (K,) success and (K,) accuracy kept; NaN where all images are of the class.
    """
    success = np.full(len(classes), np.nan, np.float32)
    kept = np.full(len(classes), np.nan, np.float32)
    for place, class_id in enumerate(classes):
        others = held_out.take(np.flatnonzero(held_out.class_id != class_id))
        if len(others):
            called = predict(model, others.pixels, partial(_stamped, mask[place], pattern[place], added))
            success[place] = np.mean(called == class_id)
            kept[place] = np.mean(called == others.class_id)
    return success, kept


def _stamped(mask: torch.Tensor, pattern: torch.Tensor, added: bool, pixels: torch.Tensor) -> torch.Tensor:
    return stamp(pixels, mask, pattern, added)


def predict(
    model: Classifier,
    images: npt.NDArray[np.uint8],
    change: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
) -> npt.NDArray[np.int64]:
    """(N,) classes that the model gives (N, R, R, 3) images, each batch changed first."""
    device = model.mean.device
    size = images_at_once(device, images.shape[1])
    with torch.inference_mode(), fast(device):
        found = [
            model(change(to_pixels(images[start : start + size], device))).argmax(1).cpu().numpy()
            for start in range(0, len(images), size)
        ]
    return np.concatenate(found)


def smallest_working(masks: Triggers) -> int | None:
    """Place of the smallest mask that turns `WORKS` of the images; None where there is none."""
    size = np.where(masks.success >= WORKS, masks.mask.sum(axis=(1, 2, 3)), np.inf)
    return int(size.argmin()) if np.isfinite(size).any() else None


def most_work(masks: Triggers) -> bool:
    """Whether sizes of masks can be compared: that of one that turns no images says nothing."""
    return float(np.nanmedian(masks.success)) >= WORKS


def triggers_of(
    classes: Sequence[int],
    mask: torch.Tensor,
    pattern: torch.Tensor,
    success: npt.NDArray[np.float32],
    repaired_success: npt.NDArray[np.float32] | None = None,
    kept: npt.NDArray[np.float32] | None = None,
) -> Triggers:
    """Triggers from (K, 1, R, R) masks and (K, 3, R, R) patterns on any device."""
    return Triggers(
        classes=np.asarray(classes, np.int64),
        mask=mask.permute(0, 2, 3, 1).float().cpu().numpy(),
        pattern=pattern.permute(0, 2, 3, 1).float().cpu().numpy(),
        success=success,
        repaired_success=repaired_success,
        repaired_kept=kept,
    )


def _groups(
    model: Classifier, work: TrustedImages, classes: Sequence[int], config: InversionConfig
) -> Iterator[npt.NDArray[np.int64]]:
    """The classes in groups that fit into memory together."""
    a_class = min(config.batch, len(work)) * work.pixels.shape[1] ** 2
    at_once: int = max(1, pixels_at_once(model, work) // a_class)
    chosen = np.asarray(classes, np.int64)
    for start in range(0, len(chosen), at_once):
        yield chosen[start : start + at_once]


def pixels_at_once(model: Classifier, work: TrustedImages) -> int:
    """How many pixels may go forward and back through a network together.

    On a CPU a constant; on a CUDA device a share of its free memory, by what one image is seen to take.
    """
    device = model.mean.device
    if device.type != "cuda":
        return CPU_PIXELS
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed_step(model, work, 1)
    peak = torch.cuda.max_memory_allocated(device) - before
    # two networks are held at once in a calibrated step
    fitting = GPU_SHARE * torch.cuda.mem_get_info(device)[0] / max(2 * peak, 1)
    pixels: int = max(1, int(fitting)) * work.pixels.shape[1] ** 2
    return pixels


def timed_step(model: Classifier, work: TrustedImages, images: int) -> float:
    """Seconds that some images take forward and back to the pixels; the first pass is not counted."""
    device = model.mean.device
    rows = np.resize(np.arange(len(work)), images)
    seconds = 0.0
    with frozen(model), fast(device):
        for _ in range(2):
            pixels = to_pixels(work.pixels[rows], device).requires_grad_()
            began = time.monotonic()
            torch.autograd.backward(model(pixels).float().logsumexp(1).sum())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.monotonic() - began
    return seconds


def estimated_s(model: Classifier, work: TrustedImages, classes: int, config: InversionConfig) -> float:
    """Seconds that Calibrated Trigger Inversion of some classes will take, from one timed step.

    Neural Cleanse asks one network instead of two and takes half of it.
    """
    batch = min(config.batch, len(work))
    together = min(
        max(1, classes), max(1, pixels_at_once(model, work) // (batch * work.pixels.shape[1] ** 2))
    )
    step_s = timed_step(model, work, together * batch)
    return float(2 * config.steps * classes / together * step_s)


@contextmanager
def frozen(model: Classifier) -> Iterator[None]:
    """In eval mode and without gradients to the parameters, which would cost a third more; put back after."""
    training = model.training
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, asked in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(asked)
