"""The run folder: where the stages of a scan meet, and how a killed scan goes on.

A stage writes temporary files, fsyncs them, moves them into place, and only then is marked done in
``manifest.json``. One process at a time holds the folder's lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sanitize.errors import DiskFullError, InputError, RunFolderError, SanitizeError, UsageError

MANIFEST = "manifest.json"


class RunDir:
    """An open, locked run folder with its manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any], lock: int) -> None:
        self.path, self.manifest, self._lock = path, manifest, lock

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], versions: dict[str, str]) -> Self:
        """Open `path` for the scan `config`: a new run, or one that was interrupted.

        Raises:
            RunFolderError: the folder holds another scan, something else, or is in use.
        """
        with disk_errors(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UsageError(f"--out {path} is a file, or lies in one; give a folder") from None
        _refuse_strangers(path)
        lock = _acquire(path)
        with _released_on_error(lock):
            manifest = _manifest_of(path, config)
            if manifest is None:
                run = cls(path, {"config": config, "versions": versions, "stages": {}}, lock)
                run.save()
                return run
            return cls(path, manifest, lock)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run, for `filter` and `report`.

        Raises:
            InputError: no run there.
            RunFolderError: in use.
        """
        if not (path / MANIFEST).is_file():
            raise InputError(f"{path} is not a run folder (no {MANIFEST}); make one with: sanitize scan")
        lock = _acquire(path)
        with _released_on_error(lock):
            manifest = _read_manifest(path)
            assert manifest is not None
            return cls(path, manifest, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def save(self) -> None:
        """Write manifest.json, atomically."""
        text = json.dumps(self.manifest, indent=1, ensure_ascii=True)
        with disk_errors(self.path):
            write_atomic(self.path / MANIFEST, text.encode())

    def is_done(self, stage: str) -> bool:
        return stage in self.manifest["stages"]

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and mark it done at the end; what is put in the yielded dict is stored with it."""
        facts: dict[str, Any] = {}
        began = time.monotonic()
        with disk_errors(self.path):
            yield facts
            self.manifest["stages"][name] = {"seconds": round(time.monotonic() - began, 3), **facts}
            self.save()

    def forget(self, *stages: str) -> None:
        """Unmark stages, so that they run again."""
        for stage in stages:
            self.manifest["stages"].pop(stage, None)
        self.save()

    def clear_temporary(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in self.path.rglob("*.tmp"):
            if leftover.is_file():
                leftover.unlink()


def _acquire(path: Path) -> int:
    with disk_errors(path):
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunFolderError(
            f"{path} is in use by another sanitize process; wait for it or give another --out"
        ) from None
    return lock


@contextmanager
def _released_on_error(lock: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(lock)
        raise


def _refuse_strangers(path: Path) -> None:
    strangers = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if strangers and MANIFEST not in strangers:
        raise RunFolderError(
            f"{path} is not a run folder and not empty (it holds {strangers[0]}); give another --out"
        )


def _manifest_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the scan `config` that `path` holds, None if it holds none that got anywhere."""
    stored = _read_manifest(path)
    if (
        stored is None or not stored["stages"]
    ):  # nothing was finished: the first try, with a wrong --label perhaps
        return None
    differences = _differences(stored["config"], config)
    if differences:
        raise RunFolderError(
            f"{path} belongs to a scan with other settings:\n  "
            + "\n  ".join(differences)
            + "\nGive another --out; for a new decision on this run: sanitize filter"
        )
    return stored


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFolderError(f"{path / MANIFEST} is not valid JSON ({error}); give another --out") from error
    if not isinstance(manifest, dict) or not manifest.keys() >= {"config", "stages"}:
        raise RunFolderError(f"{path / MANIFEST} is not that of a scan; give another --out")
    return manifest


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old!r} there, {new!r} now")
    return lines


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and other troubles of the disk into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
            where = error.filename or path
            raise SanitizeError(f"{where}: {error.strerror}; check the disk and the permissions") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"{path}: {os.strerror(error.errno)}. What was finished before still stands; free some space "
            "and run the same command again (--dry-run estimates what a scan needs)"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def create_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.memmap[Any, Any]:
    """A new .npy memmap whose blocks are allocated now: a full disk is an error here, not a SIGBUS later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                path.unlink()
                raise
    return array
