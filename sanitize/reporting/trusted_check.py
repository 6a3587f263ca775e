"""What speaks for and against the trusted set, from the run folder alone.

A check has a level: fine, gap (the report is worth less for it) or alarm (to be cleared up first).
A trusted sample that a check picks out gets a reason, and whatever has one is listed in the report.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sanitize.config import MIN_CLASS_TRUSTED
from sanitize.reporting.facts import Facts, RunData, bonferroni_z, is_very_clear, take, wilson
from sanitize.reporting.text import listed, number_of, percent, rounded, shorten, visible

HIGH_SHARE = 0.005
"""A trusted sample is listed if no more than this share of the corpus scores higher."""
CHANCE = 0.01
"""As many of them as clean samples show with less than this probability are an alarm."""
ALARMING_MEMBERS = 3
"""Fewer trusted samples than this in suspected attacks may have got there by chance."""
LARGE_GROUP = 100
"""Smaller groups of natural samples may be very clear, so that they are no alarm."""
NAMED = 5

Reasons = dict[int, list[str]]
"""Why to look at a trusted sample, by its index row."""


def trusted_check(data: RunData, classes: list[Facts], excess: Facts) -> Facts:
    """Checks by name, a judgement in words, and the trusted samples to look at.

    Args:
        classes: rows of the report's class table.
        excess: of `facts.collect`.
    """
    reasons: Reasons = defaultdict(list)
    checks: dict[str, Facts] = {}
    if not len(data.trusted_rows):
        checks["usable"] = _check("alarm", "No trusted sample could be used.")
    else:
        if excess.get("high", 0) < 0:
            checks["excess"] = _check("alarm", "The trusted samples look stranger than the corpus.")
        if data.groups:
            checks["suspected_attacks"] = _in_attacks(data, reasons)
        if data.shared_groups:
            checks["shared_groups"] = _in_shared_groups(data, reasons)
        scored = np.isfinite(data.raw_scores)
        if scored[: data.n].any() and scored[data.trusted_rows].any():
            checks["scores"] = _high_scores(data, reasons)
        checks["corpus_copies"] = _corpus_copies(data, reasons)
        checks["own_copies"] = _own_copies(data, reasons)
        checks["coverage"], checks["shares"] = _coverage(classes), _shares(classes)
        if data.trusted_unusable:
            unusable = number_of(data.trusted_unusable, "trusted sample")
            checks["usable"] = _check("gap", f"{unusable} could not be used.")
    alarms = [check["text"] for check in checks.values() if check["level"] == "alarm"]
    return {
        "judgement": _judgement(alarms, sum(check["level"] == "gap" for check in checks.values())),
        "alarming": bool(alarms),
        "samples": len(data.trusted_rows),
        "checks": checks,
        "suspects": _suspects(data, reasons),
    }


def _judgement(alarms: list[str], gaps: int) -> str:
    if alarms:
        return f"Check it before you rely on this report. {' '.join(alarms)}"
    if gaps:
        return f"Nothing in it is alarming, but it falls short in {number_of(gaps, 'respect')}."
    return "Nothing speaks against it."


def _check(level: str, text: str, **numbers: object) -> Facts:
    return {"level": level, "text": text, **numbers}


def _in_attacks(data: RunData, reasons: Reasons) -> Facts:
    for number, group in enumerate(data.groups, start=1):
        for row in group["rows"]:
            if row >= data.n:
                reasons[row].append(f"belongs to suspected attack {number}")
    inside = len(reasons)
    if not inside:
        return _check("fine", "No trusted sample belongs to a suspected attack.", samples=0)
    belongs = "belongs" if inside == 1 else "belong"
    text = f"{number_of(inside, 'trusted sample')} {belongs} to a suspected attack."
    return _check("alarm" if inside >= ALARMING_MEMBERS else "gap", text, samples=inside)


def _in_shared_groups(data: RunData, reasons: Reasons) -> Facts:
    """Groups as crisp as an attack's that trusted samples are in: natural, or the trusted set is poisoned."""
    named = []
    for group in data.shared_groups:
        label = shorten(visible(group["label"]), 40)
        size = rounded(len(data.members(group)))
        named.append(f"about {size} labelled {label}, with {number_of(group['trusted'], 'trusted sample')}")
        for row in group["rows"]:
            if row >= data.n:
                reasons[row].append(
                    f"belongs to a group of about {size} that stands apart from the rest of {label}"
                )
    large = [group for group in data.shared_groups if len(group["rows"]) >= LARGE_GROUP]
    clear = [group for group in large if is_very_clear(group)]
    several = len(data.shared_groups) > 1
    where = f"in {len(data.shared_groups):,} groups" if several else "among samples"
    return _check(
        "alarm" if clear else "gap",
        f"Trusted samples are {where} that stand apart from the rest of their label as an attack's do: "
        f"{listed(named, NAMED)}. That is natural, as of one photographer or one kind of cut-out, or the "
        "same poison is in the trusted set, and then the group was not taken out. Look at these samples.",
        groups=len(data.shared_groups),
        very_clear=len(clear),
    )


