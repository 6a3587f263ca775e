"""The facts of a run as one plain dict: what report.json holds and what the page shows.

Reads decisions, index, scores, groups and trajectories; never an image. Everything here is a count, a share
or a text as it stands in the run folder, so the page cannot say something that the JSON does not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sanitize.errors import InputError
from sanitize.reporting.limits import limits
from sanitize.rundir import RunDir

BAND_SAMPLES = 2000
"""Trajectories drawn per band: the 10 % quantile is then good to about 0.7 points."""
TOP_SAMPLES = 100
EXAMPLES = 5
_COLUMNS = ("sample_id", "shard", "key", "label", "status", "anomaly_score", "p_value", "flagged", "reason")
VERY_CLEAR = 5.0
"""Separation from which fewer than one in a hundred lies nearer to the other side's mean."""
VERY_CLEAR_FREQUENCIES = 10.0
"""The same in frequencies, where natural groups reach 5.9."""
_INDEX = ("shard", "key", "label", "class_id", "trusted", "image_sha256", "status")
_DICTIONARY = ("shard", "label", "status", "reason")

Facts = dict[str, Any]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The arrays of a run. N corpus rows come first in the index, M trusted rows after them."""

    manifest: Facts
    decisions: pa.Table
    """N rows."""
    flagged: Mask
    """(N,) goes to quarantine, suspicious or unusable."""
    usable: Mask
    """(N,) status ok."""
    score: npt.NDArray[np.float32]
    """(N,) anomaly_score, NaN where there is none."""
    class_id: npt.NDArray[np.int32]
    """(N + M,) -1 for none."""
    trusted_rows: Rows
    """Index rows of the usable trusted samples."""
    trusted_unusable: int
    index: pa.Table
    """N + M rows."""
    groups: list[Facts]
    """groups.json: suspected attacks, crispest first; `rows` are index rows, the surest members first."""
    shared_groups: list[Facts]
    """The same of groups as crisp that trusted samples are in as well."""
    raw_scores: npt.NDArray[np.float32]
    """(N + M,) NaN for none; all NaN when the file is missing."""
    trajectories: npt.NDArray[np.float32] | None
    """(E, N + M), a memmap."""

    @property
    def suspicious(self) -> Mask:
        return self.flagged & self.usable

    @property
    def grouped(self) -> Mask:
        """(N,) belongs to a suspected attack."""
        inside = np.zeros(len(self.class_id), bool)
        for group in self.groups:
            inside[group["rows"]] = True
        return inside[: self.n]

    def members(self, group: Facts) -> Rows:
        """Corpus rows of one of the groups, the surest first."""
        rows = np.array(group["rows"], np.int64)
        return rows[rows < self.n]

    @property
    def n(self) -> int:
        return len(self.flagged)

    @property
    def decision(self) -> Facts:
        return dict(self.manifest.get("decision") or {})


def read_run(run: RunDir) -> RunData:
    """Open what a report needs.

    Raises:
        InputError: index.parquet or decisions.parquet is missing, or they disagree.
    """
    for name in ("index.parquet", "decisions.parquet"):
        if not (run / name).is_file():
            raise InputError(f"{run.path} has no {name}: the scan did not finish; run sanitize scan again")
    have = pq.read_schema(run / "decisions.parquet").names
    decisions = pq.read_table(
        run / "decisions.parquet",
        columns=[name for name in _COLUMNS if name in have],
        read_dictionary=[name for name in _DICTIONARY if name in have],
    )
    index = pq.read_table(
        run / "index.parquet", columns=list(_INDEX), read_dictionary=["shard", "label", "status"]
    )
    n, everything = decisions.num_rows, index.num_rows
    trusted = index["trusted"].to_numpy(zero_copy_only=False)
    if n != everything - int(trusted.sum()):
        raise InputError(
            f"{run.path}: decisions.parquet has {n} rows but the index has {everything - int(trusted.sum())} "
            "corpus samples; make the decision again with: sanitize filter"
        )
    index_ok = np.array([status == "ok" for status in index["status"][n:].to_pylist()], dtype=bool)
    raw = _raw_scores(run, everything)
    trusted_rows = n + np.flatnonzero(index_ok)
    names, codes = encode(decisions["status"])
    groups = _groups(run)
    score = decisions["anomaly_score"].cast(pa.float32()).to_numpy(zero_copy_only=False)
    return RunData(
        manifest=run.manifest,
        decisions=decisions,
        flagged=decisions["flagged"].to_numpy(zero_copy_only=False).astype(bool),
        usable=codes == (names.index("ok") if "ok" in names else -2),
        score=score.astype(np.float32),
        class_id=index["class_id"].to_numpy().astype(np.int32),
        trusted_rows=trusted_rows.astype(np.int64),
        trusted_unusable=len(index_ok) - len(trusted_rows),
        index=index,
        groups=[group for group in groups if group.get("suspected", True)],
        shared_groups=[group for group in groups if not group.get("suspected", True)],
        raw_scores=raw,
        trajectories=_trajectories(run, everything),
    )


def is_very_clear(group: Facts) -> bool:
    """Whether a group stands apart further than natural ones do."""
    least = VERY_CLEAR_FREQUENCIES if group["signal"] == "frequencies" else VERY_CLEAR
    return bool(group["separation"] >= least)


def _groups(run: RunDir) -> list[Facts]:
    path = run / "groups.json"
    groups: list[Facts] = json.loads(path.read_bytes()) if path.is_file() else []  # older runs have none
    return groups


def _raw_scores(run: RunDir, rows: int) -> npt.NDArray[np.float32]:
    path = run / "decision_scores.npy"
    if path.is_file():
        stored = np.load(path, mmap_mode="r")
        if stored.shape == (rows,):
            return np.asarray(stored, np.float32)
    return np.full(rows, np.nan, np.float32)


def _trajectories(run: RunDir, rows: int) -> npt.NDArray[np.float32] | None:
    path = run / "trajectories.npy"
    if not path.is_file():
        return None
    stored: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return stored if stored.ndim == 2 and stored.shape[1] == rows else None


def encode(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct values of a string column and the (N,) code of each row, -1 for null."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # older pyarrow keeps a chunked array here
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], column.type)
    return whole.dictionary.to_pylist(), whole.indices.fill_null(-1).to_numpy().astype(np.int64)


def take(data: RunData, rows: Rows) -> list[Facts]:
    """Decision rows as dicts, in the order of `rows`."""
    found: list[Facts] = data.decisions.take(pa.array(rows)).to_pylist()
    return found


def most_suspicious(data: RunData, among: Mask, count: int) -> Rows:
    """Rows of `among`, highest anomaly score first; ties, as at its top, by the decision score."""
    rows = np.flatnonzero(among)
    raw = data.raw_scores[rows]
    first = np.where(np.isfinite(raw), raw, -np.inf)
    second = np.nan_to_num(data.score[rows], nan=-1.0)
    return rows[np.lexsort((rows, -first, -second))][:count]


def collect(data: RunData) -> Facts:
    """All facts but the verdict, the check of the trusted set and the groups of pictures; in JSON types."""
    manifest, decision = data.manifest, data.decision
    counts = _counts(data)
    excess = _excess(data, counts)
    classes = _classes(data, excess)
    facts = {
        "counts": counts,
        "excess": excess,
        "decision": decision,
        "classes": classes,
        "suspected_attacks": [_attack(data, group) for group in data.groups],
        "shared_groups": [_attack(data, group) for group in data.shared_groups],
        "reasons": _reasons(data),
        "bands": _bands(data),
        "histogram": _histogram(data),
        "top_suspicious": take(data, most_suspicious(data, data.suspicious, TOP_SAMPLES)),
        "unusable": _unusable(data),
        "shards": _shards(manifest),
        "notes": [str(note) for note in manifest.get("notes") or []],
        "training": manifest.get("training") or {},
        "settings": {k: v for k, v in (manifest.get("config") or {}).items() if k != "decision"},
        "versions": manifest.get("versions") or {},
        "stages": manifest.get("stages") or {},
        "limits": limits(manifest),
    }
    cleaned: Facts = finite(facts)
    return cleaned


def finite(value: Any) -> Any:
    """The same value in JSON's types, with null for every number that is not finite."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share of `hits` in `n` (0 to 1 when n is 0)."""
    if n <= 0:
        return 0.0, 1.0
    p = hits / n
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def bonferroni_z(looks: int) -> float:
    """z of a 95 % interval that is to hold for `looks` shares at once."""
    return NormalDist().inv_cdf(1 - 0.025 / max(looks, 1))


