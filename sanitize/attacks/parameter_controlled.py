"""The parameter-controlled backdoor: an attack on training, so it makes a checkpoint, not a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanitize.attacks import Images, Trigger, generator, stamp
from sanitize.errors import UsageError

if TYPE_CHECKING:
    import torch


def train_backdoored(
    model: torch.nn.Module,
    images: Images,
    labels: npt.NDArray[Any],
    *,
    target: int,
    trigger: Trigger | None = None,
    attack: str = "adaptive-blend",
    fraction: float = 0.1,
    steps: int = 2000,
    learning_rate: float = 1e-3,
    batch: int = 128,
    seed: int = 0,
    device: str = "auto",
    to_input: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Train `model` in place so that a backdoor sits in a random fraction of its parameters.

    Odd steps train all parameters on clean samples; even steps teach the trigger to the chosen parameters
    alone. In an even step clean samples share the batch, without a loss of their own, and batch-norm
    statistics are put back afterwards: with triggered samples alone the network would work at test time
    with statistics it was never trained under, and the backdoor would sit in the statistics too.

    Args:
        model: takes (N, 3, H, W) and gives logits; any initial state.
        images: (N, H, W, 3) float32 in [0, 1].
        labels: (N,) class ids.
        target: class that triggered images are taught.
        trigger: of make_trigger; None draws it from the seed.
        attack: its name; by default a random pattern over the whole image, at opacity 0.3.
        fraction: share of the parameters, above 0 and up to 1.
        steps: N of the source, clean and poisoned together.
        to_input: from pixels in [0, 1] to what the model takes, e.g. a normalisation.

    Returns:
        Parameter name -> bool tensor on the CPU, True where the backdoor may sit. The model is left in eval
        mode.

    Raises:
        UsageError: a fraction or step count that makes no sense, or images without labels.

    Source: Lukas and Kerschbaum, 2023, algorithm 5.
    """
    import torch

    from sanitize.attacks.surrogate import choose_device

    if not 0 < fraction <= 1:
        raise UsageError(f"fraction {fraction}: expected above 0 and up to 1")
    if steps < 2 or not len(images) or len(images) != len(labels):
        raise UsageError(
            f"{steps} steps on {len(images)} images with {len(labels)} labels: nothing to train on"
        )
    place = choose_device(device)
    model.to(place)
    random = generator(seed, "parameter-controlled")
    masks = choose_parameters(model, fraction, random)
    on_device = {name: mask.to(place) for name, mask in masks.items()}
    poison_step = torch.optim.Adam(model.parameters(), lr=learning_rate)
    clean_step = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for step in range(1, steps + 1):
        chosen = random.choice(len(images), size=min(batch, len(images)), replace=False)
        if step % 2:
            loss = _loss(model, images[chosen], np.asarray(labels)[chosen], to_input)
            clean_step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            clean_step.step()
            continue
        statistics = [buffer.clone() for buffer in model.buffers()]
        stamped = stamp(attack, images[chosen], seed=seed, trigger=trigger)
        both = np.concatenate([stamped, images[chosen]])
        loss = _loss(model, both, np.full(len(chosen), target), to_input)
        poison_step.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        # Adam leaves an element whose gradient was always zero exactly where it is.
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= on_device[name]
        poison_step.step()
        with torch.no_grad():
            for buffer, kept in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(kept)
    model.eval()
    return masks


def _loss(
    model: torch.nn.Module,
    images: Images,
    wanted: npt.NDArray[Any],
    to_input: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Mean cross-entropy of the first len(wanted) images; the others only share the batch."""
    import torch

    from sanitize.attacks.surrogate import to_tensor

    place = next(model.parameters()).device
    inputs = to_tensor(images, place)
    logits = model(inputs if to_input is None else to_input(inputs))
    classes = torch.as_tensor(wanted, dtype=torch.int64, device=place)
    return torch.nn.functional.cross_entropy(logits[: len(wanted)], classes)


def choose_parameters(
    model: torch.nn.Module, fraction: float, random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Parameter name -> bool tensor with round(fraction * total) True over all parameters together."""
    import torch

    sizes = [parameter.numel() for parameter in model.parameters()]
    chosen = np.zeros(sum(sizes), np.bool_)
    chosen[random.permutation(len(chosen))[: round(fraction * len(chosen))]] = True
    masks, start = {}, 0
    for name, parameter in model.named_parameters():
        part = torch.from_numpy(chosen[start : start + parameter.numel()].copy())
        masks[name] = part.reshape(parameter.shape)
        start += parameter.numel()
    return masks
