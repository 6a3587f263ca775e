"""Kept and quarantined shards, copied byte for byte and read back before they count.

The bytes of a sample, headers and padding included, are never re-encoded: a shard is cut into ranges, and
the ranges are written to one of two files. Afterwards both files are compared with the source, walked, and
the kept one is read by webdataset's own reader. Only when all files of all shards are verified do they take
the place of an earlier decision's.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sanitize.corpus.index import storable
from sanitize.corpus.shards import (
    BLOCK,
    CORRUPT,
    CUT,
    DIRECTORY,
    END,
    GARBAGE,
    GLOBAL,
    RESERVED_EXTENSIONS,
    Entry,
    Sample,
    group,
    walk,
)
from sanitize.corpus.sources import ENDINGS, Buffer, Source, Stored, each_shard, open_tar
from sanitize.errors import SanitizeError
from sanitize.progress import Progress

END_MARK = bytes(2 * BLOCK)
_PIECES_A_CALL = 512
"""Ranges handed to one writev call; Linux takes 1,024."""

Piece = memoryview | bytes


class _Job(NamedTuple):
    source: Source
    kept: _Place
    quarantine: _Place
    scratch: Path
    rows: pa.Table
    """key, start, end, status of the shard's rows, in order."""
    flagged: npt.NDArray[np.bool_]
    sha256: str | None
    """Of the stored file when it was indexed, if that is to be compared."""


class _Place(NamedTuple):
    final: Path
    temporary: Path


class Content(NamedTuple):
    """What a shard must hold when unpacked."""

    pieces: Sequence[Piece]
    starts: Sequence[int]
    """Where each index row begins in it, in bytes."""


class Verified(NamedTuple):
    """What was found in a shard that was read back."""

    stored_bytes: int
    sha256: str
    """Hex, of the stored file."""
    samples: int
    """Index rows: for kept/ the samples that webdataset yields, for quarantine/ the row starts at which
    the walk finds an entry."""