def share_difference(p: float, n: int, q: float, m: int) -> tuple[float, float]:
    """95 % interval of p − q for two independent shares (Newcombe 1998, method 10)."""
    p_low, p_high = wilson(p * n, n)
    q_low, q_high = wilson(q * m, m)
    low = p - q - math.hypot(p - p_low, q_high - q)
    return low, p - q + math.hypot(p_high - p, q - q_low)


def _counts(data: RunData) -> Facts:
    quarantined, suspicious = int(data.flagged.sum()), int(data.suspicious.sum())
    written = (data.manifest.get("outputs") or {}).get("shards")
    counts: Facts = {
        "indexed": data.n,
        "kept": data.n - quarantined,
        "quarantined": quarantined,
        "suspicious": suspicious,
        "unusable": quarantined - suspicious,
        "usable": int(data.usable.sum()),
        "trusted": len(data.trusted_rows),
        "trusted_unusable": data.trusted_unusable,
        "written_kept": None,
        "written_quarantined": None,
        "reconciles": None,
    }
    if written is not None:
        counts["written_kept"] = sum(int(shard.get("kept", 0)) for shard in written)
        counts["written_quarantined"] = sum(int(shard.get("quarantined", 0)) for shard in written)
        counts["reconciles"] = (
            counts["written_kept"] == counts["kept"]
            and counts["written_quarantined"] == counts["quarantined"]
            # an unusable sample that is not flagged would have been kept without ever being looked at
            and not bool((~data.usable & ~data.flagged).any())
        )
    return counts


