"""What `inspect` and `repair` see of a checkpoint: pixels in, logits and penultimate features out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from sanitize.errors import InputError


class Classifier(nn.Module):
    """A trained network with the preprocessing it was trained with, in eval mode and float32.

    The state dict of `network` has the names and the order of the checkpoint it came from, whatever that
    is wrapped in. Gradients flow to the pixels and, where they are asked for, to the parameters.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        head: str,
        resolution: int,
        mean: Sequence[float],
        std: Sequence[float],
        architecture: str,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Wrap a network.

        Args:
            network: takes (B, 3, R, R) float32 normalised by mean and std, gives (B, C) logits.
            head: name, among the network's modules, of the last linear layer (C, D).
            resolution: R in pixels.
            mean: of each channel, of pixels in [0, 1].
            std: likewise.
            architecture: as it would be given to ``--arch``.
            class_names: C labels in the order of the head; None: the head's numbers are the labels.

        Raises:
            InputError: there is no linear layer of that name, it has one output, or not C class names.
        """
        super().__init__()
        modules = dict(network.named_modules())
        if not isinstance(modules.get(head), nn.Linear):
            raise InputError(f"{architecture}: {head!r} is not a linear layer of the network")
        self.network = network.float()
        self.head_name = head
        self.resolution = resolution
        self.architecture = architecture
        self.class_names = None if class_names is None else list(class_names)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        if class_names is not None and len(class_names) != self.classes:
            raise InputError(f"{len(class_names)} class names for a head of {self.classes} classes")
        if self.classes < 2:
            raise InputError(
                f"{architecture} has a head of {self.classes} output, as for yes or no; two or more are "
                "needed: the classes are compared"
            )
        self.eval()  # the wrapper too: who puts `training` back must not set the network to training

    @property
    def head(self) -> nn.Linear:
        """The last linear layer; its weight is (C, D)."""
        found = self.network.get_submodule(self.head_name)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def classes(self) -> int:
        """C, the outputs of the head."""
        return self.head.out_features

    def label(self, class_id: int) -> str:
        """The name of a class, or its number."""
        return str(class_id) if self.class_names is None else self.class_names[class_id]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C) logits of (B, 3, R, R) float32 pixels in [0, 1]."""
        found = self.network((pixels - self.mean) / self.std)
        # GoogLeNet and Inception with auxiliary heads give more than logits in training
        logits: torch.Tensor = getattr(found, "logits", found)
        return logits

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C) logits and the (B, D) features that the head is given."""
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = self(pixels)
        finally:
            hook.remove()
        return logits, seen[0].flatten(1)

    def clone(self) -> Self:
        """An independent copy with gradients on for its parameters; this one stays as it is."""
        copied = copy.deepcopy(self)
        copied.requires_grad_(True)
        return copied
