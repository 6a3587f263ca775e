"""From scores to a decision: p-values, thresholds, the per-class cap, and a reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from sanitize.config import CONFIDENCE, MIN_CLASS_TRUSTED, DecisionConfig, least_alpha
from sanitize.errors import InputError
from sanitize.scores import ScoreInputs
from sanitize.scores.features import log_losses, rows_by_class


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision over the usable samples, in their order; trusted samples are never flagged."""

    p_value: npt.NDArray[np.float32]
    """(N,) conformal p-values, see `conformal_p_values`."""
    flagged: npt.NDArray[np.bool_]
    """(N,) True = to be quarantined."""
    spared_by_cap: int
    """Samples over the threshold that the per-class cap kept."""
    score: npt.NDArray[np.float32]
    """(N,) what was compared with the threshold: centred within classes for alpha, as they are for reject."""
    threshold: float | None
    """The lowest such score over the threshold; None when nothing is."""
    trusted_flagged_ratio: float
    """Share of the trusted samples that the same rule would have flagged."""


def decide(
    scores: npt.NDArray[np.float32],
    class_id: npt.NDArray[np.int32],
    trusted: npt.NDArray[np.bool_],
    config: DecisionConfig,
) -> Decision:
    """Flag the samples that the settings call too suspicious.

    With alpha: reject p <= alpha. With reject: the share of the corpus with the highest scores.

    Args:
        scores: (N,) float32, higher = more suspicious.
        class_id: (N,) int32.
        trusted: (N,) bool.
        config: alpha or reject, and the per-class cap.

    Raises:
        InputError: alpha is below what so few trusted samples can tell.
    """
    check_alpha(config.alpha, int(trusted.sum()))
    centred = centre_within_class(scores, class_id)
    p_value = conformal_p_values(centred, trusted)
    if config.alpha is not None:
        scores = centred.astype(np.float32)
        over = p_value <= config.alpha
    else:
        assert config.reject is not None
        over = _highest(scores, ~trusted, round(config.reject * int((~trusted).sum())), trusted)
    wanted = over & ~trusted
    flagged = (
        wanted if config.class_cap is None else _cap(wanted, scores, class_id, trusted, config.class_cap)
    )
    return Decision(
        p_value=p_value,
        flagged=flagged,
        spared_by_cap=int(wanted.sum() - flagged.sum()),
        score=scores,
        threshold=float(scores[wanted].min()) if wanted.any() else None,
        trusted_flagged_ratio=float(over[trusted].mean()),
    )


def check_alpha(alpha: float | None, trusted: int) -> None:
    """No p-value is below what so few trusted samples can tell: a smaller alpha would flag nothing."""
    needed = 0 if alpha is None else math.ceil(math.log1p(-CONFIDENCE) / math.log1p(-alpha))
    if trusted < needed:
        raise InputError(
            f"--alpha {alpha:g} needs at least {needed} usable trusted samples and there are {trusted}; take "
            f"--alpha {least_alpha(trusted):g} or more, or --reject"
        )


