"""The proxy model: a short training run that leaves every sample's loss after each epoch."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanitize.config import ProxyConfig
from sanitize.errors import TrainingError, UsageError
from sanitize.progress import Progress
from sanitize.rundir import write_atomic

if TYPE_CHECKING:
    import torch
    from torch import nn

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
SCHEDULE_RATIO = 0.3
"""The proxy run is the first 30 % of a cosine schedule (BaDLoss, appendix H), so its rate barely falls."""
EVAL_BATCH = 512
SMALL_IMAGE = 64
"""Up to this resolution a ResNet gets a 3×3 stem of stride 1; its max-pool stays, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What `auto` came to on this machine."""

    proxy: str
    device: str
    dtype: str
    """``bfloat16`` or ``float32``: of the matrix products; weights and losses are float32."""
    batch: int
    threads: int
    """Of the CPU; sums depend on it in their last bits. 0 on CUDA."""
    torch: str
    """Version."""


def setup(config: ProxyConfig, samples: int) -> Setup:
    """Resolve `auto` settings.

    Raises:
        UsageError: CUDA was asked for and is not there, or no such torchvision constructor.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    proxy = config.proxy
    if proxy == "auto":
        proxy = "resnet18" if device == "cuda" else "small"
    if proxy != "small":
        from torchvision import models

        known = models.list_models(module=models)
        if proxy not in known:
            raise UsageError(
                f"--proxy {proxy}: expected auto, small or a torchvision classifier, resnet18 for one"
            )
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
    else:
        bf16 = bool(
            torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
        )
    return Setup(
        proxy=proxy,
        device=device,
        dtype="bfloat16" if bf16 else "float32",
        batch=128 if samples <= 100_000 else 256,
        threads=torch.get_num_threads() if device == "cpu" else 0,
        torch=torch.__version__,
    )


def build(proxy: str, classes: int, resolution: int) -> nn.Module:
    """An untrained network for (B, 3, resolution, resolution) float32 images.

    `small` is a residual network of widths 32-64-128 on a quarter of the pixels: two thirds of the work of
    a 16-32-64-128 network at full size (docs/experiments.md).
    """
    from torch import nn

    if proxy == "small":
        return _small(classes, resolution)
    from torchvision import models

    network: nn.Module = models.get_model(proxy, weights=None, num_classes=classes)
    if proxy.startswith(("resnet", "resnext", "wide_resnet")) and resolution <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    return network


def small(num_classes: int = 10) -> nn.Module:
    """The network `small` for 32 px images: ``--arch sanitize.dynamics.proxy:small`` for its checkpoints."""
    return _small(num_classes, 32)


