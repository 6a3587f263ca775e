"""Frequency analysis: a classifier that knows drawn-in artefacts by their cosine transform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import ScoreInputs
from sanitize.scores.features import FOLDS, folds

if TYPE_CHECKING:
    import torch
    from torch import nn

EPOCHS = 40
BATCH = 64
_JUDGE_BATCH = 1_024
_FLOOR = 1e-3

Images = npt.NDArray[np.float32]


def score(inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """Log odds of "has an artefact drawn in" against "trusted", by classifiers that did not see the sample.

    Every fold's classifier learns log |DCT| of the other folds' trusted images, as they are and with one of
    five artefacts each, drawn anew in every epoch.

    Returns:
        (N,) float32, unbounded; higher = more suspicious.

    Source: Zeng et al., ICCV 2021, arXiv 2104.03413. Where we differ: only trusted images are trained on, as
    in Alex et al. (ICLR 2025, appendix I.2); three convolutions instead of six, for a few hundred images;
    the score is thresholded like any other rather than at even odds, where about half of the clean images
    of CIFAR-10 would go.
    """
    import torch

    images = inputs.images()
    fold = folds(inputs.class_id, inputs.trusted, np.random.default_rng([inputs.seed, 1]))
    odds = np.empty(len(images), np.float32)
    for held_out in range(FOLDS):
        rows = np.flatnonzero(inputs.trusted & (fold != held_out))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(inputs.seed + held_out)
            rng = np.random.default_rng([inputs.seed, held_out])
            detector = _Detector(_to_float(images[rows]), rng, inputs.gpu)
        judged = np.flatnonzero(fold == held_out)
        for start in range(0, len(judged), _JUDGE_BATCH):
            batch = judged[start : start + _JUDGE_BATCH]
            odds[batch] = detector(_to_float(images[batch]))
    return odds


def _to_float(images: npt.NDArray[np.uint8]) -> Images:
    return images.astype(np.float32) / np.float32(255)


def spectrum(images: Images) -> npt.NDArray[np.float32]:
    """(N, H, W, 3) images in [0, 1] to (N, 3, H, W) natural log of the absolute orthonormal 2-D DCT."""
    from scipy.fft import dctn

    values = dctn(images, axes=(1, 2), norm="ortho")
    logs: npt.NDArray[np.float32] = np.log(np.abs(values) + np.float32(_FLOOR)).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(logs, dtype=np.float32)


class _Detector:
    """A small convolutional network on standardised spectra, trained when it is made."""

    def __init__(self, clean: Images, rng: np.random.Generator, gpu: bool) -> None:
        import torch
        from torch.nn import functional

        self._device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        logs = spectrum(clean)
        self._mean, self._std = logs.mean(axis=0), logs.std(axis=0) + np.float32(1e-3)
        self._network = _network().to(self._device)
        optimizer = torch.optim.AdamW(self._network.parameters(), 2e-3, weight_decay=1e-2)
        for _ in range(EPOCHS):
            both = np.concatenate([logs, spectrum(with_artefacts(clean, rng))])
            order = rng.permutation(len(both))
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                wanted = torch.from_numpy((rows >= len(clean)).astype(np.float32)).to(self._device)
                loss = functional.binary_cross_entropy_with_logits(self._logits(both[rows]), wanted)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
        self._network.eval()

    def __call__(self, images: Images) -> npt.NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            odds: npt.NDArray[np.float32] = self._logits(spectrum(images)).float().cpu().numpy()
        return odds

    def _logits(self, logs: npt.NDArray[np.float32]) -> torch.Tensor:
        import torch

        standard = torch.from_numpy((logs - self._mean) / self._std).to(self._device)
        return self._network(standard)[:, 0]  # type: ignore[no-any-return]


def _network() -> nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 1)
    )


def with_artefacts(images: Images, rng: np.random.Generator) -> Images:
    """A copy with one random artefact drawn into every image.

    White or coloured patches, copied patches of another image, additive noise, a smooth shadow, or a faint
    blend with noise: the manipulations of Zeng et al., section 4.

    Args:
        images: (N, H, W, 3) float32 in [0, 1].
    """
    drawn = images.copy()
    for row, kind in enumerate(rng.integers(0, 5, len(images))):
        image = drawn[row]
        if kind == 0:
            top, left, side = _corner(image, rng)
            image[top : top + side, left : left + side] = rng.random((1, 1, 3)) if rng.random() < 0.5 else 1
        elif kind == 1:
            top, left, side = _corner(image, rng)
            other = images[rng.integers(len(images))]
            image[top : top + side, left : left + side] = other[:side, :side]
        elif kind == 2:
            image += rng.normal(0, rng.uniform(0.02, 0.1), image.shape)
        elif kind == 3:
            image *= 1 - _shadow(image, rng)
        else:
            opacity = rng.uniform(0.05, 0.2)
            image[:] = (1 - opacity) * image + opacity * rng.random(image.shape)
    return drawn.clip(0, 1).astype(np.float32)


def _corner(image: Images, rng: np.random.Generator) -> tuple[int, int, int]:
    height, width = image.shape[:2]
    side = int(rng.integers(1, max(2, min(height, width) // 4) + 1))
    return int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1)), side


def _shadow(image: Images, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(H, W, 1) share of light taken away by a half-plane with a soft edge."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * (columns - width * rng.random()) + np.sin(angle) * (rows - height * rng.random())
    soft = 1 / (1 + np.exp(-np.clip(across / rng.uniform(0.5, 3), -30, 30)))
    shade: npt.NDArray[np.float32] = (rng.uniform(0.2, 0.6) * soft[:, :, None]).astype(np.float32)
    return shade
