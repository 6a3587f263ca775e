"""Views of every class, in which a planted trigger stands apart from what is ordinary in images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import Images, ScoreInputs
from sanitize.scores.features import rows_by_class
from sanitize.scores.network import block_activations

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.intp]
Classes = Iterator[tuple[str, Rows, "torch.Tensor"]]
"""Name of a view, rows of one class, and (n, D) float32 values of theirs with mean 0."""

SIDES = (32, 16, 8)
"""Images are reduced to 32 px at most, to be whitened to the first side at which the corpus has three samples
for each of the 3·side² values: the covariance must be estimated, and at 32 it has nine million entries."""
_ROUNDING = 1e-3
"""About the standard deviation of what rounding to 8 bits does to a value in [0, 1]."""
_COVARIANCE_SAMPLES = 50_000
_SCALE_SAMPLES = 5_000
_CHUNK = 4_096
_NOISE = 1e-4
"""Directions with less than this share of the mean variance are left out: in 8-bit pixels they are
rounding."""


def pixels(inputs: ScoreInputs) -> Classes:
    """Pixels, whitened by the covariance that is left when classes are centred; D at most 3·32².

    At 32 px twice: as they are, and as ``patterns``, each image with the same norm. Along a blended picture
    the first have too little room between the trigger and the few most textured images; a few bright pixels
    are lost in the second. At fewer pixels clean classes fall into patterns, too.
    """
    images = inputs.images()
    side = next((side for side in SIDES if 9 * side**2 <= len(inputs.class_id)), SIDES[-1])
    for name, rows, values in _whitened("pixels", lambda rows: _values(images, rows, side), inputs):
        yield name, rows, values
        if side == SIDES[0]:
            yield "patterns", rows, _centred(_normed(values))


def activations(inputs: ScoreInputs) -> Classes:
    """Pooled activations of the proxy's early blocks, whitened likewise: every class once for each block."""
    import torch

    for values in block_activations(inputs.network(), inputs.images()):
        # Pooled activations are skewed; their logarithm is not, and asinh also takes negative ones.
        compressed = torch.from_numpy(np.arcsinh(20 * values))
        yield from _whitened("activations", compressed.__getitem__, inputs)


def frequencies(inputs: ScoreInputs) -> Classes:
    """Cosine transforms of brightness and two opponent colours, as a profile (see `_profiles`); D = 3·32².

    Ordinary images have little at high frequencies, a blended pattern has much.
    """
    images = inputs.images()
    return _profiles("frequencies", lambda rows: _values(images, rows, SIDES[0], _cosines), inputs, _ROUNDING)


def contrasts(inputs: ScoreInputs) -> Classes:
    """Signed roots of every pixel's brightness less that of its eight neighbours, as a profile; D = 32².

    The root keeps a few sharp edges from being all that counts; a sharp edge at the same place in many images
    of a class is what a patch makes.
    """
    images = inputs.images()
    return _profiles(
        "contrasts", lambda rows: _values(images, rows, SIDES[0], _edges), inputs, _ROUNDING**0.5
    )


def _cosines(part: torch.Tensor) -> torch.Tensor:
    import torch
    from scipy.fft import dctn

    opponent = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours = torch.einsum("oc,nchw->nohw", opponent / opponent.norm(dim=1, keepdim=True), part)
    return torch.from_numpy(dctn(colours.numpy(), axes=(2, 3), norm="ortho"))


def _edges(part: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    brightness = part.mean(1, keepdim=True)
    padded = functional.pad(brightness, (1, 1, 1, 1), mode="replicate")
    neighbours = (9 * functional.avg_pool2d(padded, 3, stride=1) - brightness) / 8
    difference = brightness - neighbours
    return difference.sign() * difference.abs().sqrt()


def _values(
    images: Images,
    rows: Rows,
    side: int,
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda part: part,
) -> torch.Tensor:
    """(len(rows), D) float32 of some of (N, H, W, 3) uint8, reduced to at most `side`.

    `transform` takes (B, 3, S, S) float32 in [0, 1].
    """
    import torch
    from torch.nn import functional

    parts = []
    for start in range(0, len(rows), _CHUNK):
        part = torch.from_numpy(images[rows[start : start + _CHUNK]]).permute(0, 3, 1, 2).float() / 255
        if part.shape[2] > side:
            part = functional.interpolate(part, size=(side, side), mode="area")
        parts.append(transform(part).flatten(1))
    return torch.cat(parts)


def _profiles(name: str, take: Callable[[Rows], torch.Tensor], inputs: ScoreInputs, floor: float) -> Classes:
    """Class by class, each value in units of its usual size in the corpus, each image with the same norm.

    Usual sizes are medians, which poison cannot move far: a covariance is stretched along a trigger by the
    very samples that carry it. The same norm, because else the few most textured images of a class are all
    its leading directions show (as in the spatial sign covariance of Locantore et al. 1999).
    """
    rng = np.random.default_rng([inputs.seed, 6])
    some = take(np.sort(rng.permutation(len(inputs.class_id))[:_SCALE_SAMPLES]))
    middle = some.median(0).values
    size = 1.4826 * (some - middle).abs().median(0).values + floor
    for rows in rows_by_class(inputs.class_id):
        yield name, rows, _centred(_normed((take(rows) - middle) / size))


def _whitened(name: str, take: Callable[[Rows], torch.Tensor], inputs: ScoreInputs) -> Classes:
    """Class by class, with the covariance that is left when classes are centred; `take` gives (n, D) rows."""
    import torch

    classes = rows_by_class(inputs.class_id)
    rng = np.random.default_rng([inputs.seed, 4])
    share = min(1.0, _COVARIANCE_SAMPLES / len(inputs.class_id))
    total: torch.Tensor | float = 0.0
    for rows in classes:
        values = _centred(take(np.sort(rng.permutation(rows)[: max(2, round(share * len(rows)))])))
        total = total + values.T @ values
    variance, directions = torch.linalg.eigh(torch.as_tensor(total))
    usable = variance > _NOISE * variance.mean().clamp(min=1e-9)
    if not usable.any():
        return  # all images of a class are alike
    whitening = directions[:, usable] / (variance[usable] / (share * len(inputs.class_id))).sqrt()
    for rows in classes:
        yield name, rows, _centred(take(rows)) @ whitening


def _normed(values: torch.Tensor) -> torch.Tensor:
    norms = values.norm(dim=1, keepdim=True) / values.shape[1] ** 0.5
    found: torch.Tensor = values / norms.clamp(min=1e-6)
    return found


def _centred(values: torch.Tensor) -> torch.Tensor:
    """In place: the values of a large class take gigabytes."""
    return values.sub_(values.mean(0))