def _small(classes: int, resolution: int) -> nn.Module:
    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *_conv(inputs, outputs, stride), nn.ReLU(inplace=True), *_conv(outputs, outputs, 1)
            )
            self.skip = (
                nn.Identity()
                if stride == 1 and inputs == outputs
                else nn.Sequential(*_conv(inputs, outputs, stride, 1))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu_(self.body(x) + self.skip(x))

    # Halve until about 16×16 is left: 32 px once, 64 px twice.
    halvings = max(1, round(math.log2(resolution / 16)))
    stem: list[nn.Module] = []
    for step in range(halvings):
        stem += [*_conv(3 if step == 0 else 32, 32, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *stem,
        Residual(32, 32, 1),
        Residual(32, 64, 2),
        Residual(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def _conv(inputs: int, outputs: int, stride: int, size: int = 3) -> list[nn.Module]:
    from torch import nn

    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The training set: the usable samples, as views of what is on disk."""

    pixels: npt.NDArray[np.uint8]
    """(N, H, W, 3), a memmap is fine."""
    class_id: npt.NDArray[np.int32]
    """(N,)"""
    rows: npt.NDArray[np.intp]
    """(M,) the rows to train on, ascending."""
    classes: int


def train(
    samples: Samples,
    config: ProxyConfig,
    resolved: Setup,
    trajectories: npt.NDArray[np.float32],
    checkpoint: Path,
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """Train the proxy and fill `trajectories` epoch by epoch; goes on from `checkpoint` if it is there.

    AdamW 1e-3, weight decay 1e-4, the first 30 % of a cosine schedule, no augmentation. With
    ``config.trajectory == "eval"`` the losses are measured in eval mode after each epoch, else they are the
    losses at training time. On a CPU the same seed gives the same losses; a run that was killed, too.

    Args:
        trajectories: (E, N) float32 memmap; row e is set for `samples.rows` after epoch e, in nats.
        checkpoint: model, optimiser and epoch, replaced atomically after every epoch.

    Returns:
        Mean loss in nats, over the finite ones, and accuracy of each epoch.

    Raises:
        TrainingError: the loss of more than one sample in a hundred is not finite.

    Source: Alex et al., ICLR 2025, arXiv 2408.13221, section 4.1 and appendix H.
    """
    import torch

    device = torch.device(resolved.device)
    with seeded(device, config.seed):
        network = build(resolved.proxy, samples.classes, samples.pixels.shape[1])
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
    )
    first, epoch_loss, accuracy = _restore(checkpoint, network, optimizer)
    batches = Batches(samples, resolved)
    passes = 2 if config.trajectory == "eval" else 1
    with progress.stage("train", passes * (config.epochs - first) * len(samples.rows), "samples") as advance:
        for epoch in range(first, config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(epoch, config.epochs)
            with seeded(device, config.seed + epoch + 1):
                row, correct = _train_epoch(network, optimizer, batches, epoch, config.seed, advance)
            if config.trajectory == "eval":
                row, correct = evaluate(network, batches, advance)
            _refuse_divergence(row, epoch)
            epoch_loss.append(float(row[np.isfinite(row)].mean(dtype=np.float64)))
            accuracy.append(correct)
            trajectories[epoch, samples.rows] = row
            if isinstance(trajectories, np.memmap):
                trajectories.flush()
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch_loss": epoch_loss,
                "accuracy": accuracy,
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(checkpoint, buffer.getvalue())
    return epoch_loss, accuracy


@contextmanager
def gpu_memory(device: str) -> Iterator[None]:
    """Around training and scoring: say what to do when the GPU's memory runs out, and leave none cached.

    Around the call, because inside it the network and the pixels would still be held.

    Raises:
        TrainingError: instead of PyTorch's OutOfMemoryError.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory ran out ({str(error).splitlines()[0]}); free some, or scan into a new "
            "--out with a smaller --proxy or --resolution, or with --device cpu"
        ) from None
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # FAISS allocates on its own


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """torch's generators from `seed` (dropout draws from them, too), and afterwards as they were."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_fits(proxy: str, resolution: int) -> None:
    """Refuse networks that take only larger images, or return more than logits while they train.

    Raises:
        UsageError: `proxy` cannot train at `resolution`.
    """
    import torch

    try:
        logits = build(proxy, 2, resolution).train()(torch.zeros(2, 3, resolution, resolution))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"--proxy {proxy} cannot train on {resolution} px images ({str(error).splitlines()[0]}); take "
            "resnet18, or another --resolution"
        ) from None
    if not isinstance(logits, torch.Tensor):
        raise UsageError(f"--proxy {proxy} has several outputs; take resnet18 for one")


def time_one_epoch(samples: Samples, config: ProxyConfig, resolved: Setup) -> float:
    """Seconds of one epoch with its evaluation, after one to warm up."""
    import torch

    network = build(resolved.proxy, samples.classes, samples.pixels.shape[1])
    network = network.to(resolved.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    batches = Batches(samples, resolved)
    seconds = 0.0
    for epoch in range(2):
        began = time.monotonic()
        _train_epoch(network, optimizer, batches, epoch, config.seed, lambda n: None)
        if config.trajectory == "eval":
            evaluate(network, batches, lambda n: None)
        seconds = time.monotonic() - began
    return seconds


def _refuse_divergence(row: npt.NDArray[np.float32], epoch: int) -> None:
    broken = int((~np.isfinite(row)).sum())
    if broken > len(row) // 100:
        raise TrainingError(
            f"epoch {epoch + 1}: the loss of {broken:,} of {len(row):,} samples is not finite, the proxy "
            "diverged; start a new --out with another --seed or --proxy"
        )


def _restore(
    checkpoint: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[float], list[float]]:
    import torch

    if not checkpoint.exists():
        return 0, [], []
    # On the CPU, because AdamW keeps its step counter where it finds it, and on a GPU every step would sync.
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return len(state["epoch_loss"]), state["epoch_loss"], state["accuracy"]


def _learning_rate(epoch: int, epochs: int) -> float:
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * SCHEDULE_RATIO * epoch / epochs))


class Batches:
    """Batches of normalised images; the pixels live on the GPU when they fit (`home`)."""

    def __init__(self, samples: Samples, resolved: Setup) -> None:
        import torch

        self.device = torch.device(resolved.device)
        self.dtype = getattr(torch, resolved.dtype)
        self.batch = resolved.batch
        self.labels = torch.from_numpy(samples.class_id[samples.rows].astype(np.int64)).to(self.device)
        with warnings.catch_warnings():
            # A read-only memmap is fine: nothing writes to this tensor.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._pixels = torch.from_numpy(samples.pixels)
        self._resident = self.device.type == "cuda" and _fits(self._pixels)
        self.home = self.device if self._resident else torch.device("cpu")
        self._pixels = self._pixels.to(self.home)
        self.rows = torch.from_numpy(samples.rows.astype(np.int64)).to(self.home)
        mean, std = _channel_statistics(samples)
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._scale = 1 / torch.tensor(std, device=self.device).view(1, 3, 1, 1)

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised (B, 3, H, W) float32 images and (B,) int64 labels.

        Args:
            positions: (B,) int64 on `home`, which samples of `rows`.
        """
        images = self._pixels[self.rows[positions]]
        if self.home != self.device:
            images = images.pin_memory().to(self.device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float().sub_(self._mean).mul_(self._scale)
        return images, self.labels[positions.to(self.device)]


def _fits(pixels: torch.Tensor) -> bool:
    import torch

    free, _ = torch.cuda.mem_get_info()
    return pixels.nbytes < 0.6 * free


def _channel_statistics(samples: Samples) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over at most 2,000 evenly spaced samples, 0 to 255."""
    chosen = samples.rows[:: max(1, len(samples.rows) // 2_000)]
    values = samples.pixels[chosen].reshape(-1, 3).astype(np.float64)
    return values.mean(axis=0).tolist(), (values.std(axis=0) + 1e-3).tolist()


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    epoch: int,
    seed: int,
    advance: Any,
) -> tuple[npt.NDArray[np.float32], float]:
    """One pass; returns the training-time loss of each sample, and the accuracy."""
    import torch
    from torch.nn import functional

    network.train()
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(batches.rows))
    order = torch.from_numpy(shuffled).to(batches.home)
    losses = torch.empty(len(order), device=batches.device)
    correct = torch.zeros((), device=batches.device)
    for positions in _split(order, batches.batch):
        images, labels = batches(positions)
        with batches.autocast():
            logits = network(images)
        loss = functional.cross_entropy(logits.float(), labels, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.mean())
        optimizer.step()
        losses[positions.to(batches.device)] = loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
        advance(len(positions))
    return losses.cpu().numpy(), float(correct) / len(order)


def _split(order: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    """Batches of the order; a lone last sample, which batch norm cannot train on, joins the batch before."""
    import torch

    pieces = list(torch.split(order, batch))
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return iter(pieces)


def evaluate(network: nn.Module, batches: Batches, advance: Any) -> tuple[npt.NDArray[np.float32], float]:
    """Loss in nats of each sample in eval mode, and the accuracy."""
    import torch
    from torch.nn import functional

    network.eval()
    losses = torch.empty(len(batches.rows), device=batches.device)
    correct = torch.zeros((), device=batches.device)
    with torch.inference_mode(), batches.autocast():
        for positions in torch.split(torch.arange(len(batches.rows), device=batches.home), EVAL_BATCH):
            images, labels = batches(positions)
            logits = network(images).float()
            losses[positions.to(batches.device)] = functional.cross_entropy(logits, labels, reduction="none")
            correct += (logits.argmax(1) == labels).sum()
            advance(len(positions))
    return losses.cpu().numpy(), float(correct) / len(losses)


def trained(samples: Samples, resolved: Setup, checkpoint: Path) -> nn.Module:
    """The proxy as its last epoch left it, in eval mode and frozen.

    Args:
        samples: what it was trained on; gives the normalisation.
        checkpoint: as `train` writes it.

    Returns:
        A network that takes (B, 3, H, W) float32 images in [0, 1] and gives (B, C) float32 logits.
    """
    import torch
    from torch import nn

    class Normalise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mean, std = _channel_statistics(samples)
            self.mean: torch.Tensor
            self.std: torch.Tensor
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) / 255)
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) / 255)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images - self.mean) / self.std

    network = build(resolved.proxy, samples.classes, samples.pixels.shape[1])
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    whole = nn.Sequential(Normalise(), network).to(resolved.device).eval()
    return whole.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
