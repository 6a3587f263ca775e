"""Samples as pictures: sheets of the suspected attacks, the other suspicious samples by label and likeness.

A group's mean picture, and what of its fine detail sets it apart from other samples of the same label, make a
shared trigger visible: natural detail differs from picture to picture and averages out, a trigger does not.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sanitize.reporting.facts import Facts, Rows, RunData, most_suspicious
from sanitize.rundir import RunDir

LABELS = 8
CANDIDATES = 200
REFERENCE = 300
GROUPS = 4
PER_GROUP = 16
LARGEST_SIDE = 64
STRONG = 6.0
"""Standard errors from which a shared detail is called out. Measured on CIFAR-10: groups of clean pictures
reach 2.8 to 5.0; 70 to 145 pictures with a four-pixel corner mark 21 to 29, with a faint sinusoid 9 to 11."""
FEWEST = 8
"""Smallest group whose shared detail is called out."""
SHEETS = 12
"""Suspected attacks that are shown as pictures, the crispest."""
SHARED_SHEETS = 4
"""Groups that trusted samples are in that are."""
PER_SHEET = 12
SHEET_REFERENCE = 2000
"""Members, and others of the label, that a mean is taken over: it is then good to about two levels of 255."""
TRUSTED_SHOWN = 24
LIKENESS_BYTES, SHEETS_BYTES, TRUSTED_BYTES = 1_300_000, 900_000, 200_000
"""For the pictures of each section, as base64 text."""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Strip = list[tuple[int, str]]
"""Index row and picture (a PNG data URI) of each sample."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Suspicious samples of one label that look and train alike."""

    rows: Rows
    """All members, the most suspicious first."""
    shown: Strip
    """The first members."""
    mean: str
    detail: str | None
    """Fine detail of the mean minus that of kept samples, grey where equal; None without kept samples."""
    strength: float | None
    """Largest deviation in that picture, in standard errors."""

    @property
    def shares_detail(self) -> bool:
        return self.strength is not None and len(self.rows) >= FEWEST and self.strength >= STRONG


@dataclass(frozen=True, kw_only=True)
class LabelGroups:
    """The groups of one label; `looked_at` of its `suspicious` samples, those in no attack, were compared."""

    label: str
    suspicious: int
    usable: int
    looked_at: int
    groups: list[Group]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The contact sheet of a suspected attack, or of a group that trusted samples are in."""

    members: Strip
    """The surest."""
    others: Strip
    """Of the same label, drawn from those in no suspected attack."""
    difference: str | None
    """Mean of the members minus mean of the others, stretched, grey where equal; None without others."""
    detail: str | None
    """The fine detail of that difference."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of a report."""

    sheets: list[Sheet]
    """Of the first suspected attacks."""
    shared_sheets: list[Sheet]
    """Of the first groups that trusted samples are in."""
    groups: list[LabelGroups]
    trusted: dict[int, str]
    """Of the first trusted samples to look at, by index row."""

    @property
    def rows(self) -> Rows:
        """Corpus rows that are shown."""
        sheets = [*self.sheets, *self.shared_sheets]
        strips = [strip for sheet in sheets for strip in (sheet.members, sheet.others)]
        strips += [group.shown for label in self.groups for group in label.groups]
        return np.array(sorted({row for strip in strips for row, _ in strip}), np.int64)


def pictures_of(run: RunDir, data: RunData, facts: Facts) -> Pictures | None:
    """The pictures for collected facts; None when the pixel cache of the run has been deleted."""
    path = run / "pixels" / "pixels.npy"
    if not path.is_file():
        return None
    pixels: Pixels = np.load(path, mmap_mode="r")
    if pixels.ndim != 4 or len(pixels) != len(data.class_id):
        return None
    suspects = [row["sample_id"] for row in facts["trusted_check"]["suspects"][:TRUSTED_SHOWN]]
    suspected, shared = data.groups[:SHEETS], data.shared_groups[:SHARED_SHEETS]
    budget = SHEETS_BYTES // max(len(suspected) + len(shared), 1)
    return Pictures(
        sheets=[_sheet(data, pixels, group, budget) for group in suspected],
        shared_sheets=[_sheet(data, pixels, group, budget) for group in shared],
        groups=_suspicious_groups(data, pixels, facts["classes"]),
        trusted=dict(_strip(pixels, np.array(suspects, np.int64), TRUSTED_BYTES)),
    )


