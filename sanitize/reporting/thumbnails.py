"""The most suspicious samples as pictures, grouped by label and, inside a label, by likeness.

A group's mean picture, and what of its fine detail sets it apart from kept samples of the same label, make a
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
BUDGET_BYTES = 1_900_000
"""For all pictures together, as base64 text."""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Suspicious samples of one label that look and train alike."""

    rows: Rows
    """All members, the most suspicious first."""
    shown: list[tuple[int, str]]
    """Row and picture (a PNG data URI) of the first members."""
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
    """The groups of one label; `looked_at` of its `suspicious` samples were compared."""

    label: str
    suspicious: int
    usable: int
    looked_at: int
    groups: list[Group]


def suspicious_groups(run: RunDir, data: RunData, classes: list[Facts]) -> list[LabelGroups] | None:
    """Groups for the labels most worth a look; None when the pixel cache has been deleted.

    Args:
        classes: rows of the report's class table.
    """
    path = run / "pixels" / "pixels.npy"
    if not path.is_file():
        return None
    pixels: Pixels = np.load(path, mmap_mode="r")
    if pixels.ndim != 4 or len(pixels) < data.n:
        return None
    worth = [row for row in classes if row["suspicious"]]
    worth.sort(key=lambda row: (not row["stands_out"], -row.get("excess", 0), -row["suspicious"]))
    worth = worth[:LABELS]
    budget = BUDGET_BYTES // max(len(worth), 1)
    return [_label_groups(data, pixels, row, budget) for row in worth]


def _label_groups(data: RunData, pixels: Pixels, row: Facts, budget: int) -> LabelGroups:
    of_class = data.class_id[: data.n] == row["class_id"]
    rows = most_suspicious(data, of_class & data.suspicious, CANDIDATES)
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
        suspicious=row["suspicious"],
        usable=row["usable"],
        looked_at=len(rows),
        groups=groups,
    )


def _group(rows: Rows, pictures: Pixels, fine: Floats, reference: Floats, budget: int) -> Group:
    mean = pictures.mean(axis=0, dtype=np.float32)
    detail, strength = None, None
    if len(pictures) >= 3 and len(reference) >= 20:
        deviation = _detail_deviation(fine, reference)
        strength = float(np.abs(deviation).max())
        # A fixed scale keeps pure chance grey; only what is far beyond it sets the scale itself.
        detail = _png(np.clip(127.5 + 127.5 * deviation / max(12.0, 0.6 * strength), 0, 255).astype(np.uint8))
    encoded_mean = _png(mean.round().astype(np.uint8))
    left = budget - len(encoded_mean) - len(detail or "")
    shown: list[tuple[int, str]] = []
    for row, picture in zip(rows[:PER_GROUP], pictures, strict=False):
        encoded = _png(picture)
        left -= len(encoded)
        if left < 0 and shown:
            break
        shown.append((int(row), encoded))
    return Group(rows=rows, shown=shown, mean=encoded_mean, detail=detail, strength=strength)


def _detail_deviation(ours: Floats, theirs: Floats) -> Floats:
    """(h, w, 3) standard errors by which the group's mean fine detail differs from the reference's."""
    reference = theirs.var(axis=0)
    # The larger variance: neither one odd picture on a plain background nor a handful that happen to be
    # alike is a shared detail.
    spread = np.sqrt(np.maximum(ours.var(axis=0), reference) / len(ours) + reference / len(theirs))
    result: Floats = ((ours.mean(axis=0) - theirs.mean(axis=0)) / (spread + 0.25)).astype(np.float32)
    return result


def _fine(pictures: Pixels) -> Floats:
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