def _high_scores(data: RunData, reasons: Reasons) -> Facts:
    from scipy.special import bdtrc

    corpus = data.raw_scores[: data.n]
    bound = np.quantile(corpus[np.isfinite(corpus)], 1 - HIGH_SHARE)
    high = data.trusted_rows[data.raw_scores[data.trusted_rows] > bound].tolist()
    for row in high:
        reasons[row].append(f"scores higher than {percent(1 - HIGH_SHARE)} of the corpus")
    trusted = len(data.trusted_rows)
    by_chance = bdtrc(len(high) - 1, trusted, HIGH_SHARE) >= CHANCE  # of as many or more
    score = "scores" if len(high) == 1 else "score"
    return _check(
        "fine" if by_chance else "alarm",
        f"{len(high):,} of {trusted:,} trusted samples {score} higher than {percent(1 - HIGH_SHARE)} of the "
        f"corpus; {HIGH_SHARE * trusted:.1f} would by chance.",
        samples=len(high),
        expected=HIGH_SHARE * trusted,
        bound=float(bound),
    )


def _by_image(data: RunData) -> dict[str, list[int]]:
    """Rows of the trusted samples, by the digest of their image."""
    rows: dict[str, list[int]] = defaultdict(list)
    digests = data.index["image_sha256"].take(pa.array(data.trusted_rows)).to_pylist()
    for row, digest in zip(data.trusted_rows.tolist(), digests, strict=True):
        rows[digest].append(row)
    return rows


def _corpus_copies(data: RunData, reasons: Reasons) -> Facts:
    trusted, digests = _by_image(data), data.index["image_sha256"].slice(0, data.n)
    known = pc.is_in(digests, value_set=pa.array(list(trusted), pa.string())).to_numpy(zero_copy_only=False)
    copies = np.flatnonzero(known & data.usable)
    mislabelled: dict[int, list[int]] = defaultdict(list)
    for row, digest in zip(copies.tolist(), digests.take(pa.array(copies)).to_pylist(), strict=True):
        for own in trusted[digest]:
            if data.class_id[own] != data.class_id[row]:
                mislabelled[own].append(row)
    for own, rows in mislabelled.items():
        names = ["{label} ({shard}, {key})".format(**row) for row in take(data, np.array(rows))]
        reasons[own].append(f"its picture is in the corpus under another label: {listed(names, 1)}")
    other = len({row for rows in mislabelled.values() for row in rows})
    text = "No corpus sample is an exact copy of a trusted one."
    if len(copies):
        are = "is an exact copy" if len(copies) == 1 else "are exact copies"
        text = (
            f"{number_of(len(copies), 'corpus sample')} {are} of trusted ones, {other:,} under another label."
        )
    level = "alarm" if other else "gap" if len(copies) else "fine"
    return _check(level, text, samples=len(copies), other_label=other)


def _own_copies(data: RunData, reasons: Reasons) -> Facts:
    repeated = [rows for rows in _by_image(data).values() if len(rows) > 1]
    other = [rows for rows in repeated if len(set(data.class_id[rows].tolist())) > 1]
    for rows in other:
        for row in rows:
            reasons[row].append("its picture is in the trusted set under another label as well")
    text = "No picture is in the trusted set twice."
    if repeated:
        are = "is" if len(repeated) == 1 else "are"
        text = (
            f"{number_of(len(repeated), 'picture')} {are} in the trusted set more than once, "
            f"{len(other):,} under different labels."
        )
    level = "alarm" if other else "gap" if repeated else "fine"
    return _check(level, text, pictures=len(repeated), other_label=len(other))


def _coverage(classes: list[Facts]) -> Facts:
    """Classes without trusted samples, and with too few for the reasons to compare within the class."""
    corpus = [row for row in classes if row["usable"]]
    without = [row["label"] for row in corpus if not row["trusted"]]
    few = [row["label"] for row in corpus if 0 < row["trusted"] < MIN_CLASS_TRUSTED]
    parts = []
    if without:
        parts.append(f"No trusted sample: {_some(without, len(corpus))}.")
    if few:
        parts.append(f"Fewer than {MIN_CLASS_TRUSTED} trusted samples: {_some(few, len(corpus))}.")
    text = " ".join(parts) or f"Every class has at least {MIN_CLASS_TRUSTED} trusted samples."
    return _check("gap" if without or few else "fine", text, without=without, few=few)


def _shares(classes: list[Facts]) -> Facts:
    """Classes that are surely more than twice as common, or as rare, in the trusted set as in the corpus."""
    trusted, corpus = (max(sum(row[name] for row in classes), 1) for name in ("trusted", "usable"))
    shares = [
        {
            "label": row["label"],
            "trusted": row["trusted"],
            "trusted_share": row["trusted"] / trusted,
            "corpus_share": row["usable"] / corpus,
        }
        for row in classes
    ]
    apart, z = [], bonferroni_z(len(classes))
    for row in shares:
        low, high = wilson(row["trusted"], trusted, z)
        if low > 2 * row["corpus_share"] or high < row["corpus_share"] / 2:
            apart.append(row["label"])
    text = "The classes have about the same shares as in the corpus."
    if apart:
        text = f"Less than half or more than twice their share of the corpus: {_some(apart, len(classes))}."
    return _check("gap" if apart else "fine", text, apart=apart, classes=shares)


def _some(labels: list[str], classes: int) -> str:
    names = listed([shorten(visible(label), 40) for label in labels], NAMED)
    return f"{len(labels):,} of {number_of(classes, 'class')} ({names})"


def _suspects(data: RunData, reasons: Reasons) -> list[Facts]:
    """The trusted samples with a reason, most reasons first."""
    rows = sorted(reasons, key=lambda row: (-len(reasons[row]), row))
    named = data.index.select(["shard", "key", "label"]).take(pa.array(rows, pa.int64())).to_pylist()
    return [
        {"sample_id": row, **name, "reasons": reasons[row]} for row, name in zip(rows, named, strict=True)
    ]