def _sheet(data: RunData, pixels: Pixels, group: Facts, budget: int) -> Sheet:
    rows = data.members(group)
    of_class = data.class_id[: data.n] == group["class_id"]
    others = np.setdiff1d(np.flatnonzero(of_class & data.usable & ~data.grouped), rows)
    others = np.random.default_rng(0).permutation(others)[:SHEET_REFERENCE]
    difference, detail = None, None
    if len(rows) and len(others):
        change = _mean(_read(pixels, rows[:SHEET_REFERENCE])) - _mean(_read(pixels, others))
        difference, detail = _stretched(change), _stretched(_fine(change[None])[0])
    half = (budget - len(difference or "") - len(detail or "")) // 2
    return Sheet(
        members=_strip(pixels, rows[:PER_SHEET], half),
        others=_strip(pixels, others[:PER_SHEET], half),
        difference=difference,
        detail=detail,
    )


def _strip(pixels: Pixels, rows: Rows, budget: int) -> Strip:
    """Pictures of `rows`, as many as fit `budget` but at least one."""
    return _encoded(rows, _read(pixels, rows), budget)


def _encoded(rows: Rows, pictures: Pixels, budget: int) -> Strip:
    found: Strip = []
    for row, picture in zip(rows, pictures, strict=False):
        encoded = _png(picture)
        budget -= len(encoded)
        if budget < 0 and found:
            break
        found.append((int(row), encoded))
    return found


def _suspicious_groups(data: RunData, pixels: Pixels, classes: list[Facts]) -> list[LabelGroups]:
    """Groups of what is flagged and in no suspected attack, for the labels most worth a look."""
    ungrouped = set(data.class_id[: data.n][data.suspicious & ~data.grouped].tolist())
    worth = [row for row in classes if row["class_id"] in ungrouped]
    worth.sort(key=lambda row: (not row["stands_out"], -row.get("excess", 0), -row["suspicious"]))
    worth = worth[:LABELS]
    budget = LIKENESS_BYTES // max(len(worth), 1)
    return [_label_groups(data, pixels, row, budget) for row in worth]


def _label_groups(data: RunData, pixels: Pixels, row: Facts, budget: int) -> LabelGroups:
    of_class = data.class_id[: data.n] == row["class_id"]
    suspicious = of_class & data.suspicious & ~data.grouped
    rows = most_suspicious(data, suspicious, CANDIDATES)
    kept = np.flatnonzero(of_class & data.usable & ~data.flagged)
    if len(kept) > REFERENCE:
        kept = np.sort(np.random.default_rng(0).choice(kept, REFERENCE, replace=False))
    pictures, reference = _read(pixels, rows), _read(pixels, kept)
    fine, fine_reference = _fine(pictures), _fine(reference)
    place = _cluster(_features(data, rows, pictures, fine, fine_reference))
    members = [np.flatnonzero(place == group) for group in range(int(place.max()) + 1)]
    members.sort(key=lambda member: (-len(member), member[0]))
    spent = 0
    groups: list[Group] = []
    for member in members:
        share = (budget - spent) // (len(members) - len(groups))
        group = _group(rows[member], pictures[member], fine[member], fine_reference, share)
        spent += sum(len(picture) for _, picture in group.shown) + len(group.mean) + len(group.detail or "")
        groups.append(group)
    return LabelGroups(
        label=row["label"],
        suspicious=int(suspicious.sum()),
        usable=row["usable"],
        looked_at=len(rows),
        groups=groups,
    )


def _group(rows: Rows, pictures: Pixels, fine: Floats, reference: Floats, budget: int) -> Group:
    detail, strength = None, None
    if len(pictures) >= 3 and len(reference) >= 20:
        deviation = _detail_deviation(fine, reference)
        strength = float(np.abs(deviation).max())
        # A fixed scale keeps pure chance grey; only what is far beyond it sets the scale itself.
        detail = _png(np.clip(127.5 + 127.5 * deviation / max(12.0, 0.6 * strength), 0, 255).astype(np.uint8))
    mean = _png(_mean(pictures).round().astype(np.uint8))
    shown = _encoded(rows[:PER_GROUP], pictures, budget - len(mean) - len(detail or ""))
    return Group(rows=rows, shown=shown, mean=mean, detail=detail, strength=strength)


