"""Training the model a user would train, on what a defence left over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sanitize.config import ProxyConfig
from sanitize.dynamics import proxy as proxy_module
from sanitize.errors import TrainingError, UsageError
from sanitize.progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from torch import nn

Images = npt.NDArray[np.uint8]
_PREDICT_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    network: str
    """As for ``--proxy``."""
    epochs: int
    batch: int
    learning_rate: float
    schedule: str
    """``one-cycle`` or ``cosine``, stepped every batch."""
    crop: int = 0
    """Pixels of random shift; images are also flipped left to right."""
    optimizer: str = "adamw"
    """``adamw``, or ``sgd`` with Nesterov momentum 0.9."""
    weight_decay: float = 1e-4
    max_pool: bool = True
    """Of a ResNet; without it, images of 32 px keep their resolution."""


RECIPES = {
    "small": Recipe(network="small", epochs=12, batch=256, learning_rate=2e-3, schedule="one-cycle"),
    "resnet18": Recipe(network="resnet18", epochs=30, batch=256, learning_rate=1e-3, schedule="one-cycle"),
    "badloss-paper": Recipe(
        network="resnet50", epochs=100, batch=128, learning_rate=1e-3, schedule="cosine", crop=4
    ),
    "small-sgd": Recipe(
        network="small",
        epochs=12,
        batch=256,
        learning_rate=0.2,
        schedule="one-cycle",
        optimizer="sgd",
        weight_decay=5e-4,
    ),
    "resnet18-sgd": Recipe(
        network="resnet18",
        epochs=20,
        batch=256,
        learning_rate=0.2,
        schedule="one-cycle",
        crop=4,
        optimizer="sgd",
        weight_decay=5e-4,
        max_pool=False,
    ),
}
"""small: two cores, four minutes for 50,000 images. Random crops and label smoothing would look like a
defence there: with them a small network learns almost no attack. badloss-paper: Alex et al., appendix H.
small-sgd, resnet18-sgd: SGD and weight decay as in Lukas and Kerschbaum's table 4; a tenth and a sixth of
their epochs, one cycle instead of a cosine, twice the rate."""


def recipe(name: str, epochs: int | None = None) -> Recipe:
    """The recipe called `name`; ``auto`` is resnet18 where there is a CUDA device, else small.

    Raises:
        UsageError: no such recipe.
    """
    if name == "auto":
        import torch

        name = "resnet18" if torch.cuda.is_available() else "small"
    if name not in RECIPES:
        raise UsageError(f"retrain.recipe {name}: expected auto, {', '.join(RECIPES)}")
    return RECIPES[name] if epochs is None else replace(RECIPES[name], epochs=epochs)


class Model(NamedTuple):
    """A trained classifier."""

    network: nn.Module
    mean: torch.Tensor
    std: torch.Tensor
    dtype: torch.dtype
    seconds: float


def cross_entropy(model: Model, images: Images, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of a batch."""
    from torch.nn import functional

    return functional.cross_entropy(logits(model, images), labels)


def retrain(
    images: Images,
    class_id: npt.NDArray[Any],
    classes: int,
    chosen: Recipe,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    loss: Callable[[Model, Images, torch.Tensor], torch.Tensor] = cross_entropy,
) -> Model:
    """Train a classifier from scratch; on a CPU the seed fixes the result.

    Args:
        images: (N, R, R, 3) uint8.
        class_id: (N,) labels, 0 to classes - 1.
        seed: of initialisation, order, flips and crops.
        loss: of a batch: the model in training, (B, R, R, 3) augmented images and their (B,) labels, to a
            scalar.

    Raises:
        UsageError: fewer than two images.
        TrainingError: the loss is not finite.
    """
    import torch

    if len(images) < 2:
        raise UsageError(f"{len(images)} samples are left to train on; remove less")
    began = time.monotonic()
    resolved = proxy_module.setup(ProxyConfig(proxy=chosen.network, device=device), len(images))
    place = torch.device(resolved.device)
    # evenly spaced samples, as for the proxy
    sample = images[:: max(1, len(images) // 2_000)].reshape(-1, 3).astype(np.float64)
    mean = torch.tensor(sample.mean(axis=0), dtype=torch.float32, device=place).view(1, 3, 1, 1)
    std = torch.tensor(sample.std(axis=0) + 1e-3, dtype=torch.float32, device=place).view(1, 3, 1, 1)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        network = proxy_module.build(chosen.network, classes, images.shape[1])
        if not chosen.max_pool:
            network.maxpool = torch.nn.Identity()
        network = network.to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = Model(network.train(), mean, std, getattr(torch, resolved.dtype), 0.0)
        batches = max(1, len(images) // chosen.batch)
        optimizer = _optimizer(network, chosen)
        schedule = _schedule(optimizer, chosen, chosen.epochs * batches)
        rng = np.random.default_rng([seed, 2])
        labels = torch.from_numpy(np.asarray(class_id, np.int64)).to(place)
        with (progress or Silent()).stage("retrain", chosen.epochs * len(images), "samples") as advance:
            for epoch in range(chosen.epochs):
                total = torch.zeros((), device=place)
                for rows in np.array_split(rng.permutation(len(images)), batches):
                    pixels = _augment(images[rows], chosen.crop, rng)
                    batch_loss = loss(model, pixels, labels[torch.from_numpy(rows)])
                    optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(batch_loss)
                    optimizer.step()
                    schedule.step()
                    total += batch_loss.detach()
                    advance(len(rows))
                if not torch.isfinite(total):
                    raise TrainingError(f"retraining diverged in epoch {epoch + 1}; try another seed")
    network.eval()
    return model._replace(seconds=time.monotonic() - began)


def predict(model: Model, images: Images) -> npt.NDArray[np.int64]:
    """(N,) predicted classes of (N, R, R, 3) uint8 images."""
    import torch

    found = np.empty(len(images), np.int64)
    with torch.inference_mode():
        for start in range(0, len(images), _PREDICT_BATCH):
            batch = images[start : start + _PREDICT_BATCH]
            found[start : start + len(batch)] = logits(model, batch).argmax(1).cpu().numpy()
    return found


def _optimizer(network: nn.Module, chosen: Recipe) -> torch.optim.Optimizer:
    import torch

    weights, rate, decay = network.parameters(), chosen.learning_rate, chosen.weight_decay
    if chosen.optimizer == "sgd":
        return torch.optim.SGD(weights, rate, 0.9, weight_decay=decay, nesterov=True, foreach=True)
    return torch.optim.AdamW(weights, rate, weight_decay=decay, foreach=True)


def _schedule(
    optimizer: torch.optim.Optimizer, chosen: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    from torch.optim import lr_scheduler

    if chosen.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return lr_scheduler.OneCycleLR(optimizer, chosen.learning_rate, total_steps=steps + 1)


def _augment(images: Images, crop: int, rng: np.random.Generator) -> Images:
    """Half of the images mirrored, and shifted by up to `crop` pixels over black."""
    flip = rng.random(len(images)) < 0.5
    changed = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    if not crop:
        return changed
    side = images.shape[1]
    padded = np.pad(changed, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    shifts = rng.integers(0, 2 * crop + 1, (len(images), 2))
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(padded, shifts, strict=True)])


def logits(model: Model, images: Images) -> torch.Tensor:
    """(B, classes) float32 for (B, R, R, 3) uint8 images."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(model.mean.device)
    normal = (pixels.permute(0, 3, 1, 2).float() - model.mean) / model.std
    with torch.autocast(model.mean.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
        found: torch.Tensor = model.network(normal)
    return found.float()