def write_shards(
    sources: Sequence[Source],
    table: pa.Table,
    flagged: npt.NDArray[np.bool_],
    out: Path,
    *,
    scratch: Path,
    workers: int,
    progress: Progress,
    digests: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Split every corpus shard into ``out/kept/NAME`` and ``out/quarantine/NAME``.

    All files are written under temporary names and verified before the first takes its place, so the disk
    needs room for the former files and the new ones, and after an error the former ones are all there.
    (A process that is killed while files take their places leaves some of both; run again, it completes.)

    Args:
        sources: the corpus shards that `table` was made from, in the same order.
        table: index (SCHEMA), corpus rows first.
        flagged: (N_corpus,) bool; rows that are not ``ok`` must be flagged.
        out: run folder. Tars in kept/ and quarantine/ that this call does not write are removed.
        digests: by shard name, hex SHA-256 of the stored file when it was indexed. Shards that have to be
            unpacked (remote, piped, compressed) are hashed on the way and must still have it. Local plain
            tars are mapped, not hashed again: their keys and byte ranges must be those of `table`, and
            the caller compares size and time of change.

    Returns:
        A record a shard: name, kept, quarantined (samples, counted in the files as read back), kept_bytes,
        quarantine_bytes, kept_sha256, empty (nothing was kept, so there is no file).

    Raises:
        ValueError: shapes disagree, or an unusable row is not flagged.
        InputError: a shard cannot be read any more.
        SanitizeError: a shard changed since it was indexed, or what was written does not read back.
        OSError: the disk is full; nothing half-written is left.
        KeyError: `digests` lacks a shard.
    """
    corpus = table.filter(pc.invert(table["trusted"]))
    flagged = np.asarray(flagged, dtype=bool)
    if flagged.shape != (corpus.num_rows,):
        raise ValueError(f"flagged has shape {flagged.shape}, but the corpus has {corpus.num_rows} rows")
    unusable = pc.not_equal(corpus["status"], "ok").to_numpy()
    if (unusable & ~flagged).any():
        raise ValueError(f"{int((unusable & ~flagged).sum())} unusable rows are not flagged")
    import webdataset.tariterators  # noqa: F401  (seconds; here, so that the workers need not each do it)

    jobs = _jobs(sources, corpus, flagged, out, scratch, digests)
    remote = any("://" in source.url for source in sources)
    try:
        records = _write_temporaries(jobs, workers, remote, progress)
        total = sum(record["kept"] + record["quarantined"] for record in records)
        if total != corpus.num_rows:
            raise SanitizeError(f"{corpus.num_rows} samples indexed but {total} written; please report this")
        _put_in_place(jobs, records, out)
    except BaseException:
        for job in jobs:
            job.kept.temporary.unlink(missing_ok=True)
            job.quarantine.temporary.unlink(missing_ok=True)
        raise
    return records


def _write_temporaries(
    jobs: list[_Job], workers: int, remote: bool, progress: Progress
) -> list[dict[str, Any]]:
    sizes = [_planned_bytes(job) for job in jobs]
    records = []
    # closing: no worker may be left writing when the temporaries are removed
    with (
        closing(each_shard(_write_shard, jobs, workers, remote=remote)) as results,
        progress.stage("write", sum(sizes), "B") as advance,
    ):
        for record, size in zip(results, sizes, strict=True):
            records.append(record)
            advance(size)
    return records


def _put_in_place(jobs: list[_Job], records: list[dict[str, Any]], out: Path) -> None:
    for job, record in zip(jobs, records, strict=True):
        if record["kept"]:
            os.replace(job.kept.temporary, job.kept.final)
        if record["quarantined"]:
            os.replace(job.quarantine.temporary, job.quarantine.final)
    _remove_stale(out / "kept", {r["name"] for r in records if r["kept"]})
    _remove_stale(out / "quarantine", {r["name"] for r in records if r["quarantined"]})


def _planned_bytes(job: _Job) -> int:
    return int(job.rows["end"][-1].as_py()) if job.rows.num_rows else 0


def _jobs(
    sources: Sequence[Source],
    corpus: pa.Table,
    flagged: npt.NDArray[np.bool_],
    out: Path,
    scratch: Path,
    digests: Mapping[str, str] | None,
) -> list[_Job]:
    encoded = corpus["shard"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    codes = encoded.indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1)) if len(codes) else np.zeros(0, np.int64)
    stops = np.append(starts[1:], len(codes))
    ranges: dict[str, tuple[int, int]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        name = corpus["shard"][start].as_py()
        if name in ranges:
            raise ValueError(f"the rows of shard {name} are not together")
        ranges[name] = (start, stop)
    missing = ranges.keys() - {source.name for source in sources}
    if missing:
        raise ValueError(f"the table has rows of {min(missing)}, which is not among the sources")
    columns = corpus.select(["key", "start", "end", "status"]).combine_chunks()
    jobs = []
    for number, source in enumerate(sources):
        start, stop = ranges.get(source.name, (0, 0))
        # a slice would be pickled with the buffers of the whole table, a copy with its own rows
        rows = columns.slice(start, stop - start).take(pa.array(np.arange(stop - start)))
        kept, quarantine = (_place(out / folder / source.name, number) for folder in ("kept", "quarantine"))
        digest = None if digests is None else digests[source.name]
        jobs.append(_Job(source, kept, quarantine, scratch, rows, flagged[start:stop].copy(), digest))
    return jobs


def _place(final: Path, number: int) -> _Place:
    # the shard's name with an ending might be longer than a file name may be
    return _Place(final, final.with_name(f"{number:06d}.tmp"))


def _write_shard(job: _Job) -> dict[str, Any]:
    """Write and verify the temporary files of one shard."""
    keys = [
        key for key, flag in zip(job.rows["key"].to_pylist(), job.flagged.tolist(), strict=True) if not flag
    ]
    stored = Stored() if job.sha256 is not None and _is_unpacked(job.source) else None
    with open_tar(job.source, job.scratch, stored) as buffer:
        if stored is not None and stored.sha256 != job.sha256:
            raise _changed(job.source)
        kept, quarantine = _plan(buffer, job)
        nothing = Verified(0, "", 0)
        read_kept = _write_file(job, job.kept.temporary, kept, keys) if keys else nothing
        read_quarantine = (
            _write_file(job, job.quarantine.temporary, quarantine, None) if job.flagged.any() else nothing
        )
    return {
        "name": job.source.name,
        "kept": read_kept.samples,
        "quarantined": read_quarantine.samples,
        "kept_bytes": read_kept.stored_bytes,
        "quarantine_bytes": read_quarantine.stored_bytes,
        "kept_sha256": read_kept.sha256 or None,
        "empty": not read_kept.samples,
    }


def _is_unpacked(source: Source) -> bool:
    return not source.local or bool(source.compression)


def _changed(source: Source) -> SanitizeError:
    return SanitizeError(f"{source.name} changed since it was indexed; start a new --out")


def _write_file(job: _Job, temporary: Path, content: Content, keys: list[str] | None) -> Verified:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _write(temporary, content.pieces, job.source.compression)
    verified = verify_shard(replace(job.source, url=str(temporary)), content, keys, job.scratch)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    return verified


def _plan(buffer: Buffer, job: _Job) -> tuple[Content, Content]:
    """Which bytes go to kept/ and to quarantine/: rows as decided, what lies between them by what it is."""
    kept = _Ranges(buffer)
    quarantine = _Ranges(buffer)
    cursor, ended = 0, False
    starts, ends = job.rows["start"].to_pylist(), job.rows["end"].to_pylist()
    statuses = job.rows["status"].to_pylist()
    if ends and ends[-1] > len(buffer):
        raise _changed(job.source)
    for start, end, status, flag in zip(starts, ends, statuses, job.flagged.tolist(), strict=True):
        if start > cursor:
            ended = _place_between(buffer, cursor, start, kept, quarantine, ended)
        (quarantine if flag else kept).begin_row()
        if not flag:
            kept.add(start, end)
        elif status in ("cut", "corrupt-header") or (
            status == "after-end" and _is_garbage(buffer, start, end)
        ):
            quarantine.add_bytes(_wrapped(buffer, start, end, job.source.name))
        else:
            quarantine.add(start, end)
        cursor = end
    if cursor < len(buffer):
        _place_between(buffer, cursor, len(buffer), kept, quarantine, ended)
    return kept.content(), quarantine.content()


class _Ranges:
    """Byte ranges of a buffer, neighbours merged, with other bytes in between."""

    def __init__(self, buffer: Buffer) -> None:
        self._view = memoryview(buffer)
        self._pieces: list[Piece] = []
        self._starts: list[int] = []
        self._start = self._end = self._flushed = 0

    def begin_row(self) -> None:
        """What is added next is the next index row."""
        self._starts.append(self._flushed + self._end - self._start)

    def add(self, start: int, end: int) -> None:
        if start != self._end:
            self._flush()
            self._start = start
        self._end = end

    def add_bytes(self, pieces: list[Piece]) -> None:
        self._flush()
        self._start = self._end = 0
        self._pieces += pieces
        self._flushed += sum(map(len, pieces))

    def _flush(self) -> None:
        if self._end > self._start:
            self._pieces.append(self._view[self._start : self._end])
            self._flushed += self._end - self._start

    def content(self) -> Content:
        self._flush()
        self._start = self._end = 0
        return Content([*self._pieces, END_MARK] if self._pieces else [], self._starts)


def _place_between(
    buffer: Buffer, start: int, end: int, kept: _Ranges, quarantine: _Ranges, ended: bool
) -> bool:
    """Directories stay in kept/, global headers go to both; behind the end mark both are quarantined."""
    for entry in walk(buffer[start:end]):
        if entry.kind == END:
            ended = True
        elif entry.kind in (DIRECTORY, GLOBAL):
            if not ended:
                kept.add(start + entry.start, start + entry.end)
            if ended or entry.kind == GLOBAL:
                quarantine.add(start + entry.start, start + entry.end)
    return ended


def _is_garbage(buffer: Buffer, start: int, end: int) -> bool:
    return any(entry.kind in (CORRUPT, CUT, GARBAGE) for entry in walk(buffer[start:end]))


def _wrapped(buffer: Buffer, start: int, end: int, shard: str) -> list[Piece]:
    """Unreadable bytes as the content of a regular member, so that the quarantine is a valid tar."""
    stem = shard.replace("/", "-")
    for ending in ENDINGS:
        stem = stem.removesuffix(ending)
    info = tarfile.TarInfo(f"__unreadable__/{stem}-{start}.bin")
    info.size = end - start
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return [header, memoryview(buffer)[start:end], bytes(-info.size % BLOCK)]


def _write(path: Path, pieces: Sequence[Piece], compression: str) -> None:
    with open(path, "wb", buffering=0) as file:
        if compression == "gz":
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                for piece in pieces:
                    packed.write(piece)
        elif compression == "zst":
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
                for piece in pieces:
                    packed.write(piece)
        else:
            _write_plain(file, pieces)


def _write_plain(file: IO[bytes], pieces: Sequence[Piece]) -> None:
    for at in range(0, len(pieces), _PIECES_A_CALL):
        batch = pieces[at : at + _PIECES_A_CALL]
        written = os.writev(file.fileno(), batch)
        for piece in batch:  # a signal, a full disk or 2 GiB end a call early; the rest goes piece by piece
            skip = min(written, len(piece))
            written -= skip
            rest = memoryview(piece)[skip:]
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]


def verify_shard(written: Source, content: Content, keys: list[str] | None, scratch: Path) -> Verified:
    """Read a written shard back and compare it with what was meant.

    Args:
        written: the file; its name stands in error messages.
        content: what it must hold when unpacked.
        keys: of the samples that webdataset must read from it, in order, as stored in the index; None for
            a quarantine shard, which may hold what webdataset refuses.

    Raises:
        SanitizeError: bytes, headers, samples or what webdataset reads differ from what was meant.
    """
    stored = Stored()
    with open_tar(written, scratch, stored) as buffer:
        if stored.problems or not _same_bytes(buffer, content.pieces):
            raise SanitizeError(f"{written.name}: what was written differs from the source; check the disk")
        entries = walk(buffer)
        if any(e.kind in (CORRUPT, CUT, GARBAGE) for e in entries) or not entries or entries[-1].kind != END:
            raise SanitizeError(f"{written.name}: what was written is no clean tar; please report this shard")
        if keys is None:
            found = _found_rows(entries, content.starts)
        else:
            samples, _ = group(entries)
            if [storable(sample.key) for sample in samples] != keys:
                raise _not_decided(written)
            found = _compare_with_webdataset(written.name, buffer, samples)
        if found != len(content.starts):
            raise _not_decided(written)
    return Verified(stored.raw_bytes, stored.sha256, found)


def _found_rows(entries: list[Entry], starts: Sequence[int]) -> int:
    """How many rows begin where an entry does; wrapped bytes are an entry, too."""
    return len({entry.start for entry in entries if entry.kind != END}.intersection(starts))


def _not_decided(written: Source) -> SanitizeError:
    return SanitizeError(f"{written.name}: the samples written are not those decided on; please report")


def _same_bytes(buffer: Buffer, pieces: Sequence[Piece]) -> bool:
    at, step = 0, 1 << 20
    for piece in pieces:
        for offset in range(0, len(piece), step):
            part = bytes(piece[offset : offset + step])
            if buffer[at : at + len(part)] != part:
                return False
            at += len(part)
    return at == len(buffer)


def _compare_with_webdataset(shard: str, buffer: Buffer, samples: list[Sample]) -> int:
    """webdataset's reader and grouping, undecoded, must find exactly `samples` and their bytes; how many."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    stream: Any = io.BytesIO(buffer) if isinstance(buffer, bytes) else buffer
    stream.seek(0)

    def files() -> Iterator[dict[str, Any]]:
        for member in tar_file_iterator(stream):
            member["__url__"] = shard
            yield member

    count = 0
    try:
        for count, (read, sample) in enumerate(zip(group_by_keys(files()), samples, strict=True), 1):
            members = {name: data for name, data in read.items() if name not in RESERVED_EXTENSIONS}
            written = {name: buffer[e.data : e.data + e.size] for name, e in sample.members.items()}
            if read["__key__"] != sample.key or members != written:
                raise SanitizeError(
                    f"{shard}: webdataset reads sample {count} differently than it was written; "
                    "please report this shard"
                )
    except (ValueError, tarfile.TarError) as error:
        raise SanitizeError(
            f"{shard}: webdataset does not read what was written after sample {count} ({error}); "
            "please report this shard"
        ) from error
    return count


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Remove shards of an earlier decision that this one has no part in."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in current and name.lower().endswith((*ENDINGS, ".tmp")):
            path.unlink()