def _detail_deviation(ours: Floats, theirs: Floats) -> Floats:
    """(h, w, 3) standard errors by which the group's mean fine detail differs from the reference's."""
    reference = theirs.var(axis=0)
    # The larger variance: neither one odd picture on a plain background nor a handful that happen to be
    # alike is a shared detail.
    spread = np.sqrt(np.maximum(ours.var(axis=0), reference) / len(ours) + reference / len(theirs))
    result: Floats = ((ours.mean(axis=0) - theirs.mean(axis=0)) / (spread + 0.25)).astype(np.float32)
    return result


def _mean(pictures: Pixels) -> Floats:
    mean: Floats = pictures.mean(axis=0, dtype=np.float32)
    return mean


def _stretched(change: Floats) -> str:
    """A difference of means as a picture: grey where equal, its largest value black or white."""
    return _png((127.5 + 127.5 * change / max(float(np.abs(change).max()), 1.0)).astype(np.uint8))


def _fine(pictures: Pixels | Floats) -> Floats:
    """What a picture has beyond its blurred self (n, h, w, 3): smooth scenery out, triggers stay."""
    from scipy.ndimage import gaussian_filter

    values = pictures.astype(np.float32)
    sigma = max(1.0, pictures.shape[1] / 16)
    result: Floats = values - gaussian_filter(values, (0, sigma, sigma, 0), mode="nearest")
    return result


def _features(data: RunData, rows: Rows, pictures: Pixels, fine: Floats, reference: Floats) -> Floats:
    """(n, D) likeness: leading directions of fine detail, of colour, and of the log-loss trajectory."""
    spread = (reference if len(reference) >= 20 else fine).std(axis=0)
    # Every fourth pixel says enough about colour.
    parts = [_leading(fine / (spread + 1), 8), _leading(pictures[:, ::4, ::4].astype(np.float32), 3)]
    if data.trajectories is not None:
        losses = np.stack([epoch[rows] for epoch in data.trajectories], axis=1)
        losses = np.log(np.nan_to_num(losses, nan=1e-4, posinf=1e4).clip(1e-4, 1e4))
        parts.append(_leading(losses.astype(np.float32), 2))
    # Each kind of evidence weighs the same, whatever its number of columns.
    scaled = [part / max(float(np.sqrt((part**2).sum(axis=1).mean())), 1e-6) for part in parts]
    return np.concatenate(scaled, axis=1)


def _leading(values: Floats, count: int) -> Floats:
    """(n, count) projections on the leading principal directions."""
    from scipy.linalg import eigh

    flat = values.reshape(len(values), -1)
    flat = flat - flat.mean(axis=0)
    n = len(flat)
    # The Gram matrix is (n, n) with n <= CANDIDATES: cheap whatever the picture's size.
    power, vectors = eigh((flat @ flat.T).astype(np.float64), subset_by_index=(max(0, n - count), n - 1))
    result: Floats = (vectors * np.sqrt(power.clip(0))).astype(np.float32)
    return result


def _cluster(features: Floats) -> npt.NDArray[np.int64]:
    """Group of each row: the split into 2 to GROUPS with the best silhouette, or one if none is clear."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    n = len(features)
    best, best_place = 0.12, np.zeros(n, np.int64)
    for groups in range(2, min(GROUPS, n // 6) + 1):
        place = AgglomerativeClustering(n_clusters=groups).fit_predict(features)
        quality = float(silhouette_score(features, place))
        if quality > best and np.bincount(place).min() >= 3:
            best, best_place = quality, place.astype(np.int64)
    return best_place


def _read(pixels: Pixels, rows: Rows) -> Pixels:
    """Pictures of `rows`, in their order, no larger than LARGEST_SIDE."""
    order = np.argsort(rows)
    found = np.empty((len(rows), *pixels.shape[1:]), np.uint8)
    found[order] = pixels[rows[order]]  # ascending rows: one pass over the file
    side = max(found.shape[1:3])
    if side <= LARGEST_SIDE or not len(found):
        return found
    from PIL import Image

    height, width = (max(1, round(extent * LARGEST_SIDE / side)) for extent in found.shape[1:3])
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(picture).resize((width, height), box)) for picture in found])


def _png(picture: Any) -> str:
    """A picture as a PNG data URI: its pixels only, nothing of the original file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
