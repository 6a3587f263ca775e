"""A second model that does not learn triggers: what it thinks of the given labels.

The proxy learns every sample as it is, triggers too. This one sees shifted and mirrored images and soft
labels, and after its third epoch leaves out the samples of each class that it believes least. What a trigger
alone connects with its label stays unbelievable to it; so do wrong labels and odd images. A trigger on images
whose labels are right it may learn.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanitize.dynamics.proxy import Batches, Samples, Setup, build, evaluate, seeded
from sanitize.errors import TrainingError
from sanitize.progress import Progress
from sanitize.rundir import write_atomic

if TYPE_CHECKING:
    import torch

EPOCHS = 12
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-3
BATCH = 256
BATCHES = 25
"""A small corpus gets smaller batches, so that an epoch has about this many."""
SHIFT = 1 / 8
"""Largest shift, as a share of the image's side; what it leaves empty is mirrored in."""
LABEL_SMOOTHING = 0.1
LEFT_OUT = 0.15
"""Share of each class, the highest losses, that is not trained on after the first look."""
LOOK_EVERY = 3
"""Epochs between looks at all samples."""


def losses(
    samples: Samples, seed: int, resolved: Setup, checkpoint: Path, progress: Progress
) -> npt.NDArray[np.float32]:
    """Train the second model, or go on from `checkpoint`, and measure its loss on every sample.

    Returns:
        (M,) float32 cross-entropy in nats of `samples.rows`, in eval mode, after the last epoch.

    Raises:
        TrainingError: the loss of more than one sample in a hundred is not finite.

    Source: small-loss training, Han et al., "Co-teaching", NeurIPS 2018; that augmentation keeps triggers
    from being learned, Borgnia et al., ICASSP 2021.
    """
    import torch

    device = torch.device(resolved.device)
    with seeded(device, seed):
        network = build(resolved.proxy, samples.classes, samples.pixels.shape[1])
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
    )
    batches = Batches(samples, resolved)
    running = torch.zeros(len(samples.rows))
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, running = state["epoch"], state["running"]
    class_id = samples.class_id[samples.rows]
    looks = EPOCHS // LOOK_EVERY
    steps = (EPOCHS - first + looks - first // LOOK_EVERY) * len(samples.rows)
    with progress.stage("second opinion", steps, "samples") as advance:
        for epoch in range(first, EPOCHS):
            kept = _believed(running.numpy(), class_id) if epoch >= LOOK_EVERY else np.arange(len(class_id))
            with seeded(device, seed + epoch + 1):
                _train_epoch(network, optimizer, batches, kept, epoch, seed)
            advance(len(samples.rows))
            if (epoch + 1) % LOOK_EVERY:
                continue
            latest, _ = evaluate(network, batches, advance)
            if np.isfinite(latest).mean() < 0.99:
                raise TrainingError(
                    "the second model diverged; start a new --out with another --seed or --proxy"
                )
            running = torch.from_numpy(latest) + (running if epoch >= LOOK_EVERY else 0)
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "running": running,
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(checkpoint, buffer.getvalue())
            if epoch + 1 == EPOCHS:
                return latest
    return evaluate(network, batches, lambda n: None)[0]


def _believed(running: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """Positions of each class's samples with the lowest losses."""
    order = np.lexsort((running, class_id))
    counts = np.bincount(class_id)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    believed: npt.NDArray[np.intp] = np.sort(order[rank < np.ceil((1 - LEFT_OUT) * counts[class_id[order]])])
    return believed


def _train_epoch(
    network: Any,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    kept: npt.NDArray[np.intp],
    epoch: int,
    seed: int,
) -> None:
    import torch
    from torch.nn import functional

    network.train()
    order = torch.from_numpy(np.random.default_rng([seed, epoch, 5]).permutation(kept)).to(batches.home)
    batch = min(BATCH, max(16, len(order) // BATCHES))
    pieces = torch.tensor_split(order, max(1, len(order) // batch))
    for step, positions in enumerate(pieces):
        rate = _learning_rate((epoch + step / len(pieces)) / EPOCHS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = batches(positions)
        with batches.autocast():
            logits = network(_augment(images))
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()


def _learning_rate(done: float) -> float:
    """Up in a line over the first 30 % of the run, then down as a cosine; done: 0 to 1."""
    if done < 0.3:
        return LEARNING_RATE * (0.04 + 0.96 * done / 0.3)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))


def _augment(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W), shifted by up to SHIFT of the side both ways, and half of them mirrored."""
    import torch
    from torch.nn import functional

    side = images.shape[2]
    shift = max(1, round(SHIFT * side))
    padded = functional.pad(images, (shift,) * 4, mode="reflect").permute(0, 2, 3, 1)
    one = (len(images), 1)
    along = torch.arange(side, device=images.device)
    rows = along + torch.randint(0, 2 * shift + 1, one, device=images.device)
    mirrored = torch.rand(one, device=images.device) < 0.5
    columns = torch.where(mirrored, along.flip(0), along) + torch.randint(
        0, 2 * shift + 1, one, device=images.device
    )
    which = torch.arange(len(images), device=images.device)[:, None, None]
    # channels stay last in memory
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
