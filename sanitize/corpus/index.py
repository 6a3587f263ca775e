"""One row for every sample of every shard, and for every stretch of a shard that is none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sanitize.config import MIN_TRUSTED
from sanitize.corpus.labels import MAX_MEMBER_BYTES, BadLabelError, class_names, label_extension, read_label
from sanitize.corpus.shards import IMAGE_EXTENSIONS, Sample, account, group, walk
from sanitize.corpus.sources import Buffer, Source, Stored, each_shard, fingerprint, open_tar
from sanitize.errors import InputError
from sanitize.progress import Progress

MIN_CLASS_SAMPLES = 10
"""A label that no trusted sample has needs this many corpus samples to be a class."""
NAMED = 10
"""Most classes, keys or shards that a note names before it counts."""

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("label", pa.string()),
        ("class_id", pa.int32()),
        ("trusted", pa.bool_()),
        ("image_sha256", pa.string()),
        ("status", pa.string()),
    ]
)
"""Columns of index.parquet; `start` and `end` count bytes of the decompressed shard."""

STATUS = {
    "ok": "The sample can be used.",
    "no-image": "It has no jpg, jpeg, png or webp member that webdataset would read.",
    "two-images": "It has more than one image member, so it is unclear which one the label is about.",
    "no-label": "The member or field that holds the label is missing.",
    "bad-label": "Its label is not one line of UTF-8 text of 1 to 200 characters.",
    "unknown-label": "Its label is no class: no trusted sample and too few corpus samples have it, or, for a "
    "trusted sample, no corpus sample has it.",
    "duplicate-member": "Two of its members have the same extension, upper and lower case counting as one, "
    "or one has a name that webdataset reserves.",
    "repeated-key": "An earlier sample of the same shard has the same key.",
    "unsafe-name": "A member name is absolute or leads out of its folder.",
    "not-a-file": "A member is a link, device, sparse file or another entry that is no plain file.",
    "pickle-member": "A member would be unpickled by readers that decode by extension, which can run code.",
    "corrupt-header": "These bytes hold no valid tar header; a reader stops here.",
    "cut": "The shard ends in the middle of it.",
    "after-end": "It lies behind the end mark of the shard, where no reader looks.",
    "too-large": "The image has more pixels than the limit.",
    "undecodable": "The image cannot be decoded.",
    "animated": "The image has more than one frame.",
    "loss-not-finite": "The proxy model's loss on it was not a number.",
}
"""Every value of the status column in one plain sentence."""

_COLUMNS = ("key", "start", "end", "image_offset", "image_size", "label", "image_sha256", "status")


@dataclass(frozen=True)
class Index:
    """What the index stage found."""

    table: pa.Table
    """SCHEMA; corpus rows first, then trusted rows."""
    class_names: list[str]
    """Label text of every class_id."""
    shards: list[dict[str, Any]]
    """One record a shard for manifest.json, corpus shards first."""
    notes: list[str]
    """Warnings for the report."""


class _Job(NamedTuple):
    source: Source
    trusted: bool
    label: str
    scratch: Path


class _Shard(NamedTuple):
    table: pa.Table
    record: dict[str, Any]
    unlabelled: tuple[str, list[str]] | None
    """Key and member extensions of the first sample without label."""


def build_index(
    corpus: Sequence[Source],
    trusted: Sequence[Source],
    *,
    label: str,
    scratch: Path,
    workers: int,
    progress: Progress,
) -> Index:
    """Index all shards and form the classes.

    Args:
        corpus, trusted: shards from `sources.expand`, in order.
        label: where the label is: ``cls``, ``txt`` or ``json:path.to.field``.
        scratch: folder for unpacked shards.
        workers: processes.

    Raises:
        InputError: an unreadable shard, one in both lists, or no corpus or trusted set to work with.
    """
    both = {source.identity for source in corpus} & {source.identity for source in trusted}
    if both:
        raise InputError(f"{min(both)} is both corpus and trusted; trusted samples must be their own shards")
    jobs = [_Job(s, False, label, scratch) for s in corpus] + [_Job(s, True, label, scratch) for s in trusted]
    sizes = [fingerprint(job.source)[0] for job in jobs]
    remote = any("://" in job.source.url for job in jobs)
    parts: list[_Shard] = []
    with progress.stage("index", sum(sizes), "B") as advance:
        for part, size in zip(each_shard(_index_shard, jobs, workers, remote=remote), sizes, strict=True):
            parts.append(part)
            advance(size)
    table = pa.concat_tables([part.table for part in parts])
    is_trusted = np.repeat([job.trusted for job in jobs], [part.table.num_rows for part in parts])
    _check_usable(table, is_trusted, parts, label)
    table, names, notes = _assign_classes(table, is_trusted)
    notes += _shared_image_notes(table)
    return Index(table, names, [part.record for part in parts], notes)


def storable(text: str) -> str:
    """`text` as it can be stored in Parquet and JSON: bytes that are not UTF-8 become ``\\xNN``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _index_shard(job: _Job) -> _Shard:
    stored = Stored()
    source = job.source
    with open_tar(source, job.scratch, stored) as buffer:
        entries = walk(buffer)
        samples, loose_bytes = group(entries)
        accounting = account(buffer, entries, samples, loose_bytes)
        rows = [_row(buffer, sample, job.label) for sample in samples]
        tar_bytes = len(buffer)
    columns = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    table = pa.table(
        {name: pa.array(columns.get(name, ()), SCHEMA.field(name).type) for name in _COLUMNS}
    ).append_column("shard", pa.array([source.name] * len(rows), pa.string()))
    unlabelled = next(
        (
            (sample.key, sorted(sample.members))
            for sample, row in zip(samples, rows, strict=True)
            if row[-1] == "no-label"
        ),
        None,
    )
    record = {
        "name": source.name,
        "url": source.url,
        "compression": source.compression,
        "trusted": job.trusted,
        "bytes": stored.raw_bytes,
        "tar_bytes": tar_bytes,
        "mtime_ns": fingerprint(source)[1],
        "sha256": stored.sha256,
        "samples": len(rows),
        **accounting._asdict(),
        "problems": stored.problems + accounting.problems,
    }
    return _Shard(table, record, unlabelled)


