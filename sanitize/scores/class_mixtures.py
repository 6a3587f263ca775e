"""Per class: is it one population, or are there two? A planted trigger makes a crisp second one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sanitize.config import MIN_CLASS_TRUSTED
from sanitize.scores import Evidence, Group, ScoreInputs, mahalanobis, views
from sanitize.scores.features import FOLDS, early_log_loss

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

GROUPS = True
VIEWS = (views.pixels, views.frequencies, views.contrasts, views.activations)
DIRECTIONS = 12
"""Leading directions of a class in which a second population is looked for; one for every 40 samples."""
STARTS = 6
"""Of them, those whose two ends begin a search."""
SEPARATION = {"pixels": 3.0, "patterns": 2.7, "frequencies": 6.0, "contrasts": 3.0, "activations": 3.0}
"""Least Ashman's D of a group in each view, to which `least_separation` adds something for small groups: a
few odd images are soon far from all others. Natural groups of clean CIFAR-10 classes reach 2.6 in pixels and
3.05 in activations (a group of 66 horses 3.5, one of 23 horses 4.8), 5.9 in frequencies (24 samples; 4.7 over
100), in contrasts 4.6 (32 of 600), 4.3 (80 of 5,000) or 3.5 (160 of 5,000), and in patterns 4.1 (27 of 1,000)
or 2.9 (216 of 5,000)."""
SMALL = 50
"""Added to the least separation in every view: this much over the number of members."""
RARE = 0.03
"""Added in contrasts and patterns: this much over the share of the class, as small natural groups are the
rule there."""
LEAST_SAMPLES = 100
"""Smaller classes are not looked at."""
MIN_GROUP = 20
MAX_SHARE = 0.6
"""Above it the search has found the class and not the group."""
DEPLETED = 0.25
"""A group that is natural holds trusted samples as often as its class does. It is suspected only if it holds
at most this share of the trusted samples expected there; with fewer trusted samples of its class than
MIN_CLASS_TRUSTED that says too little, and nothing is reported."""
_CLASS_SAMPLES = 20_000
SAMPLE_BYTES = 5 * 4 * 3 * 32**2
"""Memory for each sample of the largest class: its pixels as float32, about five times over."""


class Found(NamedTuple):
    """Groups of all classes and signals, crispest first; the same samples may be in several."""

    suspected: list[Group]
    """They hold few or none of the trusted samples of their class."""
    shared: list[Group]
    """They hold more of them: natural, or poison that is among the trusted samples as well."""

    def distinct(self, trusted: npt.NDArray[np.bool_]) -> dict[str, list[Group]]:
        """The two lists by their names in `Evidence`, each group once."""
        suspected = distinct(self.suspected, trusted)
        others = [group for group in self.shared if not any(_same(group, own) for own in suspected)]
        return {"groups": suspected, "shared_groups": distinct(others, trusted)}


def score(inputs: ScoreInputs) -> Floats:
    """(N,) float32 natural log odds of belonging to the most likely group of its class; -20 outside of all.

    Tang et al. test whether a class, in the last layer of a trained network and with the within-class
    covariance of all classes, is one normal population or two. Differences: we look at pixels in several
    views and at the early blocks of the proxy, because in its last layer clean classes are mixtures as well;
    at pooled activations; in the leading directions of the class; and a group needs a separation and few
    trusted samples instead of an outlying likelihood ratio, because several classes may be attacked at once.

    Source: Tang et al., "Demon in the Variant" (SCAn), USENIX Security 2021; Ashman et al. 1994 for D.
    """
    return evidence(inputs).score


def evidence(inputs: ScoreInputs) -> Evidence:
    """The same with the groups."""
    found = find(inputs, hints(inputs))
    odds = log_odds(found.suspected, len(inputs.class_id))
    return Evidence(score=odds, signals={"group_log_odds": odds}, **found.distinct(inputs.trusted))


def log_odds(groups: list[Group], samples: int) -> Floats:
    """(samples,) log odds of the most likely group, -20 outside of all."""
    best = np.full(samples, -20, np.float32)
    for group in groups:
        best[group.rows] = np.maximum(best[group.rows], group.log_odds)
    return best


def hints(inputs: ScoreInputs) -> list[Floats]:
    """(N,) each: how early a sample was learned, and how unusual its trajectory is."""
    return [-early_log_loss(inputs.trajectories), mahalanobis.score(inputs)]


def find(inputs: ScoreInputs, hints: list[Floats]) -> Found:
    """Groups of all classes and signals.

    Args:
        hints: (N,) each, higher = more suspicious: the mean of a class's highest tenth minus that of the rest
            is looked along as well.
    """
    found = Found([], [])
    for view in VIEWS:
        for signal, rows, values in view(inputs):
            _add_groups(found, values, rows, inputs, signal, [hint[rows] for hint in hints])
    for groups in found:
        groups.sort(key=lambda group: -group.separation)
    return found


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


def _add_groups(
    found: Found,
    values: torch.Tensor,
    rows: npt.NDArray[np.intp],
    inputs: ScoreInputs,
    signal: str,
    hints: list[Floats],
) -> None:
    """Groups of one class; suspected ones are taken out and the rest looked at again, for the next attack."""
    if inputs.trusted[rows].sum() < MIN_CLASS_TRUSTED:
        return
    left = np.arange(len(rows))
    while len(left) >= LEAST_SAMPLES:
        own = values if len(left) == len(rows) else values[left]
        splits = _splits(own, [hint[left] for hint in hints], inputs.seed)
        groups = [_group(split, rows[left], inputs, signal) for split in splits]
        crisp = [group for group in groups if group is not None]
        trusted = inputs.trusted[rows[left]]
        suspected = [group for group in crisp if _lacks_trusted(group, trusted)]
        if not suspected:
            # holding most of its trusted samples makes it the class itself, beside a large attack
            found.shared.extend(g for g in crisp if 2 * g.trusted <= inputs.trusted[rows].sum())
            break
        found.suspected.extend(suspected)
        members = np.unique(np.concatenate([group.rows for group in suspected]))
        left = left[~np.isin(rows[left], members)]


def _lacks_trusted(group: Group, trusted: npt.NDArray[np.bool_]) -> bool:
    """Whether a group has too few of the (n,) trusted samples that it was found among to be natural."""
    lacks: np.bool_ = group.trusted <= DEPLETED * trusted.mean() * len(group.rows)
    return bool(lacks)


def _group(split: _Split, rows: npt.NDArray[np.intp], inputs: ScoreInputs, signal: str) -> Group | None:
    """The upper population as a group, if it is crisp and neither tiny nor the class itself."""
    members = np.flatnonzero(split.log_odds > 0)
    if not MIN_GROUP <= len(members) <= MAX_SHARE * len(rows):
        return None
    if split.separation < least_separation(signal, len(members), len(members) / len(rows)):
        return None
    order = np.argsort(rows[members])
    return Group(
        class_id=int(inputs.class_id[rows[0]]),
        signal=signal,
        rows=rows[members][order],
        separation=split.separation,
        trusted=int(inputs.trusted[rows[members]].sum()),
        log_odds=split.log_odds[members][order].astype(np.float32),
    )


def least_separation(signal: str, members: int, share: float) -> float:
    """Ashman's D from which on a group of that many samples, that share of the class's rest, counts."""
    least = SEPARATION[signal] + SMALL / members
    return least + RARE / share if signal in ("contrasts", "patterns") else least


def _splits(values: torch.Tensor, hints: list[Floats], seed: int) -> list[_Split]:
    """The class in two, begun from both ends of each leading direction, and from where a hint points."""
    leading = _leading(values, min(DIRECTIONS, len(values) // 40), seed)
    z = (values @ leading).double().numpy()
    splits = [_split(z, sign * z[:, start]) for start in range(min(STARTS, z.shape[1])) for sign in (1, -1)]
    for hint in hints:
        with_hint = np.column_stack([z, _pointed(values, hint)])
        splits.append(_split(with_hint, with_hint[:, -1]))
    return [split for split in splits if split is not None]


def _pointed(values: torch.Tensor, hint: Floats) -> npt.NDArray[np.float64]:
    """(n,) along the difference between the highest tenth of the hint and the rest, out of fold.

    In as many dimensions as there are samples any tenth stands apart along its own mean.
    """
    import torch

    high = torch.from_numpy(hint >= np.quantile(hint, 0.9))
    fold = torch.arange(len(values)) % FOLDS
    inside = torch.nn.functional.one_hot(fold, FOLDS).to(values.dtype)
    directions = _means_of_others(values, inside * high[:, None])
    directions -= _means_of_others(values, inside * ~high[:, None])
    along = (values @ directions.T).gather(1, fold[:, None]).double()
    spread = torch.stack([along[fold == k].std() for k in range(FOLDS)]).clamp(min=1e-12)
    found: npt.NDArray[np.float64] = (along[:, 0] / spread[fold]).numpy()
    return found


def _means_of_others(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """(FOLDS, D) for each fold the mean of the (n, D) values marked in other columns of (n, FOLDS)."""
    sums, counts = inside.T @ values, inside.sum(0)
    return (sums.sum(0) - sums) / (counts.sum() - counts).clamp(min=1)[:, None]


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
