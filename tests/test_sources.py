import errno
import gzip
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from builders import END_MARK, corpus, sample, shard, tar

from sanitize.corpus import sources
from sanitize.corpus.sources import (
    Source,
    Stored,
    distinct_names,
    each_shard,
    expand,
    fingerprint,
    open_tar,
)
from sanitize.errors import InputError, SanitizeError, UsageError

PLAIN = tar(*(sample(f"{i:03d}", seed=i) for i in range(30)))


def names(spec: object, **options: bool) -> list[str]:
    return [source.name for source in expand(str(spec), **options)]


def read(source: Source, scratch: Path) -> tuple[bytes, Stored]:
    stored = Stored()
    with open_tar(source, scratch, stored) as buffer:
        data = buffer[:]
    assert list(scratch.iterdir()) == []  # nothing is left in scratch
    return data, stored


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return corpus(tmp_path / "corpus", samples=6, shards=3)


def test_folder_glob_braces_and_joined(folder: Path) -> None:
    everything = ["data-000.tar", "data-001.tar", "data-002.tar"]
    (folder / "notes.txt").write_text("no shard")
    assert names(folder) == everything
    assert names(folder / "data-*.tar") == everything
    assert names(folder / "data-{000..002}.tar") == everything
    assert names(f"{folder}/data-002.tar::{folder}/data-00[01].tar") == [everything[2], *everything[:2]]
    assert names(f"file://{folder}/data-001.tar") == everything[1:2]


def test_endings_give_the_compression(tmp_path: Path) -> None:
    for ending in (".tar", ".tar.gz", ".tar.zst", ".tgz"):
        (tmp_path / f"a{ending}").write_bytes(b"")
    assert [(s.name, s.compression) for s in expand(str(tmp_path))] == [
        ("a.tar", ""),
        ("a.tar.gz", "gz"),
        ("a.tar.zst", "zst"),
        ("a.tgz", "gz"),
    ]


def test_a_brace_list_longer_than_a_file_name_may_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"shard-with-a-long-name-0.tar does not exist"):
        expand("{" + ",".join(f"shard-with-a-long-name-{number}.tar" for number in range(30)) + "}")


def test_list_file_is_relative_to_its_folder(folder: Path) -> None:
    (folder / "list.txt").write_text("# comment\n\ndata-001.tar\ndata-{000..000}.tar\n")
    assert names(f"@{folder}/list.txt") == ["data-001.tar", "data-000.tar"]


def test_braces_in_an_existing_name_are_literal(tmp_path: Path) -> None:
    shard(tmp_path / "x{1..2}.tar", [])
    assert names(tmp_path / "x{1..2}.tar") == ["x{1..2}.tar"]


def test_same_base_name_in_two_folders(tmp_path: Path) -> None:
    for name in ("x/0.tar", "y/z/0.tar", "x/1.tar"):
        shard(tmp_path / name, [])
    assert names(f"{tmp_path}/x::{tmp_path}/y/z") == ["x/0.tar", "1.tar", "y/z/0.tar"]


def test_distinct_names(folder: Path, tmp_path: Path) -> None:
    other = expand(str(corpus(tmp_path / "other", samples=8, shards=4)))
    renamed = [s.name for s in distinct_names(other, expand(str(folder)))]
    assert renamed == [*(f"trusted/data-00{i}.tar" for i in range(3)), "data-003.tar"]


def test_distinct_names_of_oddly_named_shards() -> None:
    def sources(*names: str) -> list[Source]:
        return [Source(name, f"/{number}/{name}", "") for number, name in enumerate(names)]

    corpus = sources("x.tar", "trusted/x.tar", "y.tar")
    trusted = sources("x.tar", "y.tar", "trusted/y.tar", "trusted/x.tar", "z.tar")
    renamed = [s.name for s in distinct_names(trusted, corpus)]
    assert renamed == [
        "trusted/trusted/x.tar",
        "trusted/trusted/y.tar",
        "trusted/y.tar",
        "trusted/trusted/trusted/x.tar",
        "z.tar",
    ]
    assert len({*renamed, *(s.name for s in corpus)}) == 8


class NoCredentialsError(Exception):
    """As botocore's: a class of its own, and one that a worker could not send to the main process."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


@pytest.fixture
def failing() -> set[str]:
    """The names of the calls at which the storage behind failing:// fails."""
    import fsspec
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    calls: set[str] = set()

    def fail_at(call: str) -> None:
        if call in calls:
            raise NoCredentialsError(reason="Unable to locate credentials")

    class File(MemoryFile):  # type: ignore[misc]
        def read(self, size: int = -1) -> bytes:
            fail_at("read")
            return bytes(super().read(size))

        def close(self) -> None:
            super().close()
            fail_at("close")

    class FileSystem(MemoryFileSystem):  # type: ignore[misc]
        protocol = "failing"

        def exists(self, path: str, **_: Any) -> bool:
            fail_at("exists")
            return True

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            fail_at("info")
            changed = "yesterday" if "text" in calls else 7
            return {"name": path, "size": 5, "mtime": changed, "type": "file"}

        def _open(self, path: str, *_: Any, **__: Any) -> File:
            fail_at("open")
            return File(self, path, PLAIN)

    fsspec.register_implementation("failing", FileSystem, clobber=True)
    return calls


