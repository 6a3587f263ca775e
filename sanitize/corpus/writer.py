"""Kept and quarantined shards, copied byte for byte and read back before they count.

The bytes of a sample, headers and padding included, are never re-encoded: a shard is cut into ranges, and
the ranges are written to one of two files. Afterwards both files are compared with the source, walked, and
the kept one is read by webdataset's own reader.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sanitize.corpus.index import storable
from sanitize.corpus.shards import BLOCK, CORRUPT, CUT, DIRECTORY, END, GARBAGE, GLOBAL, Sample, group, walk
from sanitize.corpus.sources import ENDINGS, Buffer, Source, Stored, each_shard, open_tar
from sanitize.errors import SanitizeError
from sanitize.progress import Progress

END_MARK = bytes(2 * BLOCK)
_PIECES_A_CALL = 512
"""Ranges handed to one writev call; Linux takes 1,024."""

Piece = memoryview | bytes


class _Job(NamedTuple):
    source: Source
    out: Path
    scratch: Path
    rows: pa.Table
    """key, start, end, status of the shard's rows, in order."""
    flagged: npt.NDArray[np.bool_]


class _Plan(NamedTuple):
    kept: list[Piece]
    quarantine: list[Piece]


def write_shards(
    sources: Sequence[Source],
    table: pa.Table,
    flagged: npt.NDArray[np.bool_],
    out: Path,
    *,
    scratch: Path,
    workers: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Split every corpus shard into ``out/kept/NAME`` and ``out/quarantine/NAME``.

    Args:
        sources: the corpus shards that `table` was made from, in the same order.
        table: index (SCHEMA), corpus rows first.
        flagged: (N_corpus,) bool; rows that are not ``ok`` must be flagged.
        out: run folder. Tars in kept/ and quarantine/ that this call does not write are removed.

    Returns:
        A record a shard: name, kept, quarantined (samples), kept_bytes, quarantine_bytes, kept_sha256,
        empty (nothing was kept, so there is no file).

    Raises:
        ValueError: shapes disagree, or an unusable row is not flagged.
        InputError: a shard cannot be read any more.
        SanitizeError: a shard changed since it was indexed, or what was written does not read back.
        OSError: the disk is full; nothing half-written is left.
    """
    corpus = table.filter(pc.invert(table["trusted"]))
    flagged = np.asarray(flagged, dtype=bool)
    if flagged.shape != (corpus.num_rows,):
        raise ValueError(f"flagged has shape {flagged.shape}, but the corpus has {corpus.num_rows} rows")
    unusable = pc.not_equal(corpus["status"], "ok").to_numpy()
    if (unusable & ~flagged).any():
        raise ValueError(f"{int((unusable & ~flagged).sum())} unusable rows are not flagged")
    import webdataset.tariterators  # noqa: F401  (seconds; here, so that the workers need not each do it)

    jobs = _jobs(sources, corpus, flagged, out, scratch)
    sizes = [_planned_bytes(job) for job in jobs]
    remote = any("://" in source.url for source in sources)
    records: list[dict[str, Any]] = []
    with progress.stage("write", sum(sizes), "B") as advance:
        for record, size in zip(each_shard(_write_shard, jobs, workers, remote=remote), sizes, strict=True):
            records.append(record)
            advance(size)
    total = sum(record["kept"] + record["quarantined"] for record in records)
    if total != corpus.num_rows:
        raise SanitizeError(f"{corpus.num_rows} samples indexed but {total} written; please report this")
    _remove_stale(out / "kept", {r["name"] for r in records if not r["empty"]})
    _remove_stale(out / "quarantine", {r["name"] for r in records if r["quarantine_bytes"]})
    return records


def _planned_bytes(job: _Job) -> int:
    return int(job.rows["end"][-1].as_py()) if job.rows.num_rows else 0


def _jobs(
    sources: Sequence[Source],
    corpus: pa.Table,
    flagged: npt.NDArray[np.bool_],
    out: Path,
    scratch: Path,
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
    for source in sources:
        start, stop = ranges.get(source.name, (0, 0))
        # a slice would be pickled with the buffers of the whole table, a copy with its own rows
        rows = columns.slice(start, stop - start).take(pa.array(np.arange(stop - start)))
        jobs.append(_Job(source, out, scratch, rows, flagged[start:stop].copy()))
    return jobs


def _write_shard(job: _Job) -> dict[str, Any]:
    name = job.source.name
    record: dict[str, Any] = {
        "name": name,
        "kept": int((~job.flagged).sum()),
        "quarantined": int(job.flagged.sum()),
        "kept_bytes": 0,
        "quarantine_bytes": 0,
        "kept_sha256": None,
        "empty": bool(job.flagged.all()),
    }
    kept_path, quarantine_path = job.out / "kept" / name, job.out / "quarantine" / name
    kept_keys = [
        key for key, flag in zip(job.rows["key"].to_pylist(), job.flagged.tolist(), strict=True) if not flag
    ]
    # both files are written and verified before either takes its place
    with open_tar(job.source, job.scratch) as buffer, ExitStack() as stack:
        plan = _plan(buffer, job)
        if not record["empty"]:
            temporary = stack.enter_context(_replacing(kept_path))
            _write(temporary, plan.kept, job.source.compression)
            written = replace(job.source, url=str(temporary))
            record["kept_sha256"] = verify_shard(written, plan.kept, kept_keys, job.scratch)
            record["kept_bytes"] = temporary.stat().st_size
        if record["quarantined"]:
            temporary = stack.enter_context(_replacing(quarantine_path))
            _write(temporary, plan.quarantine, job.source.compression)
            written = replace(job.source, url=str(temporary))
            verify_shard(written, plan.quarantine, None, job.scratch)
            record["quarantine_bytes"] = temporary.stat().st_size
    if record["empty"]:
        kept_path.unlink(missing_ok=True)
    if not record["quarantined"]:
        quarantine_path.unlink(missing_ok=True)
    return record


def _plan(buffer: Buffer, job: _Job) -> _Plan:
    """Which bytes go where: rows as decided, what lies between them by what it is."""
    kept = _Ranges(buffer)
    quarantine = _Ranges(buffer)
    cursor, ended = 0, False
    starts, ends = job.rows["start"].to_pylist(), job.rows["end"].to_pylist()
    statuses = job.rows["status"].to_pylist()
    if ends and ends[-1] > len(buffer):
        raise SanitizeError(f"{job.source.name} changed since it was indexed; scan it again with a new --out")
    for start, end, status, flag in zip(starts, ends, statuses, job.flagged.tolist(), strict=True):
        if start > cursor:
            ended = _place_between(buffer, cursor, start, kept, quarantine, ended)
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
    return _Plan(kept.pieces(), quarantine.pieces())


class _Ranges:
    """Byte ranges of a buffer, neighbours merged, with other bytes in between."""

    def __init__(self, buffer: Buffer) -> None:
        self._view = memoryview(buffer)
        self._pieces: list[Piece] = []
        self._start = self._end = 0

    def add(self, start: int, end: int) -> None:
        if start != self._end:
            self._flush()
            self._start = start
        self._end = end

    def add_bytes(self, pieces: list[Piece]) -> None:
        self._flush()
        self._start = self._end = 0
        self._pieces += pieces

    def _flush(self) -> None:
        if self._end > self._start:
            self._pieces.append(self._view[self._start : self._end])

    def pieces(self) -> list[Piece]:
        self._flush()
        self._start = self._end = 0
        return [*self._pieces, END_MARK] if self._pieces else []


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


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, synced to disk, if all goes well, and is gone otherwise."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, pieces: list[Piece], compression: str) -> None:
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


def _write_plain(file: IO[bytes], pieces: list[Piece]) -> None:
    for at in range(0, len(pieces), _PIECES_A_CALL):
        batch = pieces[at : at + _PIECES_A_CALL]
        written = os.writev(file.fileno(), batch)
        for piece in batch:  # a signal, a full disk or 2 GiB end a call early; the rest goes piece by piece
            skip = min(written, len(piece))
            written -= skip
            rest = memoryview(piece)[skip:]
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]


def verify_shard(written: Source, pieces: Sequence[Piece], keys: list[str] | None, scratch: Path) -> str:
    """Read a written shard back and compare it with what was meant.

    Args:
        written: the file; its name stands in error messages.
        pieces: the bytes it must hold when unpacked.
        keys: of the samples that webdataset must read from it, in order, as stored in the index; None for
            a quarantine shard, which may hold what webdataset refuses.

    Returns:
        Hex SHA-256 of the stored file.

    Raises:
        SanitizeError: bytes, headers, samples or what webdataset reads differ from what was meant.
    """
    stored = Stored()
    with open_tar(written, scratch, stored) as buffer:
        if stored.problems or not _same_bytes(buffer, pieces):
            raise SanitizeError(f"{written.name}: what was written differs from the source; check the disk")
        entries = walk(buffer)
        if any(e.kind in (CORRUPT, CUT, GARBAGE) for e in entries) or not entries or entries[-1].kind != END:
            raise SanitizeError(f"{written.name}: what was written is no clean tar; please report this shard")
        if keys is not None:
            samples, _ = group(entries)
            if [storable(sample.key) for sample in samples] != keys:
                raise SanitizeError(
                    f"{written.name}: the samples written are not those decided on; please report"
                )
            _compare_with_webdataset(written.name, buffer, samples)
    return stored.sha256


def _same_bytes(buffer: Buffer, pieces: Sequence[Piece]) -> bool:
    at, step = 0, 1 << 20
    for piece in pieces:
        for offset in range(0, len(piece), step):
            part = bytes(piece[offset : offset + step])
            if buffer[at : at + len(part)] != part:
                return False
            at += len(part)
    return at == len(buffer)


def _compare_with_webdataset(shard: str, buffer: Buffer, samples: list[Sample]) -> None:
    """webdataset's reader and grouping, undecoded, must find exactly `samples` and their bytes."""
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
            members = {name: data for name, data in read.items() if not name.startswith("__")}
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


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Remove shards of an earlier decision that this one has no part in."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in current and name.endswith((*ENDINGS, ".tmp")):
            path.unlink()
