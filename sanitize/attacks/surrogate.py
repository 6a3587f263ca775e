"""The small network that stands in for the victim's where an attack needs gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanitize.attacks import Images, SurrogateCorpus
from sanitize.attacks.resample import resize_all
from sanitize.errors import UsageError

if TYPE_CHECKING:
    import torch

WIDTHS = (32, 64, 128)
EPOCHS = 10
BATCH = 128
LARGEST_SIDE = 64
"""Surrogates see images at their own size up to 48 pixels, and at this size above."""


def surrogate_side(height: int, width: int) -> int:
    """Side in pixels of the square images that a surrogate sees."""
    return LARGEST_SIDE if min(height, width) > 48 else 32


def build_network(classes: int) -> torch.nn.Sequential:
    """Three halving convolutions with batch norm, then a linear layer; takes (N, 3, R, R) in [0, 1]."""
    import torch

    layers: list[torch.nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [
            # Strides instead of pooling: a third of the time on a CPU, and gradients just as useful.
            torch.nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
        ]
        before = width
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(before, classes)]
    return torch.nn.Sequential(*layers)


def train_surrogate(corpus: SurrogateCorpus, random: np.random.Generator) -> torch.nn.Sequential:
    """Train a small network on the corpus, with flips, and return it in eval mode on its device.

    Raises:
        UsageError: fewer than two samples or classes.
    """
    import torch

    classes = max(int(corpus.labels.max(initial=0)), corpus.target) + 1
    if len(np.unique(corpus.labels)) < 2:
        raise UsageError("a surrogate needs samples of at least two classes")
    device = choose_device(corpus.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        model = build_network(classes).to(device)
    pixels, labels = to_tensor(square(corpus.images), device), torch.as_tensor(corpus.labels, device=device)
    steps = -(-len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * steps)
    model.train()
    for _ in range(EPOCHS):
        order = random.permutation(len(pixels))
        # Even shares, so that no batch is a single sample, which batch norm could not take.
        for batch in np.array_split(order, steps):
            images = pixels[torch.as_tensor(batch, device=device)]
            flipped = torch.as_tensor(random.random(len(batch)) < 0.5, device=device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
            loss = torch.nn.functional.cross_entropy(model(images), labels[torch.as_tensor(batch)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
    return model.requires_grad_(False)


def square(images: Images) -> Images:
    """(N, H, W, 3) to the size that a surrogate sees."""
    side = surrogate_side(*images.shape[1:3])
    return resize_all(images, side, side)


def choose_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible; use --device cpu")
    return torch.device(device)


def to_tensor(images: Images, device: torch.device) -> torch.Tensor:
    """(N, H, W, 3) to (N, 3, H, W) on `device`."""
    import torch

    return torch.as_tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), device=device)


def to_array(images: torch.Tensor) -> Images:
    """(N, 3, H, W) back to (N, H, W, 3)."""
    return np.ascontiguousarray(images.detach().cpu().numpy().transpose(0, 2, 3, 1))


def weights_to_arrays(model: torch.nn.Module) -> dict[str, npt.NDArray[Any]]:
    """State as plain arrays under ``weights/NAME``."""
    return {f"weights/{name}": tensor.cpu().numpy() for name, tensor in model.state_dict().items()}


def load_network(trigger: dict[str, npt.NDArray[Any]], device: torch.device) -> torch.nn.Sequential:
    """Inverse of weights_to_arrays, in eval mode."""
    import torch

    state = {
        name.removeprefix("weights/"): torch.as_tensor(array)
        for name, array in trigger.items()
        if name.startswith("weights/")
    }
    model = build_network(len(next(reversed(state.values()))))
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)