def _row(buffer: Buffer, sample: Sample, label_spec: str) -> tuple[Any, ...]:
    """Values in the order of _COLUMNS."""
    key = sample.key if sample.key.isascii() else storable(sample.key)
    status, members = sample.status, sample.members
    label = None
    images = IMAGE_EXTENSIONS & members.keys()
    if status in ("ok", "no-image", "two-images"):
        try:
            label = _label(buffer, sample, label_spec)
            problem = "no-label" if label is None else ""
        except BadLabelError:
            problem = "bad-label"
        status = problem if status == "ok" and problem else status
    if len(images) != 1:
        return key, sample.start, sample.end, -1, -1, label, None, status
    image = members[min(images)]
    digest = _sha256(buffer, image.data, image.data + image.size)
    return key, sample.start, sample.end, image.data, image.size, label, digest, status


def _sha256(buffer: Buffer, start: int, end: int) -> str:
    """Of a part, without a copy; a view that stays open would keep the map of the shard open."""
    with memoryview(buffer) as whole, whole[start:end] as part:
        return hashlib.sha256(part).hexdigest()


def _label(buffer: Buffer, sample: Sample, spec: str) -> str | None:
    extension = label_extension(spec)
    entry = sample.members.get(extension)
    if entry is None:
        return None
    if entry.size > MAX_MEMBER_BYTES:  # before it is copied
        raise BadLabelError(f"label member of {entry.size:,} bytes")
    return read_label(spec, {extension: buffer[entry.data : entry.data + entry.size]})


def _check_usable(
    table: pa.Table, is_trusted: npt.NDArray[np.bool_], parts: list[_Shard], label: str
) -> None:
    usable = pc.equal(table["status"], "ok").to_numpy()
    if not (usable & ~is_trusted).any():
        raise InputError(
            "the corpus has no usable sample: " + _why_none(table, is_trusted, parts, label, False)
        )
    if not (usable & is_trusted).any():
        raise InputError(
            "the trusted set has no usable sample: " + _why_none(table, is_trusted, parts, label, True)
        )


def _why_none(
    table: pa.Table, is_trusted: npt.NDArray[np.bool_], parts: list[_Shard], label: str, trusted: bool
) -> str:
    statuses = Counter(table["status"].filter(pa.array(is_trusted == trusted)).to_pylist())
    if not statuses:
        return "its shards are empty"
    status, count = statuses.most_common(1)[0]
    total = sum(statuses.values())
    if status != "no-label":
        first = next(
            p.record["name"] for p in parts if p.record["trusted"] == trusted and p.record["samples"]
        )
        return f"{count} of {total} are {status} ({STATUS[status]}); look at {first} with: tar -tvf"
    part = next(p for p in parts if p.unlabelled and p.record["trusted"] == trusted)
    assert part.unlabelled is not None
    key, members = part.unlabelled
    which = "any" if count == total else f"{count}"
    field = "" if ":" not in label else f' with the field "{label.split(":", 1)[1]}"'
    return (
        f'no ".{label_extension(label)}" member{field} in {which} of {total} samples; shard '
        f"{part.record['name']}, key {storable(key)!a} has members "
        f"{', '.join(ascii(name)[1:-1] for name in members)}; pass --label cls, txt or json:path.to.field"
    )


