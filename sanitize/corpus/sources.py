"""Which shards are meant, and their bytes as one flat tar, wherever and however they are stored."""

from __future__ import annotations

import glob
import hashlib
import itertools
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from sanitize.errors import InputError, SanitizeError, UsageError

ENDINGS = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.zst": "zst"}
"""Shard file endings and the compression each stands for."""
MAX_PLAIN_BYTES = 64 << 30
"""No shard may unpack to more than this."""
MAX_RATIO, FREE_BYTES = 200, 1 << 30
"""A shard may unpack to 200 times what was read of it; the first GiB is always allowed."""
MAX_BRACES = 100_000
"""A brace list may stand for this many shards."""
_GLOB = re.compile(r"[*?\[]")
_CHUNK = 1 << 18
_ZSTD_CHUNK = 1 << 12
"""A zstd block can hold 32,000 times its size; little input at a time bounds the memory."""

Buffer = mmap.mmap | bytes
"""The bytes of a plain tar: slices are `bytes`. An empty file is `b""`, as it cannot be mapped."""
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Source:
    """One shard."""

    name: str
    """File name in kept/ and in reports, unique in its list: posix, relative, without `..`."""
    url: str
    """Absolute local path (symbolic links kept), fsspec URL, or ``pipe:COMMAND``."""
    compression: str
    """``""``, ``gz`` or ``zst``."""

    @property
    def local(self) -> bool:
        return _is_local(self.url)

    @property
    def identity(self) -> str:
        """Equal for two names of one file: the path without symbolic links, or the URL."""
        return _identity(self.url)


@dataclass
class Stored:
    """What `open_tar` learned about the stored file while reading it."""

    raw_bytes: int = 0
    sha256: str = ""
    problems: list[str] = field(default_factory=list)


def expand(spec: str, *, allow_pipe: bool = False) -> list[Source]:
    """Every shard that `spec` names, in order.

    Args:
        spec: a folder, a glob, a brace list, several of them joined by ``::``, ``@list.txt``, or an
            fsspec URL. Folders and globs are sorted by name.
        allow_pipe: whether ``pipe:COMMAND`` is accepted.

    Raises:
        InputError: nothing there, a wrong file ending, or one shard named twice.
        UsageError: ``pipe:`` without `allow_pipe`.
    """
    urls = [url for piece in spec.split("::") for url in _resolve(piece.strip(), Path(), allow_pipe)]
    _refuse_repeated(urls, spec)
    return [Source(name, url, _compression(url)) for name, url in zip(_unique_names(urls), urls, strict=True)]


def _refuse_repeated(urls: list[str], spec: str) -> None:
    seen: dict[str, str] = {}
    for url in urls:
        identity = _identity(url)
        if identity in seen and not url.startswith("pipe:"):
            link = "" if seen[identity] == url else f" (once as {seen[identity]})"
            raise InputError(f"{url} is named twice{link} in {spec!r}; name every shard once")
        seen[identity] = url


def distinct_names(trusted: Sequence[Source], corpus: Sequence[Source]) -> list[Source]:
    """The trusted shards, renamed ``trusted/NAME`` where a corpus shard has the same name.

    The prefix is repeated until no other shard has the name.
    """
    in_corpus = {source.name for source in corpus}
    taken = in_corpus | {source.name for source in trusted}
    named = []
    for source in trusted:
        name = source.name
        if name in in_corpus:
            while name in taken:
                name = f"trusted/{name}"
            taken.add(name)
        named.append(replace(source, name=name))
    return named


def _is_local(url: str) -> bool:
    return not url.startswith("pipe:") and "://" not in url


def _identity(url: str) -> str:
    return os.path.realpath(url) if _is_local(url) else url


