"""Causality-inspired Backdoor Defense: nothing is removed, the training itself keeps away from the poison."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from sanitize.evaluate.retrain import Images, Model, Recipe, logits, retrain
from sanitize.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

BACKDOOR_EPOCHS = 5
"""Of the model that is meant to learn the backdoors, which are learned early."""
DEPENDENCE = 0.01
"""Weight of what the critic finds; as in the authors' code."""
BOTTLENECK = 1e-4
"""Weight of the embedding's squared length."""
CRITIC_LEARNING_RATE = 1e-3


def train_deconfounded(
    images: Images,
    class_id: npt.NDArray[Any],
    classes: int,
    chosen: Recipe,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> Model:
    """Train a classifier that is told by a backdoored one what not to learn; arguments as for `retrain`.

    A first model is trained for five epochs. The model that is kept then weighs every sample by how much
    harder the first one finds it, and its embedding is made short (an information bottleneck) and
    independent of the first one's embedding, as a critic of bounded slope measures it.

    Where we differ: network, optimiser, schedule and number of epochs are the recipe's, so that methods are
    compared and not trainings; the first model has a schedule of its own, as in the code of Alex et al. The
    critic is trained batch by batch with the model, not in a pass of its own before every epoch, by Adam
    1e-3 (the authors: 0.2), without dropout, and its slope is bounded by torch's spectral norm. The authors'
    code leaves out the bottleneck, which is in the paper, and its public default the critic, too.

    Source: Zhang et al., CVPR 2023, arXiv 2303.06818, and its public code.
    """
    began = time.monotonic()
    # Another initialisation than the second model's, or the two would begin with one embedding.
    first = retrain(
        images,
        class_id,
        classes,
        replace(chosen, epochs=BACKDOOR_EPOCHS),
        seed=seed + 1,
        device=device,
        progress=progress,
    )
    model = retrain(
        images,
        class_id,
        classes,
        chosen,
        seed=seed,
        device=device,
        progress=progress,
        loss=_deconfounded_loss(first, seed),
    )
    return model._replace(seconds=time.monotonic() - began)


def sample_weights(first_loss: torch.Tensor, own_loss: torch.Tensor) -> torch.Tensor:
    """(B,) weights of mean 1: a sample that only the first model finds easy has next to none."""
    weights = first_loss / (first_loss + own_loss + 1e-8)
    return weights / weights.mean().clamp_min(1e-8)


def _deconfounded_loss(first: Model, seed: int) -> Callable[[Model, Images, torch.Tensor], torch.Tensor]:
    """The loss of a batch; every call also trains the critic by a step."""
    import torch
    from torch.nn import functional

    critic = _critic(_head(first.network).in_features, first.mean.device, seed)
    optimizer = torch.optim.Adam(critic.parameters(), CRITIC_LEARNING_RATE)

    def loss(model: Model, images: Images, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            first_logits, first_embedding = _logits_and_embedding(first, images)
        own_logits, embedding = _logits_and_embedding(model, images)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(-dependence(critic, first_embedding, embedding.detach()))
        optimizer.step()
        own_loss = functional.cross_entropy(own_logits, labels, reduction="none")
        first_loss = functional.cross_entropy(first_logits, labels, reduction="none")
        weighted = (sample_weights(first_loss, own_loss.detach()) * own_loss).mean()
        short = embedding.square().sum(dim=1).mean()
        return weighted + BOTTLENECK * short + DEPENDENCE * dependence(critic, first_embedding, embedding)

    return loss


def dependence(critic: nn.Module, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How much higher the critic holds pairs of one image's (B, D) embeddings than pairs of two images'."""
    import torch

    together = torch.cat([first, second], dim=1)
    apart = torch.cat([first, second.roll(1, dims=0)], dim=1)
    found: torch.Tensor = critic(together).mean() - critic(apart).mean()
    return found


def _critic(width: int, device: torch.device, seed: int) -> nn.Module:
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import spectral_norm

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return nn.Sequential(
            spectral_norm(nn.Linear(2 * width, width)), nn.LeakyReLU(), spectral_norm(nn.Linear(width, 1))
        ).to(device)


def _head(network: nn.Module) -> nn.Linear:
    from torch import nn

    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def _logits_and_embedding(model: Model, images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, classes) and (B, D), which is what the last layer is given."""
    seen: list[torch.Tensor] = []
    hook = _head(model.network).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        found = logits(model, images)
    finally:
        hook.remove()
    return found, seen[0].float()