def conformal_p_values(
    scores: npt.NDArray[np.floating], trusted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """The share of clean samples that score at least as high, at most, with a confidence of 90 %.

    By (1 + j) / (n + 1), with j of n trusted samples scoring at least as high, a share alpha of the clean
    samples is lost on average over many trusted sets, and more than alpha with every second one. This is the
    upper confidence bound instead, the quantile of Beta(1 + j, n - j): a calibration-conditional p-value.

    All trusted samples are pooled, because a class seldom has enough of them for p-values of its own.

    Args:
        scores: (N,) higher = more suspicious; the trusted ones scored out of fold.
        trusted: (N,) bool, at least one True.

    Returns:
        (N,) float32 in (0, 1]. Of clean samples that are drawn like the trusted ones at most a share alpha
        has p <= alpha, with nine trusted sets in ten. Nothing is promised about how much poison has.

    Source: Vovk et al. 2005; Vovk 2012; Bates et al. 2023, arXiv 2104.08279, section 3.
    """
    calibration = np.sort(scores[trusted])
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    # A trusted sample is compared with the others only: it counts as its own "1 +".
    among_all = _upper_bounds(len(calibration))[np.minimum(1 + at_least, len(calibration) + 1)]
    among_others = _upper_bounds(len(calibration) - 1)[np.clip(at_least, 1, len(calibration))]
    return np.where(trusted, among_others, among_all).astype(np.float32)


def _upper_bounds(count: int) -> npt.NDArray[np.float64]:
    """(count + 2,) at 1 + j: the bound where j of `count` trusted samples score at least as high."""
    ranks = np.arange(1, count + 1)
    return np.concatenate([[0.0], betaincinv(ranks, count + 1 - ranks, CONFIDENCE), [1.0]])


def centre_within_class(
    scores: npt.NDArray[np.float32], class_id: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """(N,) scores minus their class's lower quartile, so that no class is judged harder for being hard.

    The lower quartile, because poison sits at the high end: in a class with a fifth of poison the median
    would follow it. Dividing by a class's spread as well was tried and hides poison (docs/experiments.md).
    """
    values = scores.astype(np.float64)
    for rows in rows_by_class(class_id):
        values[rows] -= np.percentile(values[rows], 25)
    return values


def _highest(
    scores: npt.NDArray[np.float32], eligible: npt.NDArray[np.bool_], count: int, also: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """The `count` eligible rows with the highest scores (ties: first come), and `also` rows over them.

    Where the lowest chosen score is shared with rows that were not chosen, `also` rows must be above it.
    """
    rows = np.flatnonzero(eligible)
    order = rows[np.argsort(-scores[rows], kind="stable")]
    over = np.zeros(len(scores), bool)
    if count:
        over[order[:count]] = True
        lowest = scores[order[count - 1]]
        tied = count < len(order) and scores[order[count]] == lowest
        over |= also & (scores > lowest if tied else scores >= lowest)
    return over


def _cap(
    wanted: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float32],
    class_id: npt.NDArray[np.int32],
    trusted: npt.NDArray[np.bool_],
    cap: float,
) -> npt.NDArray[np.bool_]:
    limits = np.floor(np.bincount(class_id[~trusted], minlength=class_id.max() + 1) * cap).astype(int)
    rows = np.flatnonzero(wanted)
    rows = rows[np.lexsort((-scores[rows], class_id[rows]))]
    counts = np.bincount(class_id[rows], minlength=len(limits))
    position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    flagged = np.zeros_like(wanted)
    flagged[rows[position < limits[class_id[rows]]]] = True
    return flagged


def anomaly_scores(
    scores: npt.NDArray[np.float32], trusted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """(N,) float32 in [0, 1]: the share of corpus samples that are at most as suspicious."""
    pool = np.sort(scores[~trusted])
    return (np.searchsorted(pool, scores, side="right") / len(pool)).astype(np.float32)


_HIGH_WORDS = {
    "early_log_loss": "learned later than",
    "late_log_loss": "fits worse at the end than",
    "loss_swing": "its loss jumps between epochs more than that of",
}
_LOW_WORDS = {
    "early_log_loss": "learned earlier than",
    "late_log_loss": "fits better at the end than",
}


def signals(trajectories: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Plain summaries of a trajectory, each (N,) float32: what the reasons and decisions.parquet show.

    early_log_loss and late_log_loss are the mean log loss over the first and the last third of the kept
    epochs; loss_swing is the standard deviation of its change from epoch to epoch.
    """
    logs = log_losses(trajectories)
    third = max(1, logs.shape[1] // 3)
    return {
        "early_log_loss": logs[:, :third].mean(axis=1),
        "late_log_loss": logs[:, -third:].mean(axis=1),
        "loss_swing": np.diff(logs, axis=1).std(axis=1),
    }


def reasons(
    inputs: ScoreInputs, found: dict[str, npt.NDArray[np.float32]], rows: npt.NDArray[np.intp]
) -> list[str]:
    """A reason in words for each of `rows`.

    Args:
        found: (N,) each: the signals of the method. Membership in a group comes before a label conflict, and
            this before the trait of the trajectory that differs most from the trusted samples.
    """
    if "label_conflict" in found:
        words = _conflict_reasons(inputs, found, rows)
    else:
        words = _trajectory_reasons(inputs, rows)
    if "group_log_odds" not in found:
        return words
    return [
        "shares something with other samples of its label" if odds > 0 else text
        for odds, text in zip(found["group_log_odds"][rows], words, strict=True)
    ]


def _trajectory_reasons(inputs: ScoreInputs, rows: npt.NDArray[np.intp]) -> list[str]:
    """The trait in which each of `rows` differs most from the trusted samples."""
    summaries = signals(inputs.trajectories)
    extremes = [_extremes(inputs, values, rows) for values in summaries.values()]
    names = list(summaries)
    above = np.stack([high for high, _, _ in extremes])
    below = np.stack(
        [low if name in _LOW_WORDS else low * 0 for name, (_, low, _) in zip(names, extremes, strict=True)]
    )
    of_class = extremes[0][2]
    both = np.concatenate([above, below])
    best = both.argmax(axis=0)
    words = [_HIGH_WORDS[name] for name in names] + [_LOW_WORDS.get(name, "") for name in names]
    return [
        _sentence(words[which], both[which, column], own) if both[which, column] >= 0.8 else _NO_SINGLE_TRAIT
        for column, (which, own) in enumerate(zip(best, of_class, strict=True))
    ]


_CONFLICT_WORDS = {
    "label_conflict": "a second, augmented model believes its label less than those of",
    "shortcut": "the proxy learned it early and a second, augmented model did not, by more than for",
}


def _conflict_reasons(
    inputs: ScoreInputs, found: dict[str, npt.NDArray[np.float32]], rows: npt.NDArray[np.intp]
) -> list[str]:
    """The side on which each of `rows` lies above more of the trusted samples: too hard, or too easy."""
    sides = [name for name in _CONFLICT_WORDS if name in found]  # runs of older versions have the first alone
    extremes = [_extremes(inputs, found[name], rows) for name in sides]
    above = np.stack([high for high, _, _ in extremes])
    words = [_CONFLICT_WORDS[name] for name in sides]
    return [
        _sentence(words[which], above[which, column], own)
        if above[which, column] >= 0.8
        else _NO_SINGLE_CONFLICT
        for column, (which, own) in enumerate(zip(above.argmax(axis=0), extremes[0][2], strict=True))
    ]


def group_reason(group: dict[str, Any]) -> str:
    """The reason of all members of a group, as groups.json records it."""
    where = {
        "pixels": "its pixels",
        "patterns": "its pattern",
        "frequencies": "its frequencies",
        "contrasts": "its contrasts from pixel to pixel",
        "activations": "what the proxy's first layers see in it",
    }
    others = len(group["rows"]) - 1
    return f"shares something in {where[group['signal']]} with about {others:,} others of its label"


_NO_SINGLE_CONFLICT = (
    "how it was learned and what a second, augmented model makes of its label do not go together"
)
_NO_SINGLE_TRAIT = "no single trait stands out: its trajectory as a whole is unlike the trusted ones"


def _sentence(words: str, share: float, of_class: bool) -> str:
    amount = "all" if share >= 1 else f"{int(share * 100)} % of"
    whose = "trusted samples of its class" if of_class else "trusted samples (its class has too few)"
    return f"{words} {amount} {whose}"


def _extremes(
    inputs: ScoreInputs, values: npt.NDArray[np.float32], rows: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Per row: shares of trusted samples that lie below and above it, and whether they are its class's."""
    trusted_values, trusted_class = values[inputs.trusted], inputs.class_id[inputs.trusted]
    everyone = np.sort(trusted_values)
    above, below = np.empty(len(rows)), np.empty(len(rows))
    of_class = np.zeros(len(rows), bool)
    for class_id in np.unique(inputs.class_id[rows]):
        mine = inputs.class_id[rows] == class_id
        own = np.sort(trusted_values[trusted_class == class_id])
        enough = len(own) >= MIN_CLASS_TRUSTED
        reference = own if enough else everyone
        above[mine] = np.searchsorted(reference, values[rows[mine]], side="left") / len(reference)
        below[mine] = 1 - np.searchsorted(reference, values[rows[mine]], side="right") / len(reference)
        of_class[mine] = enough
    return above, below, of_class
