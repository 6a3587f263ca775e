import errno
import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import zstandard
from builders import END_MARK, corpus, corrupt, global_header, member, sample, tar

from sanitize.corpus import writer
from sanitize.corpus.index import build_index
from sanitize.corpus.sources import Source, expand
from sanitize.corpus.writer import Content, Verified, verify_shard, write_shards
from sanitize.errors import SanitizeError
from sanitize.progress import Silent


class Case:
    """Indexed shards, ready to be written."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.out, self.scratch = folder / "out", folder / "scratch"
        self.scratch.mkdir()
        (folder / "corpus").mkdir()
        for name, data in files.items():
            (folder / "corpus" / name).write_bytes(data)
        self.sources = expand(str(folder / "corpus"))
        trusted = expand(str(corpus(folder / "trusted", samples=50, shards=1, first=500)))
        index = build_index(
            self.sources, trusted, label="cls", scratch=self.scratch, workers=1, progress=Silent()
        )
        self.table = index.table
        self.digests = {record["name"]: record["sha256"] for record in index.shards}
        rows = self.table.filter(pa.compute.invert(self.table["trusted"]))
        self.keys: list[str] = rows["key"].to_pylist()
        self.bad = np.array([status != "ok" for status in rows["status"].to_pylist()])

    def write(self, flagged_keys: set[str] = frozenset(), workers: int = 1) -> list[dict[str, Any]]:  # type: ignore[assignment]
        flagged = self.bad | np.array([key in flagged_keys for key in self.keys])
        return write_shards(
            self.sources,
            self.table,
            flagged,
            self.out,
            scratch=self.scratch,
            workers=workers,
            progress=Silent(),
            digests=self.digests,
        )

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.out).as_posix(): path.read_bytes()
            for path in sorted(self.out.rglob("*"))
            if path.is_file()
        }


S = [sample(f"k{i}", str(i % 2), seed=i) for i in range(8)]


def test_kept_and_quarantine_are_exact_bytes(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:4], end=bytes(10240)), "b.tar": tar(*S[4:])})
    records = case.write({"k1", "k2", "k7"}, workers=2)
    assert case.files() == {
        "kept/a.tar": tar(S[0], S[3]),
        "kept/b.tar": tar(*S[4:7]),
        "quarantine/a.tar": tar(S[1], S[2]),
        "quarantine/b.tar": tar(S[7]),
    }
    assert records[0] == {
        "name": "a.tar",
        "kept": 2,
        "quarantined": 2,
        "kept_bytes": len(tar(S[0], S[3])),
        "quarantine_bytes": len(tar(S[1], S[2])),
        "kept_sha256": hashlib.sha256(tar(S[0], S[3])).hexdigest(),
        "empty": False,
    }
    assert list(case.scratch.iterdir()) == []


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extension_headers_folders_and_global_headers_survive(tmp_path: Path, layout: int) -> None:
    def long(name: str) -> bytes:
        return b"".join(
            member(f"{name}.{x}", data, format=layout) for x, data in (("jpg", b"image"), ("cls", b"1"))
        )

    first, second = long("é" * 150), long("d/" + "n" * 290)
    note, folder = global_header({"comment": "x"}), member("d", kind=tarfile.DIRTYPE)
    case = Case(tmp_path, {"a.tar": tar(note, first, folder, second, S[0])})
    case.write({"é" * 150})
    assert case.files() == {
        "kept/a.tar": tar(note, folder, second, S[0]),
        "quarantine/a.tar": tar(note, first),
    }


def test_nothing_flagged_gives_the_same_shard_back(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S)})
    case.write()
    assert case.files() == {"kept/a.tar": tar(*S)}


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_shards_stay_compressed(tmp_path: Path, ending: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[ending]
    unpack: Any = {
        "gz": gzip.decompress,
        "zst": lambda data: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(),
    }[ending]
    case = Case(tmp_path, {f"a.tar.{ending}": pack(tar(*S))})
    case.write({"k0"})
    first = case.files()
    assert unpack(first[f"kept/a.tar.{ending}"]) == tar(*S[1:])
    assert unpack(first[f"quarantine/a.tar.{ending}"]) == tar(S[0])
    case.write({"k0"})
    assert case.files() == first


def test_webdataset_reads_what_was_kept(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:4]), "b.tar.gz": gzip.compress(tar(*S[4:]))})
    case.write({"k1", "k6"})
    urls = [str(path) for path in sorted((case.out / "kept").iterdir())]
    found = [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert found == ["k0", "k2", "k3", "k4", "k5", "k7"]


def test_hostile_shard_is_partitioned_without_losing_a_byte(tmp_path: Path) -> None:
    broken = corrupt(member("b.jpg", b"b" * 700))
    duplicate = member("d.jpg", b"1") + member("d.JPG", b"2") + member("d.cls", b"0")
    link = member("l.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
    stray = member("README", b"hello")
    after = sample("z", "0")
    data = tar(S[0], broken, S[1], duplicate, link, S[2], stray, S[0]) + after + b"garbage" * 300
    case = Case(tmp_path, {"a.tar": data})
    (record,) = case.write({"k2"})
    assert (record["kept"], record["quarantined"]) == (2, len(case.keys) - 2)
    files = case.files()
    assert files["kept/a.tar"] == tar(S[0], S[1])
    garbage = (b"garbage" * 300).ljust(2560, b"\0")
    garbage_at = data.index(b"garbage")
    assert files["quarantine/a.tar"] == tar(
        wrapped("a", len(S[0]), broken),
        duplicate,
        link,
        S[2],
        stray,
        S[0],
        after,
        wrapped("a", garbage_at, b"garbage" * 300),
    )
    with tarfile.open(fileobj=io.BytesIO(files["quarantine/a.tar"])) as quarantine:
        names = quarantine.getnames()
        assert names[0] == f"__unreadable__/a-{len(S[0])}.bin"
        hidden = quarantine.extractfile(names[-1])
        assert hidden is not None
        assert hidden.read() == garbage[:2100]


def wrapped(stem: str, offset: int, data: bytes) -> bytes:
    return member(f"__unreadable__/{stem}-{offset}.bin", data, format=tarfile.PAX_FORMAT)


def test_cut_sample_is_wrapped(tmp_path: Path) -> None:
    data = tar(S[0], S[1])[: len(S[0]) + 600]
    case = Case(tmp_path, {"a.tar": data, "b.tar": tar(S[3])})
    case.write()
    assert case.files()["kept/a.tar"] == tar(S[0])
    assert case.files()["quarantine/a.tar"] == tar(wrapped("a", len(S[0]), data[len(S[0]) :]))


def test_repeated_keys_do_not_merge(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(S[0], S[1], S[0], S[2])})
    case.write({"k1"})
    assert case.files() == {"kept/a.tar": tar(S[0], S[2]), "quarantine/a.tar": tar(S[1], S[0])}


def test_extensions_with_underscores_are_members_like_others(tmp_path: Path) -> None:
    odd = S[0] + member("k0.__", b"1") + member("k0.__meta__", b"2")
    case = Case(tmp_path, {"a.tar": tar(odd, S[1], S[2])})
    case.write({"k2"})
    assert case.files()["kept/a.tar"] == tar(odd, S[1])


def test_keys_that_are_not_utf8(tmp_path: Path) -> None:
    strange = sample("\udcff", "0")
    case = Case(tmp_path, {"a.tar": tar(strange, S[1], S[2])})
    case.write({"k2"})
    assert case.files()["kept/a.tar"] == tar(strange, S[1])


def test_empty_shards_are_dropped_and_stale_files_removed(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:2]), "b.tar": tar(*S[2:]), "c.tar": b""})
    case.write({"k2"})
    assert sorted(case.files()) == ["kept/a.tar", "kept/b.tar", "quarantine/b.tar"]
    for name in ("kept/old.tar", "quarantine/old.tar.gz", "kept/a.tar.tmp"):
        (case.out / name).write_bytes(b"old")
    records = case.write({"k0", "k1"})
    assert sorted(case.files()) == ["kept/b.tar", "quarantine/a.tar"]
    assert [record["empty"] for record in records] == [True, False, True]
    assert records[0]["kept_sha256"] is None


def test_unusable_rows_must_be_flagged(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S, member("x.cls", b"0"))})
    case.bad[:] = False
    with pytest.raises(ValueError, match="1 unusable rows"):
        case.write()
    case.bad = case.bad[:-1]
    case.keys.pop()
    with pytest.raises(ValueError, match="shape"):
        case.write()
    assert not case.out.exists()


def test_shard_changed_since_the_index(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S)})
    path = Path(case.sources[0].url)
    path.write_bytes(tar(*S[:3]))
    with pytest.raises(SanitizeError, match=r"a\.tar changed since"):
        case.write()
    path.write_bytes(tar(*reversed(S)))
    with pytest.raises(SanitizeError, match=r"a\.tar: the samples written are not those"):
        case.write()
    assert case.files() == {}


def test_unpacked_shard_must_have_the_bytes_that_were_indexed(tmp_path: Path) -> None:
    altered = bytearray(tar(*S))
    altered[600] ^= 1  # same keys, same places: only the digest can tell
    for number, (name, pack) in enumerate(
        {"a.tar.gz": gzip.compress, "a.tar.zst": zstandard.compress}.items()
    ):
        (tmp_path / str(number)).mkdir()
        case = Case(tmp_path / str(number), {name: pack(tar(*S))})
        case.write({"k1"})
        before = case.files()
        Path(case.sources[0].url).write_bytes(pack(bytes(altered)))
        with pytest.raises(SanitizeError, match=rf"{name} changed since it was indexed; start a new --out"):
            case.write({"k1"})
        assert case.files() == before


def test_piped_shard_must_have_the_bytes_that_were_indexed(tmp_path: Path) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S)})
    path = Path(case.sources[0].url)
    case.sources = [Source("a.tar", f"pipe:cat {path}", "")]
    case.write({"k1"})
    assert case.files() == {"kept/a.tar": tar(S[0], *S[2:]), "quarantine/a.tar": tar(S[1])}
    altered = bytearray(tar(*S))
    altered[600] ^= 1
    path.write_bytes(altered)
    with pytest.raises(SanitizeError, match=r"a\.tar changed since it was indexed"):
        case.write({"k1"})
    case.digests = {}
    with pytest.raises(KeyError):
        case.write({"k1"})


def test_counts_are_those_of_the_files_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in quarantine/ the three k0 and the stray file between them lie side by side, as one group
    data = tar(S[0], S[1], member("README", b"x"), S[0], S[2], S[0])[:-1024] + corrupt(S[3])
    case = Case(tmp_path, {"a.tar": data})
    (record,) = case.write({"k0"})
    assert (record["kept"], record["quarantined"]) == (2, len(case.keys) - 2)
    real = writer._found_rows
    monkeypatch.setattr(writer, "_found_rows", lambda entries, starts: real(entries, starts) - 1)
    with pytest.raises(SanitizeError, match="not those decided on"):
        case.write({"k0"})
    monkeypatch.setattr(writer, "_found_rows", real)
    monkeypatch.setattr(writer, "_compare_with_webdataset", lambda *_: 1)
    with pytest.raises(SanitizeError, match="not those decided on"):
        case.write({"k0"})


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_leaves_the_old_decision_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:3]), "b.tar": tar(*S[3:6]), "c.tar": tar(*S[6:])})
    case.write({"k1", "k7"})
    before = case.files()
    assert len(before) == 5
    real = writer._write_plain

    def full_at_the_last_shard(file: Any, pieces: Any) -> None:
        if S[7][:512] in b"".join(pieces):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, pieces)

    monkeypatch.setattr(writer, "_write_plain", full_at_the_last_shard)
    with pytest.raises(OSError, match="No space"):
        case.write({"k0", "k1", "k2", "k3"}, workers)
    assert case.files() == before


def test_no_file_takes_its_place_before_all_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:4]), "b.tar": tar(*S[4:])})
    done: list[str] = []
    real_verify, real_replace = writer.verify_shard, os.replace

    def verify(*arguments: Any) -> Verified:
        done.append("verify")
        return real_verify(*arguments)

    def replace(old: Path, new: Path) -> None:
        done.append("replace")
        real_replace(old, new)

    monkeypatch.setattr(writer, "verify_shard", verify)
    monkeypatch.setattr(os, "replace", replace)
    case.write({"k1", "k5"})
    assert done == ["verify"] * 4 + ["replace"] * 4


def test_half_placed_files_are_completed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S[:4]), "b.tar": tar(*S[4:])})
    case.write({"k0", "k4"})
    expected = {"k1", "k2", "k3", "k0"}
    with monkeypatch.context() as patch:
        real = os.replace
        calls = iter([real])

        def replace(old: Path, new: Path) -> None:
            next(calls, stop)(old, new)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            case.write(expected)
    assert not list(case.out.rglob("*.tmp"))
    case.write(expected)
    assert case.files() == {"quarantine/a.tar": tar(*S[:4]), "kept/b.tar": tar(*S[4:])}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_names_as_long_as_a_file_name_may_be(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending.endswith("gz") else bytes
    long = ["é" * 124 + "x" * (255 - 248 - len(ending)) + ending, "y" * (252 - len(ending)) + ending]
    assert [len(os.fsencode(name)) for name in long] == [255, 252]
    case = Case(tmp_path, {long[0]: pack(tar(*S[:4])), long[1]: pack(tar(*S[4:])[:-1500])})
    case.write({"k0", "k4"})
    assert sorted(case.files()) == sorted(
        f"{folder}/{name}" for folder in ("kept", "quarantine") for name in long
    )


def test_a_shard_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S)})
    case.write({"k1"})
    before = case.files()
    real = writer.verify_shard

    def refuse_quarantine(source: Source, content: Any, keys: list[str] | None, scratch: Path) -> Verified:
        if keys is None:
            raise SanitizeError("as if the disk had failed")
        return real(source, content, keys, scratch)

    monkeypatch.setattr(writer, "verify_shard", refuse_quarantine)
    with pytest.raises(SanitizeError, match="as if"):
        case.write({"k2"})
    assert case.files() == before


def test_short_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, {"a.tar": tar(*S)})
    real_writev, real_write = os.writev, os.write
    monkeypatch.setattr(os, "writev", lambda file, pieces: real_writev(file, [pieces[0][:100]]))
    monkeypatch.setattr(os, "write", lambda file, piece: real_write(file, piece[:777]))
    case.write({"k1", "k3"})
    assert case.files()["kept/a.tar"] == tar(S[0], S[2], *S[4:])


def written(path: Path, data: bytes) -> Source:
    path.write_bytes(data)
    return Source(path.name, str(path), "")


def test_verify_finds_every_kind_of_difference(tmp_path: Path) -> None:
    good = tar(S[0], S[1])

    def verify(data: bytes, meant: bytes, keys: list[str] | None, starts: tuple[int, ...] = ()) -> Verified:
        starts = starts or (0, len(S[0]))
        return verify_shard(written(tmp_path / "a.tar", data), Content([meant], starts), keys, tmp_path)

    expected = Verified(len(good), hashlib.sha256(good).hexdigest(), 2)
    assert verify(good, good, ["k0", "k1"]) == verify(good, good, None) == expected
    flipped = bytearray(good)
    flipped[600] ^= 1
    for data in (bytes(flipped), good[:-512], good + bytes(512)):
        with pytest.raises(SanitizeError, match="differs from the source"):
            verify(data, good, ["k0", "k1"])
    for keys in (["k0"], ["k1", "k0"], ["k0", "k1", "k2"]):
        with pytest.raises(SanitizeError, match="not those decided on"):
            verify(good, good, keys)
    for starts in ((0, len(S[0]) + 1), (0, len(S[0]), len(S[0] + S[1])), (0, 1024 + len(S[0]))):
        with pytest.raises(SanitizeError, match="not those decided on"):
            verify(good, good, None, starts)
    for unclean in (S[0], tar(S[0])[:-1100], corrupt(good)):
        with pytest.raises(SanitizeError, match="no clean tar"):
            verify(unclean, unclean, None)


def test_verify_asks_webdataset_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = tar(member("a.jpg", b"1") + member("a.JPG", b"2"))
    source = written(tmp_path / "a.tar", twice)
    with pytest.raises(SanitizeError, match="webdataset does not read"):
        verify_shard(source, Content([twice], [0]), ["a"], tmp_path)
    good = written(tmp_path / "b.tar", tar(S[0]))
    monkeypatch.setattr("webdataset.tariterators.base_plus_ext", lambda name: ("other", "jpg"))
    monkeypatch.setattr(
        "webdataset.tariterators.group_by_keys.__defaults__", (lambda n: ("o", n[-3:]), True, None, None)
    )
    with pytest.raises(SanitizeError, match="differently than it was written"):
        verify_shard(good, Content([tar(S[0])], [0]), ["k0"], tmp_path)


def test_end_mark_is_two_zero_blocks() -> None:
    assert writer.END_MARK == END_MARK == bytes(1024)


def test_a_job_carries_only_its_own_rows(tmp_path: Path) -> None:
    import pickle

    case = Case(tmp_path, {f"{i}.tar": tar(*S) for i in range(4)})
    wide = pa.table({name: case.table[name] for name in case.table.column_names})
    wide = wide.set_column(2, "key", pa.array(["k" * 10_000] * wide.num_rows))
    corpus_rows = wide.filter(pa.compute.invert(wide["trusted"]))
    flagged = np.zeros(corpus_rows.num_rows, bool)
    jobs = writer._jobs(case.sources, corpus_rows, flagged, case.out, case.scratch, None)
    assert [job.rows.num_rows for job in jobs] == [8] * 4
    assert len(pickle.dumps(jobs[0])) < 100_000