def test_whatever_storage_raises_names_the_shard(failing: set[str], scratch: Path) -> None:
    url = "failing://bucket/a.tar"
    (source,) = expand(url)
    assert fingerprint(source) == (5, 7_000_000_000)
    assert read(source, scratch)[0] == PLAIN
    uses: dict[str, Callable[[], object]] = {
        "exists": lambda: expand(url),
        "info": lambda: fingerprint(source),
        "open": lambda: read(source, scratch),
        "read": lambda: read(source, scratch),
        "close": lambda: read(source, scratch),
    }
    for call, use in uses.items():
        failing.clear()
        failing.add(call)
        with pytest.raises(InputError, match=r"a\.tar: cannot be .*NoCredentialsError: Unable to locate"):
            use()
    failing.clear()
    failing.add("text")
    with pytest.raises(InputError, match=r"a\.tar: cannot be read .*yesterday"):
        fingerprint(source)


def test_a_full_disk_is_not_blamed_on_the_shard(tmp_path: Path, scratch: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = store(tmp_path / "a.tar.gz", gzip.compress(PLAIN))
    with pytest.raises(OSError, match="No space"):
        sources._unpack(source, Full(), Stored())


def test_memory_urls(folder: Path, scratch: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar.gz"):
        memory.pipe(f"/sanitize-test/{name}", gzip.compress(PLAIN) if name.endswith("gz") else PLAIN)
    assert names("memory://sanitize-test/*.tar") == ["a.tar"]
    found = expand("memory://sanitize-test/{a.tar,b.tar.gz}")
    assert [s.name for s in found] == ["a.tar", "b.tar.gz"]
    for source in found:
        assert read(source, scratch)[0] == PLAIN
        assert fingerprint(source)[0] == memory.size(source.url)
    with pytest.raises(InputError, match="does not exist"):
        expand("memory://sanitize-test/none.tar")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}/empty", "holds no shard"),
        ("{0}/none.tar", "does not exist"),
        ("{0}/*.tar.zst", "no file matches"),
        ("{0}/notes.txt", "must end in"),
        ("{0}/data-{{000..001.tar", "brace|exist"),
        ("{0}/data-000.tar::{0}", "named twice"),
        ("{0}/data-000.tar::", "empty shard name"),
        ("@{0}/none.txt", "cannot read this list"),
        ("@{0}/notes.txt", "list inside a list"),
        ("x{{0..200000}}.tar", "more than 100,000"),
        ("nothing://x/y.tar", "cannot be listed"),
    ],
)
def test_errors_name_the_matter(folder: Path, spec: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("@other.txt")
    with pytest.raises(InputError, match=message):
        expand(spec.format(folder))


def test_folder_of_folders_says_how(folder: Path) -> None:
    with pytest.raises(InputError, match=r"subfolders do"):
        expand(str(folder.parent))


def test_link_to_a_named_shard_is_the_same_shard(folder: Path) -> None:
    (folder / "link.tar").symlink_to(folder / "data-000.tar")
    with pytest.raises(InputError, match=r"link\.tar is named twice \(once as .*/data-000\.tar\)"):
        expand(str(folder))


def test_linked_shards_keep_their_names(tmp_path: Path, scratch: Path) -> None:
    """As in the cache of the Hugging Face hub, where a name is a link to a file named by its hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, packed in {"data-000.tar": PLAIN, "data-001.tar.gz": gzip.compress(PLAIN)}.items():
        blob = tmp_path / "blobs" / hashlib.sha256(packed).hexdigest()
        blob.write_bytes(packed)
        (tmp_path / "snapshot" / name).symlink_to(Path("../blobs") / blob.name)
    found = expand(f"{tmp_path}/snapshot")
    assert [(s.name, s.compression) for s in found] == [("data-000.tar", ""), ("data-001.tar.gz", "gz")]
    assert [s.url for s in found] == [f"{tmp_path}/snapshot/{s.name}" for s in found]
    assert [read(s, scratch)[0] for s in found] == [PLAIN, PLAIN]
    assert [fingerprint(s)[0] for s in found] == [len(PLAIN), len(gzip.compress(PLAIN))]


def test_parent_of_a_link_is_where_the_link_leads(tmp_path: Path, folder: Path) -> None:
    shard(tmp_path / "elsewhere" / "data-000.tar", [])
    (tmp_path / "elsewhere" / "link").symlink_to(folder)
    (source,) = expand(f"{tmp_path}/elsewhere/link/../corpus/data-000.tar")
    assert source.url == str(folder / "data-000.tar")


def test_spellings_of_one_folder_expand_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    expected = expand(str(folder))
    assert [source.url for source in expected] == [f"{folder}/{name}" for name in names(folder)]
    for spec in ("corpus", "corpus/", "./corpus//", f"{folder}/", f"file://{folder}/", "corpus/../corpus"):
        assert expand(spec) == expected


def test_pipe_needs_permission(folder: Path, scratch: Path) -> None:
    spec = f"pipe:cat {folder}/data-000.tar"
    with pytest.raises(UsageError, match="--allow-pipe"):
        expand(spec)
    (source,) = expand(spec, allow_pipe=True)
    assert read(source, scratch)[0] == (folder / "data-000.tar").read_bytes()
    assert fingerprint(source) == (0, 0)
    (failing,) = expand("pipe:exit 3", allow_pipe=True)
    with pytest.raises(InputError, match="status 3"):
        read(failing, scratch)


def store(path: Path, packed: bytes) -> Source:
    path.write_bytes(packed)
    return expand(str(path))[0]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.tar", PLAIN),
        ("a.tar.gz", gzip.compress(PLAIN)),
        ("a.tar.gz", gzip.compress(PLAIN[:2000]) + gzip.compress(PLAIN[2000:])),
        ("a.tar.gz", gzip.compress(PLAIN) + bytes(100)),
        ("a.tar.zst", zstandard.compress(PLAIN)),
        ("a.tar.zst", zstandard.compress(PLAIN[:2000]) + zstandard.compress(PLAIN[2000:])),
    ],
)
def test_bytes_and_digest(tmp_path: Path, scratch: Path, name: str, packed: bytes) -> None:
    source = store(tmp_path / name, packed)
    data, stored = read(source, scratch)
    assert data == PLAIN
    assert stored == Stored(len(packed), hashlib.sha256(packed).hexdigest(), [])
    assert fingerprint(source) == (len(packed), os.stat(source.url).st_mtime_ns)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "garbage", "none at all"])
def test_damaged_streams_keep_what_is_readable(tmp_path: Path, scratch: Path, name: str, damage: str) -> None:
    noise = os.urandom(400_000)
    checked = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(noise) if name.endswith("gz") else checked.compress(noise)
    middle = len(packed) // 2
    packed = {
        "cut": packed[:middle],
        "flip": packed[:-20] + b"\xff" * 20,
        "garbage": packed + b"garbage" * 9,
        "none at all": b"",
    }[damage]
    data, stored = read(store(tmp_path / name, packed), scratch)
    assert noise.startswith(data[:390_000])
    assert len(data) >= {"cut": 100_000, "flip": 200_000, "garbage": 400_000, "none at all": 0}[damage]
    assert len(stored.problems) == 1
    assert "damaged" in stored.problems[0]
    assert stored.raw_bytes == len(packed)
    assert stored.sha256 == hashlib.sha256(packed).hexdigest()


def test_empty_plain_shard(tmp_path: Path, scratch: Path) -> None:
    assert read(store(tmp_path / "a.tar", b""), scratch)[0] == b""


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.zst"])
def test_bomb(tmp_path: Path, scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FREE_BYTES", 1 << 20)
    zeros = bytes(30 << 20)
    packed = gzip.compress(zeros) if name.endswith("gz") else zstandard.compress(zeros)
    with pytest.raises(InputError, match="bomb"):
        read(store(tmp_path / name, packed), scratch)


def test_compressed_under_a_wrong_name(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(InputError, match=r"rename it"):
        read(store(tmp_path / "a.tar", gzip.compress(PLAIN)), scratch)


def test_vanished_shard(tmp_path: Path, scratch: Path) -> None:
    source = store(tmp_path / "a.tar", END_MARK)
    (tmp_path / "a.tar").unlink()
    for use in (fingerprint, lambda s: read(s, scratch)):
        with pytest.raises(InputError, match=r"a\.tar"):
            use(source)


def test_each_shard_keeps_order_in_any_number_of_processes() -> None:
    jobs = [3, 1, 2]
    assert list(each_shard(str, jobs, 1)) == list(each_shard(str, jobs, 2)) == ["3", "1", "2"]
    assert list(each_shard(str, [], 2)) == []


def die(job: int) -> int:
    os.kill(os.getpid(), 9)
    return job


def test_a_killed_worker_is_a_message() -> None:
    with pytest.raises(SanitizeError, match="memory ran out"):
        list(each_shard(die, [1, 2], workers=2))