def _assign_classes(
    table: pa.Table, is_trusted: npt.NDArray[np.bool_]
) -> tuple[pa.Table, list[str], list[str]]:
    """The table in SCHEMA with class_id and unknown-label filled in, class names, notes."""
    usable = pc.equal(table["status"], "ok").to_numpy()
    encoded = pc.dictionary_encode(table["label"]).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    texts: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    in_corpus = np.bincount(codes[usable & ~is_trusted], minlength=len(texts))
    in_trusted = np.bincount(codes[usable & is_trusted], minlength=len(texts))
    if not ((in_corpus > 0) & (in_trusted > 0)).any():
        raise InputError(
            "corpus and trusted set have no label in common "
            f"({_some([t for t, n in zip(texts, in_corpus, strict=True) if n])} against "
            f"{_some([t for t, n in zip(texts, in_trusted, strict=True) if n])}); "
            "give trusted samples of the same classes, labelled alike"
        )
    is_class = (in_corpus > 0) & ((in_trusted > 0) | (in_corpus >= MIN_CLASS_SAMPLES))
    names = class_names(text for text, yes in zip(texts, is_class, strict=True) if yes)
    if len(names) < 2:
        raise InputError(
            f"all usable samples have the label {names[0]!a}; a scan compares classes and needs at least two"
        )
    number = {name: class_id for class_id, name in enumerate(names)}
    class_of = np.array([number.get(text, -1) for text in texts] + [-1], dtype=np.int32)
    class_id = np.where(usable, class_of[codes], np.int32(-1)).astype(np.int32)
    unknown = usable & (class_id < 0)
    trained = int((is_trusted & (class_id >= 0)).sum())
    if trained < MIN_TRUSTED:
        raise InputError(
            f"the trusted set has {trained} usable samples of the corpus's classes; {MIN_TRUSTED} are needed"
        )
    status = pc.if_else(pa.array(unknown), "unknown-label", table["status"])
    columns = {
        "sample_id": pa.array(np.arange(table.num_rows, dtype=np.int64)),
        "class_id": pa.array(class_id),
        "trusted": pa.array(is_trusted),
        "status": status,
    }
    full = pa.table([columns[f.name] if f.name in columns else table[f.name] for f in SCHEMA], schema=SCHEMA)
    notes = _class_notes(full, texts, in_corpus, in_trusted, is_class)
    return full, names, notes


def _class_notes(
    table: pa.Table,
    texts: list[str],
    in_corpus: npt.NDArray[np.int64],
    in_trusted: npt.NDArray[np.int64],
    is_class: npt.NDArray[np.bool_],
) -> list[str]:
    notes = []
    trusted_rows = table.filter(table["trusted"])
    unusable = Counter(s for s in trusted_rows["status"].to_pylist() if s not in ("ok", "unknown-label"))
    if unusable:
        reasons = ", ".join(f"{count} {status}" for status, count in unusable.most_common())
        notes.append(f"{sum(unusable.values())} trusted samples cannot be used: {reasons}.")
    alien = [text for text, c, t in zip(texts, in_corpus, in_trusted, strict=True) if t and not c]
    if alien:
        count = sum(int(t) for c, t in zip(in_corpus, in_trusted, strict=True) if t and not c)
        notes.append(f"{count} trusted samples have labels that the corpus lacks: {_some(alien)}.")
    uncovered = class_names(t for t, yes, n in zip(texts, is_class, in_trusted, strict=True) if yes and not n)
    if uncovered:
        notes.append(
            f"{len(uncovered)} corpus classes have no trusted sample, so nothing vouches for what clean "
            f"looks like there: {_some(uncovered)}."
        )
    return notes


def _some(names: list[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1] for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _shared_image_notes(table: pa.Table) -> list[str]:
    usable = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.is_valid(table["image_sha256"])))
    trusted = usable.filter(usable["trusted"])
    pool = usable.filter(pc.invert(usable["trusted"]))
    labels: dict[str, set[str]] = {}
    for digest, label in zip(trusted["image_sha256"].to_pylist(), trusted["label"].to_pylist(), strict=True):
        labels.setdefault(digest, set()).add(label)
    shared = pool.filter(pc.is_in(pool["image_sha256"], value_set=trusted["image_sha256"].combine_chunks()))
    different = sum(
        label not in labels[digest]
        for digest, label in zip(shared["image_sha256"].to_pylist(), shared["label"].to_pylist(), strict=True)
    )
    notes = []
    if different:
        notes.append(
            f"{different} corpus samples have exactly the image of a trusted sample under another label: "
            "one of the two labels is wrong."
        )
    if shared.num_rows > different:
        notes.append(
            f"{shared.num_rows - different} corpus samples have exactly the image of a trusted sample with "
            "the same label: the trusted set overlaps the corpus."
        )
    return notes