def _resolve(piece: str, base: Path, allow_pipe: bool) -> list[str]:
    import braceexpand

    if not piece:
        raise InputError("an empty shard name; give a folder, a glob, a brace list or a URL")
    if piece.startswith("@"):
        return _resolve_list(base / piece[1:], allow_pipe)
    if not piece.startswith("pipe:") and "://" not in piece and os.path.exists((base / piece).expanduser()):
        return _resolve_local(base / piece)  # a path that exists is meant literally, braces and all
    try:
        alternatives = list(itertools.islice(braceexpand.braceexpand(piece), MAX_BRACES + 1))
    except ValueError as error:
        raise InputError(f"{piece}: {error}; write brace lists as data-{{000..099}}.tar") from None
    if len(alternatives) > MAX_BRACES:
        raise InputError(f"{piece} stands for more than {MAX_BRACES:,} shards; check its numbers")
    urls = []
    for alternative in alternatives:
        if alternative.startswith("pipe:"):
            if not allow_pipe:
                raise UsageError(f"{alternative} would run a command; pass --allow-pipe if you trust it")
            urls.append(alternative)
        elif alternative.startswith("file://"):
            urls += _resolve_local(Path(alternative.removeprefix("file://")))
        elif "://" in alternative:
            urls += _resolve_remote(alternative)
        else:
            urls += _resolve_local(base / alternative)
    return urls


def _resolve_list(path: Path, allow_pipe: bool) -> list[str]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read this list of shards ({error})") from None
    specs = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not specs:
        raise InputError(f"{path} names no shard; write one a line")
    for spec in specs:
        if spec.startswith("@"):
            raise InputError(f"{path}: {spec} is a list inside a list; name shards here")
    return [url for spec in specs for url in _resolve(spec, path.expanduser().parent, allow_pipe)]


def _resolve_local(path: Path) -> list[str]:
    path = path.expanduser()
    if os.path.isdir(path):
        try:
            found = sorted(str(p) for p in path.iterdir() if _ending(p.name) and p.is_file())
        except OSError as error:
            raise InputError(f"{path}: cannot be listed ({error.strerror})") from None
        if not found:
            raise InputError(_nothing_in(path))
    elif os.path.exists(path):
        found = [str(path)]
    elif _GLOB.search(str(path)):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise InputError(f"no file matches {path}; quote the pattern and check the folder")
    else:
        raise InputError(f"{path} does not exist; give a folder, a glob or a brace list of .tar shards")
    for name in found:
        _check_ending(name)
        if os.path.isdir(name):
            raise InputError(f"{name} is a folder; a shard is a file")
    return [_absolute(name) for name in found]


def _absolute(path: str) -> str:
    """Absolute, but with the names that links have: in a Hugging Face cache every shard is a link."""
    folder, name = os.path.split(path)
    if ".." in folder.split(os.sep):  # behind a link, `..` is not the folder that is written before it
        return os.path.join(os.path.realpath(folder), name)
    return os.path.abspath(path)


def _nothing_in(folder: Path) -> str:
    deeper = next((p for p in sorted(folder.glob("*/*")) if _ending(p.name)), None)
    advice = f"its subfolders do: give '{folder}/*/*.tar'" if deeper else "give the folder that does"
    return f"{folder} holds no shard ({', '.join(ENDINGS)}); {advice}"


def _resolve_remote(url: str) -> list[str]:
    import fsspec

    with _storage_errors(f"{url}: cannot be listed"):
        filesystem, path = fsspec.url_to_fs(url)
        if _GLOB.search(urlsplit(url).path):
            found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(path))]
        elif _ending(url):
            found = [url] if filesystem.exists(path) else []
        else:
            listing = sorted(filesystem.ls(path, detail=False)) if filesystem.isdir(path) else [url]
            found = [filesystem.unstrip_protocol(name) for name in listing if _ending(name)] or [url]
    if not found:
        raise InputError(f"{url} does not exist, or nothing matches it")
    for name in found:
        _check_ending(name)
    return found


def _ending(name: str) -> str | None:
    path = urlsplit(name).path if name.startswith(("http://", "https://")) else name
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), None)


def _check_ending(name: str) -> None:
    if _ending(name) is None:
        raise InputError(f"{name} is no shard: its name must end in one of {', '.join(ENDINGS)}")


def _compression(url: str) -> str:
    return "" if url.startswith("pipe:") else ENDINGS[_ending(url) or ".tar"]


def _unique_names(urls: list[str]) -> list[str]:
    """Base names where they are unique, else paths below the common folder."""
    paths = []
    for number, url in enumerate(urls):
        if url.startswith("pipe:"):
            paths.append(f"/pipe-{number:06d}.tar")
        elif "://" in url:
            split = urlsplit(url)
            path = split.path if split.scheme in ("http", "https") else url.split("://", 1)[1]
            paths.append(os.path.normpath(f"/{split.netloc}/{path}".replace("//", "/")))
        else:
            paths.append(url)
    names = [os.path.basename(path) for path in paths]
    twice = {name for name, count in Counter(names).items() if count > 1}
    if not twice:
        return names
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    relative = [
        os.path.relpath(path, common).replace(os.sep, "/") if name in twice else name
        for name, path in zip(names, paths, strict=True)
    ]
    if len(set(relative)) < len(relative):
        raise InputError("two of these shards cannot be told apart by name; rename one or scan them apart")
    return relative


@contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """Turn whatever the storage raises into an InputError that begins with `what`."""
    try:
        yield
    except Exception as error:  # broad: fsspec back ends raise their own, such as botocore's and aiohttp's
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{what} ({reason})") from error


def fingerprint(source: Source) -> tuple[int, int]:
    """Stored size in bytes and modification time in ns; 0 for what the storage does not tell.

    Raises:
        InputError: the shard is not there any more, or its storage does not answer.
    """
    with _storage_errors(f"{source.name}: cannot be read"):
        if source.local:
            facts = os.stat(source.url)
            return facts.st_size, facts.st_mtime_ns
        if source.url.startswith("pipe:"):
            return 0, 0
        import fsspec

        filesystem, path = fsspec.url_to_fs(source.url)
        info = filesystem.info(path)
        changed = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
        seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
        return int(info.get("size") or 0), int(float(seconds) * 1e9)


@contextmanager
def open_tar(source: Source, scratch: Path, stored: Stored | None = None) -> Iterator[Buffer]:
    """The bytes of the plain tar, mapped into memory.

    A local .tar is mapped in place; anything else is unpacked into an unlinked file in `scratch`. Of a
    damaged compressed file, what could be unpacked is there and `stored.problems` says so.

    Args:
        stored: filled with size, digest and problems of the stored file, where given.

    Raises:
        InputError: missing, unreadable, a decompression bomb, or compressed under the name of a .tar.
        OSError: no space in `scratch`.
    """
    if source.local and not source.compression:
        try:
            file: IO[bytes] = open(source.url, "rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{source.name}: cannot be read ({error})") from error
        in_place = True
    else:
        file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        in_place = False
    with file:
        if not in_place:
            _unpack(source, file, stored if stored is not None else Stored())
            file.flush()
        size = os.fstat(file.fileno()).st_size
        buffer: Buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        if in_place and stored is not None:
            stored.raw_bytes = size
            stored.sha256 = hashlib.sha256(buffer).hexdigest()
        _refuse_wrong_name(source, buffer)
        try:
            yield buffer
        finally:
            if isinstance(buffer, mmap.mmap):
                with suppress(BufferError):  # a caller still holds a view: the garbage collector closes it
                    buffer.close()


def _refuse_wrong_name(source: Source, buffer: Buffer) -> None:
    magics = {b"\x1f\x8b": "gzip (.tar.gz)", b"\x28\xb5\x2f\xfd": "zstandard (.tar.zst)"}
    for magic, kind in magics.items():
        if buffer[: len(magic)] == magic:
            raise InputError(f"{source.name} is compressed with {kind} but named otherwise; rename it")


@contextmanager
def _raw_stream(source: Source) -> Iterator[IO[bytes]]:
    if source.url.startswith("pipe:"):
        with _pipe_stream(source) as stream:
            yield stream
        return
    with _storage_errors(f"{source.name}: cannot be read"):
        if source.local:
            opened: Any = open(source.url, "rb")  # noqa: SIM115
        else:
            import fsspec

            opened = fsspec.open(source.url, "rb").open()
    try:
        yield opened
    finally:
        with _storage_errors(f"{source.name}: cannot be read"):
            opened.close()


