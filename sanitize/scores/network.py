"""Asking the proxy: batches of images, and what its last layer is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanitize.errors import UsageError
from sanitize.scores import Images

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 256


def device_of(network: nn.Module) -> torch.device:
    """Where its parameters and buffers are."""
    return next(iter([*network.parameters(), *network.buffers()])).device


def fast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 where the processor multiplies it faster than float32."""
    import torch

    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        able = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    found: AbstractContextManager[None] = torch.autocast(device.type, dtype=torch.bfloat16, enabled=able)
    return found


def batches(network: nn.Module, images: Images) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of (N, H, W, 3) uint8 images, and the same as (B, 3, H, W) float32 in [0, 1] on the device."""
    for start in range(0, len(images), BATCH):
        rows = slice(start, min(start + BATCH, len(images)))
        yield rows, pixels_of(network, images[rows])


def pixels_of(network: nn.Module, images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(B, H, W, 3) uint8 images as the network takes them: (B, 3, H, W) float32 in [0, 1] on its device."""
    import torch

    return torch.from_numpy(np.array(images)).to(device_of(network)).permute(0, 3, 1, 2).float() / 255


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

    with torch.inference_mode():
        found = [
            features(network, pixels_of(network, images[rows[start : start + BATCH]])).cpu().numpy()
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


def block_activations(network: nn.Module, images: Images) -> list[npt.NDArray[np.float32]]:
    """Mean and maximum over the positions of each early block's channels.

    An early block is the last module whose output has a given side, from a quarter of the image's to below
    it.

    Args:
        network: takes (B, 3, H, W) float32 in [0, 1].
        images: (N, H, W, 3) uint8.

    Returns:
        One (N, 2 · channels) float32 array a block, from the image on; none for a network without positions.
    """
    import torch

    last: dict[int, nn.Module] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        side = output.shape[2] if isinstance(output, torch.Tensor) and output.ndim == 4 else 0
        if side < images.shape[1] <= 4 * side:
            last[side] = module

    with torch.inference_mode():
        hooks = [module.register_forward_hook(note) for module in network.modules()]
        network(pixels_of(network, images[:1]))
        for hook in hooks:
            hook.remove()
        found: list[list[npt.NDArray[np.float32]]] = [[] for _ in last]

        def pool(into: list[npt.NDArray[np.float32]]) -> Any:
            return lambda module, inputs, output: into.append(
                torch.cat([output.mean((2, 3)), output.amax((2, 3))], 1).float().cpu().numpy()
            )

        hooks = [
            module.register_forward_hook(pool(into))
            for module, into in zip(last.values(), found, strict=True)
        ]
        for _, pixels in batches(network, images):
            network(pixels)
        for hook in hooks:
            hook.remove()
    return [np.concatenate(parts) for parts in found]