def _over_trusted(data: RunData) -> Mask | None:
    threshold = data.decision.get("threshold")
    scores = data.raw_scores[data.trusted_rows]
    if threshold is None or not np.isfinite(scores).any():
        return None
    over, above = scores >= np.float32(threshold), scores > np.float32(threshold)
    # --reject leaves rows out that tie with its lowest score; trusted ones then count from above it only
    ratio, scored = data.decision.get("trusted_flagged_ratio"), np.isfinite(scores)
    if ratio is not None and over[scored].mean() != ratio and above[scored].mean() == ratio:
        return np.asarray(above)
    return np.asarray(over)


def _spared(decision: Facts) -> int:
    spared = decision.get("spared_by_cap") or 0
    return int(sum(spared.values())) if isinstance(spared, dict) else int(spared)


def _excess(data: RunData, counts: Facts) -> Facts:
    """How much more of the corpus than of the trusted set lies over the threshold."""
    scored = int(np.isfinite(data.raw_scores[data.trusted_rows]).sum()) or len(data.trusted_rows)
    over, usable = counts["suspicious"] + _spared(data.decision), counts["usable"]
    ratio = data.decision.get("trusted_flagged_ratio")
    trusted_over = _over_trusted(data)
    if ratio is None and trusted_over is not None:
        ratio = float(trusted_over.mean())
    if ratio is None or not scored or not usable:
        return {"known": False, "over_threshold": over, "spared_by_cap": _spared(data.decision)}
    share = over / usable
    low, high = share_difference(share, usable, float(ratio), scored)
    trusted_low, trusted_high = wilson(float(ratio) * scored, scored)
    return {
        "known": True,
        "over_threshold": over,
        "spared_by_cap": _spared(data.decision),
        "corpus_ratio": share,
        "trusted_ratio": float(ratio),
        "trusted_low": trusted_low,
        "trusted_high": trusted_high,
        "trusted_scored": scored,
        "ratio": share - float(ratio),
        "low": low,
        "high": high,
        "samples": round((share - float(ratio)) * usable),
        "samples_low": round(low * usable),
        "samples_high": round(high * usable),
    }