@contextmanager
def _pipe_stream(source: Source) -> Iterator[IO[bytes]]:
    shell = shutil.which("bash") or "/bin/sh"
    command = source.url.removeprefix("pipe:")
    process = subprocess.Popen([shell, "-c", command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    finished = False
    try:
        yield process.stdout
        finished = True
    finally:
        process.stdout.close()
        if not finished:
            process.kill()
        status = process.wait()
    if status:
        raise InputError(f"{source.name}: the command {command!r} ended with status {status}")


class _Reader:
    """Counts, hashes and hands out the stored bytes; never gives more than asked for."""

    def __init__(self, name: str, raw: IO[bytes], stored: Stored) -> None:
        self._name, self._raw, self._stored, self.digest = name, raw, stored, hashlib.sha256()

    def read(self, size: int) -> bytes:
        with _storage_errors(f"{self._name}: cannot be read"):
            chunk = self._raw.read(size)
        self.digest.update(chunk)
        self._stored.raw_bytes += len(chunk)
        return chunk


def _unpack(source: Source, target: IO[bytes], stored: Stored) -> None:
    unpack: Callable[[_Reader], Iterator[bytes]]
    unpack = {"": _plain_chunks, "gz": _gzip_chunks, "zst": _zstd_chunks}[source.compression]
    written = 0
    with _raw_stream(source) as raw:
        reader = _Reader(source.name, raw, stored)
        try:
            for chunk in unpack(reader):
                written += len(chunk)
                allowed = max(FREE_BYTES, MAX_RATIO * stored.raw_bytes) if source.compression else written
                if written > min(MAX_PLAIN_BYTES, allowed):
                    raise InputError(
                        f"{source.name} unpacks to more than {written - len(chunk):,} bytes from "
                        f"{stored.raw_bytes:,} stored: refused as a decompression bomb; leave it out"
                    )
                target.write(chunk)
        except _DamagedError as error:
            stored.problems.append(f"damaged {source.compression} stream: {error}; {written:,} bytes usable")
        while reader.read(1 << 20):  # the digest is that of the whole file
            pass
        stored.sha256 = reader.digest.hexdigest()


class _DamagedError(Exception):
    """A compressed stream that cannot be unpacked any further."""


def _plain_chunks(reader: _Reader) -> Iterator[bytes]:
    while chunk := reader.read(1 << 20):
        yield chunk


def _gzip_chunks(reader: _Reader) -> Iterator[bytes]:
    """All members of a gzip file, at most 1 MiB at a time."""
    member, data = zlib.decompressobj(wbits=31), b""
    while True:
        data = data or reader.read(_CHUNK)
        if not data:
            raise _DamagedError("it ends early")
        before = member.copy()
        try:
            plain = member.decompress(data, 1 << 20)
        except zlib.error as error:
            yield from _gzip_salvage(before, data)
            raise _DamagedError(str(error)) from None
        if plain:
            yield plain
        data = member.unconsumed_tail
        if member.eof:
            data = (member.unused_data or reader.read(_CHUNK)).lstrip(b"\0")
            if not data:
                return
            member = zlib.decompressobj(wbits=31)


def _gzip_salvage(member: Any, data: bytes) -> Iterator[bytes]:
    """What can be unpacked of a chunk with an error in it, up to the error."""
    for at in range(0, len(data), 16):
        try:
            plain = member.decompress(data[at : at + 16])
        except zlib.error:
            return
        if plain:
            yield plain


def _zstd_chunks(reader: _Reader) -> Iterator[bytes]:
    import zstandard

    frame, data = zstandard.ZstdDecompressor().decompressobj(), b""
    while data := data or reader.read(_ZSTD_CHUNK):
        try:
            plain = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise _DamagedError(str(error)) from None
        if plain:
            yield plain
        data = b""
        if frame.eof:
            data = frame.unused_data or reader.read(_ZSTD_CHUNK)
            if not data:
                return
            frame = zstandard.ZstdDecompressor().decompressobj()
    raise _DamagedError("it ends early")


SPAWNED = (
    ". For shards that are read over a network, fresh processes import the script that called sanitize: "
    'it must do its work under if __name__ == "__main__":'
)


def each_shard(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int, *, remote: bool = False
) -> Generator[_Result, None, None]:
    """Results of `function` over `jobs`, in order, computed in `workers` processes (1: in this one).

    On Linux the workers die with this process, however it ends.

    Args:
        remote: start fresh processes instead of forks, which network file systems do not survive.

    Raises:
        SanitizeError: a worker was killed; or what `function` raises.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    fork = not remote and "fork" in multiprocessing.get_all_start_methods() and os.uname().sysname == "Linux"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_die_with_parent, initargs=(os.getpid(),)
    )
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool:
        advice = "" if fork else SPAWNED
        raise SanitizeError(
            "a worker process was killed, most likely because memory ran out; free some and run the same "
            f"command again{advice}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _die_with_parent(parent: int) -> None:
    """Have Linux kill this worker when the thread that started it ends: that is the one in `each_shard`.

    A fork holds the lock of the run folder; a worker that outlived its parent would keep the next run out.
    """
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
