"""Asking the proxy: batches of images, and what its last layer is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 256


def device_of(network: nn.Module) -> torch.device:
    """Where its parameters and buffers are."""
    return next(iter([*network.parameters(), *network.buffers()])).device


def batches(network: nn.Module, images: npt.NDArray[np.uint8]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of (N, H, W, 3) uint8 images, and the same as (B, 3, H, W) float32 in [0, 1] on the device."""
    place = device_of(network)
    for start in range(0, len(images), BATCH):
        rows = slice(start, min(start + BATCH, len(images)))
        yield rows, _pixels(images[rows], place)


def _pixels(images: npt.NDArray[np.uint8], place: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(images)).to(place).permute(0, 3, 1, 2).float() / 255


def activations(
    network: nn.Module, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp]
) -> npt.NDArray[np.float32]:
    """Inputs of the last linear layer for some rows of a memmap, which is read batch by batch.

    Args:
        network: takes (B, 3, H, W) float32 in [0, 1].
        images: (N, H, W, 3) uint8.
        rows: (M,) which of them.

    Returns:
        (M, D) float32.

    Raises:
        UsageError: the network has no linear layer.
    """
    import torch

    place = device_of(network)
    with torch.inference_mode():
        found = [
            features(network, _pixels(images[rows[start : start + BATCH]], place)).cpu().numpy()
            for start in range(0, len(rows), BATCH)
        ]
    return np.concatenate(found)


def features(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(B, D) input of the last linear layer for (B, 3, H, W) images.

    Raises:
        UsageError: the network has no linear layer.
    """
    from torch import nn

    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError("this proxy does not end in a linear layer; scan with --proxy small or resnet18")
    seen: list[torch.Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        network(pixels)
    finally:
        hook.remove()
    return seen[0].flatten(1).float()