def _classes(data: RunData, excess: Facts) -> list[Facts]:
    """One row a class, the highest suspicious share first."""
    names = [str(name) for name in data.manifest.get("class_names") or []]
    size = max(len(names), int(data.class_id.max(initial=-1)) + 1)
    names += [f"class {i}" for i in range(len(names), size)]
    corpus = data.class_id[: data.n]

    def count(mask: Mask) -> npt.NDArray[np.int64]:
        return np.bincount(corpus[mask & (corpus >= 0)], minlength=size)

    usable, suspicious = count(data.usable), count(data.suspicious)
    trusted_class = data.class_id[data.trusted_rows]
    trusted = np.bincount(trusted_class[trusted_class >= 0], minlength=size)
    over = _over_trusted(data)
    trusted_over = (
        None if over is None else np.bincount(trusted_class[over & (trusted_class >= 0)], minlength=size)
    )
    z = bonferroni_z(size)
    rows = []
    for i in np.flatnonzero((usable + trusted) > 0):
        own = None if trusted_over is None else int(trusted_over[i])
        row: Facts = {
            "class_id": int(i),
            "label": names[i],
            "usable": int(usable[i]),
            "suspicious": int(suspicious[i]),
            "ratio": float(suspicious[i] / usable[i]) if usable[i] else 0.0,
            "trusted": int(trusted[i]),
            "trusted_over": own,
            "stands_out": False,
        }
        if excess["known"] and usable[i]:
            row["excess"] = round(row["suspicious"] - excess["trusted_ratio"] * row["usable"])
            low, _ = wilson(row["suspicious"], row["usable"], z)
            # A class may simply be hard: its own few trusted samples have a say at a loose level (80 %).
            own_high = wilson(own, row["trusted"], 1.28)[1] if own is not None and row["trusted"] else 0.0
            row["stands_out"] = bool(low > excess["trusted_high"] and row["ratio"] > own_high)
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["ratio"], -row["suspicious"], row["class_id"]))


def _attack(data: RunData, group: Facts) -> Facts:
    from scipy.special import bdtr

    rows, class_id = data.members(group), group["class_id"]
    of_label = int((data.usable & (data.class_id[: data.n] == class_id)).sum())
    share = min(len(rows) / max(of_label, 1), 1.0)
    trusted = int((data.class_id[data.trusted_rows] == class_id).sum())
    threshold = data.decision.get("threshold")
    capped = bool(_spared(data.decision)) and threshold is not None
    spared = ~data.flagged[rows] & (data.raw_scores[rows] >= np.float32(threshold)) if capped else rows[:0]
    return {
        "label": group["label"],
        "samples": len(rows),
        "flagged": int(data.flagged[rows].sum()),
        "spared_by_cap": int(spared.sum()),
        "share_of_label": share,
        "signal": group["signal"],
        "separation": group["separation"],
        "trusted": group["trusted"],
        "trusted_of_label": trusted,
        "trusted_expected": share * trusted,  # by a natural group of its size
        "trusted_chance": float(bdtr(min(group["trusted"], trusted), trusted, share)),  # of as few or fewer
        "sample_ids": rows,
    }


def _reasons(data: RunData, count: int = 8) -> list[Facts]:
    if "reason" not in data.decisions.column_names:
        return []
    texts, codes = encode(data.decisions["reason"])
    codes = codes[data.suspicious]
    counts = np.bincount(codes[codes >= 0], minlength=len(texts))
    best = np.argsort(-counts, kind="stable")[:count]
    return [{"reason": texts[i], "count": int(counts[i])} for i in best if counts[i]]


def _bands(data: RunData) -> Facts | None:
    """10, 50 and 90 % quantile of the loss per epoch, for trusted, kept and suspicious samples."""
    if data.trajectories is None:
        return None
    training = data.manifest.get("training") or {}
    epochs = len(data.trajectories)
    kept_epochs = training.get("kept_epochs")
    groups = {
        "trusted": data.trusted_rows,
        "kept": np.flatnonzero(data.usable & ~data.flagged),
        "suspicious": np.flatnonzero(data.suspicious),
    }
    left_out = [] if kept_epochs is None else sorted(set(range(epochs)) - {int(e) for e in kept_epochs})
    bands: Facts = {"epochs": epochs, "left_out": left_out}
    for name, rows in groups.items():
        bands[name] = _quantiles(data.trajectories, rows)
    return bands


