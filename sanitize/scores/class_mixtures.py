"""Per class: is it one population, or are there two? A planted trigger makes a crisp second one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sanitize.scores import Evidence, Group, ScoreInputs, mahalanobis
from sanitize.scores.features import log_losses
from sanitize.scores.network import block_activations

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

SIDES = (32, 16, 8)
"""Images are reduced to the first side at which the corpus has three samples for each of the 3·side² values:
the covariance must be estimated, and at 32 it has nine million entries."""
DIRECTIONS = 12
"""Leading directions of a class in which a second population is looked for; one for every 40 samples."""
STARTS = 6
"""Of them, those whose two ends begin a search."""
SEPARATION = 3.0
SEPARATION_SMALL = 50
"""Least Ashman's D of a group: SEPARATION + SEPARATION_SMALL / members, because a few odd images are soon far
from all others. In clean CIFAR-10 classes natural groups reach 2.6 in pixels and 3.05 in activations, a group
of 66 horses 3.5, one of 23 horses 4.8."""
LEAST_SAMPLES = 100
"""Smaller classes are not looked at."""
MIN_GROUP = 20
MAX_SHARE = 0.6
"""Above it the search has found the class and not the group."""
DEPLETED = 0.25
"""A group that is natural holds trusted samples as often as its class does. It is reported only if it holds
at most this share of the trusted samples expected there; in a class without any, nothing is reported."""
_COVARIANCE_SAMPLES = 50_000
_CLASS_SAMPLES = 20_000
_CHUNK = 4_096
_NOISE = 1e-4
"""Directions with less than this share of the mean variance are left out: in 8-bit pixels they are
rounding."""


def score(inputs: ScoreInputs) -> Floats:
    """(N,) float32 natural log odds of belonging to the most likely group of its class; -20 outside of all.

    Tang et al. test whether a class, in the last layer of a trained network and with the within-class
    covariance of all classes, is one normal population or two. Differences: we look at whitened pixels and at
    the early blocks of the proxy, because in its last layer clean classes are mixtures as well; at pooled
    activations; in the leading directions of the class; and a group needs a separation and few trusted
    samples instead of an outlying likelihood ratio, because several classes may be attacked at once.

    Source: Tang et al., "Demon in the Variant" (SCAn), USENIX Security 2021; Ashman et al. 1994 for D.
    """
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """The same with the groups."""
    groups = find(inputs, hints(inputs))
    odds = log_odds(groups, len(inputs.class_id))
    return Evidence(score=odds, signals={"group_log_odds": odds}, groups=distinct(groups, inputs.trusted))


def log_odds(groups: list[Group], samples: int) -> Floats:
    """(samples,) log odds of the most likely group, -20 outside of all."""
    best = np.full(samples, -20, np.float32)
    for group in groups:
        best[group.rows] = np.maximum(best[group.rows], group.log_odds)
    return best


def hints(inputs: ScoreInputs) -> list[Floats]:
    """(N,) each: how early a sample was learned, and how unusual its trajectory is.

    Early: minus the mean log loss from a tenth to 40 % of the epochs.
    """
    logs = log_losses(inputs.trajectories)
    epochs = logs.shape[1]
    early = -logs[:, epochs // 10 : max(epochs // 10 + 1, 2 * epochs // 5)].mean(axis=1)
    return [early, mahalanobis.score(inputs)]


def find(inputs: ScoreInputs, hints: list[Floats]) -> list[Group]:
    """Groups of all classes and signals, crispest first; the same samples may be in several.

    Args:
        hints: (N,) each, higher = more suspicious: the mean of a class's highest tenth minus that of the rest
            is looked along as well.
    """
    found: list[Group] = []
    for signal, classes in (("pixels", _whitened_pixels(inputs)), ("activations", _whitened_blocks(inputs))):
        for rows, values in classes:
            found += _groups(values, rows, inputs, signal, [hint[rows] for hint in hints])
    return sorted(found, key=lambda group: -group.separation)


def distinct(groups: list[Group], trusted: npt.NDArray[np.bool_]) -> list[Group]:
    """Groups that share more than half of the smaller one are one: the crispest, with the members of all."""
    kept: list[Group] = []
    for group in groups:
        place = next((i for i, other in enumerate(kept) if _same(group, other)), None)
        if place is None:
            kept.append(group)
        else:
            kept[place] = _joined(kept[place], group, trusted)
    return kept


def _same(one: Group, other: Group) -> bool:
    if one.class_id != other.class_id:
        return False
    shared = len(np.intersect1d(one.rows, other.rows, assume_unique=True))
    return 2 * shared > min(len(one.rows), len(other.rows))


def _joined(one: Group, other: Group, trusted: npt.NDArray[np.bool_]) -> Group:
    rows = np.union1d(one.rows, other.rows)
    odds = np.full(len(rows), -np.inf, np.float32)
    for group in (one, other):
        places = np.searchsorted(rows, group.rows)
        odds[places] = np.maximum(odds[places], group.log_odds)
    return replace(one, rows=rows, log_odds=odds, trusted=int(trusted[rows].sum()))


Classes = Iterator[tuple[npt.NDArray[np.intp], "torch.Tensor"]]
"""Rows of one class, and (n, D) float32 values in which the within-class covariance of all is the
identity."""


def _whitened_pixels(inputs: ScoreInputs) -> Classes:
    images = inputs.images()
    side = next((side for side in SIDES if 9 * side**2 <= len(inputs.class_id)), SIDES[-1])
    return _whitened(lambda rows: _flat(images, rows, side), inputs.class_id, inputs.seed)


def _flat(images: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp], side: int) -> torch.Tensor:
    """(len(rows), 3·S²) float32 in [0, 1] of some of (N, H, W, 3) uint8, S at most `side`."""
    import torch
    from torch.nn import functional

    parts = []
    for start in range(0, len(rows), _CHUNK):
        pixels = torch.from_numpy(images[rows[start : start + _CHUNK]]).permute(0, 3, 1, 2).float() / 255
        if pixels.shape[2] > side:
            pixels = functional.interpolate(pixels, size=(side, side), mode="area")
        parts.append(pixels.flatten(1))
    return torch.cat(parts)


def _whitened_blocks(inputs: ScoreInputs) -> Classes:
    import torch

    for values in block_activations(inputs.network(), inputs.images()):
        # Pooled activations are skewed; their logarithm is not, and asinh also takes negative ones.
        compressed = torch.from_numpy(np.arcsinh(20 * values))
        yield from _whitened(compressed.__getitem__, inputs.class_id, inputs.seed)


def _whitened(
    take: Callable[[npt.NDArray[np.intp]], torch.Tensor], class_id: npt.NDArray[np.int32], seed: int
) -> Classes:
    """Class by class, with the covariance that is left when classes are centred; `take` gives (n, D) rows."""
    import torch

    order = np.argsort(class_id, kind="stable")
    classes = [rows for rows in np.split(order, np.cumsum(np.bincount(class_id))[:-1]) if len(rows)]
    rng = np.random.default_rng([seed, 4])
    share = min(1.0, _COVARIANCE_SAMPLES / len(class_id))
    total: torch.Tensor | float = 0.0
    for rows in classes:
        values = _centred(take(np.sort(rng.permutation(rows)[: max(2, round(share * len(rows)))])))
        total = total + values.T @ values
    variance, directions = torch.linalg.eigh(torch.as_tensor(total))
    usable = variance > _NOISE * variance.mean().clamp(min=1e-9)
    if not usable.any():
        return  # all images of a class are alike
    whitening = directions[:, usable] / (variance[usable] / (share * len(class_id))).sqrt()
    for rows in classes:
        yield rows, _centred(take(rows)) @ whitening


def _centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(0)


def _groups(
    values: torch.Tensor,
    rows: npt.NDArray[np.intp],
    inputs: ScoreInputs,
    signal: str,
    hints: list[Floats],
) -> list[Group]:
    """Groups of one class; what is found is taken out and the rest looked at again, for the next attack."""
    found: list[Group] = []
    left = np.arange(len(rows))
    while len(left) >= LEAST_SAMPLES:
        splits = _splits(values[left], [hint[left] for hint in hints], inputs.seed)
        groups = [_group(split, rows[left], inputs, signal) for split in splits]
        accepted = [group for group in groups if group is not None]
        if not accepted:
            break
        found += accepted
        members = np.unique(np.concatenate([group.rows for group in accepted]))
        left = left[~np.isin(rows[left], members)]
    return found


def _group(split: _Split, rows: npt.NDArray[np.intp], inputs: ScoreInputs, signal: str) -> Group | None:
    """The upper population as a group, if it is crisp, neither tiny nor the class itself, and not trusted."""
    members = np.flatnonzero(split.log_odds > 0)
    if not MIN_GROUP <= len(members) <= MAX_SHARE * len(rows):
        return None
    if split.separation < SEPARATION + SEPARATION_SMALL / len(members):
        return None
    trusted = inputs.trusted[rows]
    held = int(trusted[members].sum())
    if not trusted.any() or held > DEPLETED * trusted.mean() * len(members):
        return None
    order = np.argsort(rows[members])
    return Group(
        class_id=int(inputs.class_id[rows[0]]),
        signal=signal,
        rows=rows[members][order],
        separation=split.separation,
        trusted=held,
        log_odds=split.log_odds[members][order].astype(np.float32),
    )


def _splits(values: torch.Tensor, hints: list[Floats], seed: int) -> list[_Split]:
    """The class in two, begun from both ends of each leading direction, and from where a hint points."""
    import torch

    leading = _leading(values, min(DIRECTIONS, len(values) // 40), seed)
    z = (values @ leading).double().numpy()
    splits = [_split(z, sign * z[:, start]) for start in range(min(STARTS, z.shape[1])) for sign in (1, -1)]
    for hint in hints:
        high = torch.from_numpy(hint >= np.quantile(hint, 0.9))
        pointed = values @ (values[high].mean(0) - values[~high].mean(0))
        with_hint = np.column_stack([z, pointed.double().numpy() / max(float(pointed.std()), 1e-12)])
        splits.append(_split(with_hint, with_hint[:, -1]))
    return [split for split in splits if split is not None]


def _leading(values: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(D, at most count) orthonormal directions of the largest variance."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step = -(-len(values) // _CLASS_SAMPLES)
        found: torch.Tensor = torch.svd_lowrank(values[::step], q=min(count + 6, *values.shape), niter=4)[2]
        return found[:, :count]


@dataclass(frozen=True)
class _Split:
    log_odds: npt.NDArray[np.float64]
    separation: float


def _split(z: npt.NDArray[np.float64], start: npt.NDArray[np.float64]) -> _Split | None:
    """Two populations of (n, k) values that share a covariance, begun with the highest tenth of `start`.

    Fisher's discriminant and a one-dimensional mixture along it in turns, until the members stay.
    """
    inside = _mixture(start, start > np.quantile(start, 0.9))
    spread = z.T @ z / len(z)
    for _ in range(20):
        if inside is None:
            return None
        weight = inside.log_odds > 0
        share = weight.mean()
        if weight.sum() < MIN_GROUP // 2 or share > 0.9:
            return None
        high, low = z[weight].mean(0), z[~weight].mean(0)
        within = spread - share * np.outer(high, high) - (1 - share) * np.outer(low, low)
        within[np.diag_indices(len(within))] += 0.01
        along = z @ np.linalg.solve(within, high - low)
        following = _mixture(along, weight)
        if following is None or np.array_equal(following.log_odds > 0, weight):
            return following
        inside = following
    return inside


def _mixture(values: npt.NDArray[np.float64], upper: npt.NDArray[np.bool_]) -> _Split | None:
    """EM of two normal populations with spreads of their own; `upper` begins as the higher one."""
    weight = upper.astype(float)
    floor = 1e-4 * values.var()
    for _ in range(30):
        share = weight.mean()
        if share * len(values) < MIN_GROUP // 2 or share > 0.9:
            return None
        high, low = np.average(values, weights=weight), np.average(values, weights=1 - weight)
        high_variance = np.average((values - high) ** 2, weights=weight) + floor
        low_variance = np.average((values - low) ** 2, weights=1 - weight) + floor
        odds = np.log(share / (1 - share)) + 0.5 * (
            np.log(low_variance / high_variance)
            + (values - low) ** 2 / low_variance
            - (values - high) ** 2 / high_variance
        )
        odds[values < low] = -50  # a wide upper population does not reach round to the other side
        previous, weight = weight, 1 / (1 + np.exp(-np.clip(odds, -50, 50)))
        if np.abs(weight - previous).max() < 1e-3:
            break
    separation = (high - low) * np.sqrt(2 / (high_variance + low_variance))
    return _Split(np.clip(odds, -50, 50), float(separation))