def _quantiles(trajectories: npt.NDArray[np.float32], rows: Rows) -> Facts | None:
    if len(rows) > BAND_SAMPLES:
        rows = np.sort(np.random.default_rng(0).choice(rows, BAND_SAMPLES, replace=False))
    losses = np.stack([epoch[rows] for epoch in trajectories]) if len(rows) else np.empty((0, 0), np.float32)
    losses = losses[:, np.isfinite(losses).all(axis=0)]
    if not losses.size:
        return None
    low, median, high = np.quantile(losses, [0.1, 0.5, 0.9], axis=1)
    return {"drawn": losses.shape[1], "p10": low.tolist(), "p50": median.tolist(), "p90": high.tolist()}


def _histogram(data: RunData, bins: int = 48) -> Facts | None:
    """Shares per bin; an edge lies exactly on the threshold, the outermost bins hold the tails."""
    corpus = data.raw_scores[: data.n]
    corpus, trusted = corpus[np.isfinite(corpus)], data.raw_scores[data.trusted_rows]
    trusted = trusted[np.isfinite(trusted)]
    if not len(corpus):
        return None
    both = (corpus, trusted) if len(trusted) else (corpus,)
    low = float(min(np.quantile(part, 0.002) for part in both))
    high = float(max(np.quantile(part, 0.998) for part in both))
    threshold = data.decision.get("threshold")
    threshold = None if threshold is None else float(np.float32(threshold))
    if threshold is not None and math.isfinite(threshold):
        median = float(np.median(corpus))
        if threshold > median:  # members of groups may score 70: they would squash all others into one bin
            high = min(high, threshold + 2 * (threshold - median))
        low, high = min(low, threshold), max(high, threshold)
    width = max((high - low) / bins, 1e-6 * max(1.0, abs(low), abs(high)))
    start = low - width / 2
    if threshold is not None and math.isfinite(threshold):
        start = threshold - width * math.ceil((threshold - low) / width)
    edges = start + width * np.arange(bins + 2)

    def shares(values: npt.NDArray[np.float32]) -> list[float] | None:
        if not len(values):
            return None
        # side="right": a score equal to an edge belongs to the bin above it, as score >= threshold says
        place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins)
        found: list[float] = (np.bincount(place, minlength=bins + 1) / len(values)).tolist()
        return found

    return {
        "edges": edges.tolist(),
        "threshold": threshold,
        "corpus": shares(corpus),
        "trusted": shares(trusted),
        "corpus_samples": len(corpus),
        "trusted_samples": len(trusted),
    }


def _unusable(data: RunData) -> list[Facts]:
    from sanitize.corpus.index import STATUS

    names, codes = encode(data.decisions["status"])
    chosen = data.flagged & ~data.usable
    counts = np.bincount(codes[chosen & (codes >= 0)], minlength=len(names))
    rows = []
    for code in np.argsort(-counts, kind="stable"):
        if counts[code]:
            examples = take(data, np.flatnonzero(chosen & (codes == code))[:EXAMPLES])
            rows.append(
                {
                    "status": names[code],
                    "sentence": STATUS.get(names[code], ""),
                    "count": int(counts[code]),
                    "examples": [
                        {name: row.get(name) for name in ("shard", "key", "reason")} for row in examples
                    ],
                }
            )
    return rows


def _shards(manifest: Facts) -> list[Facts]:
    """Input shards joined by name with what was written for them."""
    written = {str(row.get("name")): row for row in (manifest.get("outputs") or {}).get("shards") or []}
    rows = []
    for shard in manifest.get("shards") or []:
        out = {} if shard.get("trusted") else written.get(str(shard.get("name")), {})
        rows.append(
            {
                "name": str(shard.get("name")),
                "trusted": bool(shard.get("trusted")),
                **{name: shard.get(name) for name in ("samples", "bytes", "bytes_unreadable", "sha256")},
                "problems": [str(problem) for problem in shard.get("problems") or []],
                **{name: out.get(name) for name in ("kept", "quarantined", "kept_bytes", "quarantine_bytes")},
                "kept_sha256": out.get("kept_sha256"),
                "empty": bool(out.get("empty")),
            }
        )
    return rows
