import io
import itertools
import re
import tarfile
from typing import Any

import pytest
from builders import corrupt, global_header, member, sample, tar, with_header
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from sanitize.corpus.shards import RESERVED_EXTENSIONS, account, group, is_pickle, is_unsafe, split_name, walk


def rows(data: bytes) -> list[tuple[str, str]]:
    """Key and status of every row; checks on the way that no byte is lost or counted twice."""
    entries = walk(data)
    assert [e.start for e in entries] == [0, *(e.end for e in entries)][: len(entries)]
    assert not entries or entries[-1].end == len(data)
    samples, loose = group(entries)
    account(data, entries, samples, loose)  # raises unless the bytes add up
    spans = [(s.start, s.end) for s in samples]
    assert spans == sorted(spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    return [(s.key, s.status) for s in samples]


def problems(data: bytes) -> str:
    entries = walk(data)
    return " ".join(account(data, entries, *group(entries)).problems)


def by_webdataset(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    def files() -> Any:
        for item in tar_file_iterator(io.BytesIO(data)):
            item["__url__"] = "x"
            yield item

    return [
        (s["__key__"], {k: v for k, v in s.items() if k not in RESERVED_EXTENSIONS})
        for s in group_by_keys(files())
    ]


def by_us(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    samples, _ = group(walk(data))
    return [
        (s.key, {x: data[e.data : e.data + e.size] for x, e in s.members.items()})
        for s in samples
        if s.members and s.status != "after-end"
    ]


A, B, C = sample("a"), sample("b", "1"), sample("c")


def test_good_shard() -> None:
    data = tar(A, B)
    assert rows(data) == [("a", "ok"), ("b", "ok")]
    entries = walk(data)
    accounting = account(data, entries, *group(entries))
    assert accounting.bytes_samples == len(A) + len(B)
    assert accounting.bytes_end == 1024
    assert accounting.problems == []


def test_empty_file_and_only_zeros() -> None:
    assert rows(b"") == []
    assert problems(b"") == "an empty file"
    assert rows(bytes(10240)) == []
    assert problems(bytes(10240)) == ""


def test_zero_padding_after_the_end_is_fine() -> None:
    data = tar(A, end=bytes(10240 + 512))
    assert rows(data) == [("a", "ok")]
    assert problems(data) == ""


def test_missing_end_mark_is_a_problem_only() -> None:
    assert rows(A) == [("a", "ok")]
    assert "no end mark" in problems(A)


def test_corrupt_header_is_a_row_and_the_walk_goes_on() -> None:
    data = tar(A, corrupt(B), C)
    image_bytes_of_b = len(B) - 1024
    assert rows(data) == [("a", "ok"), ("", "corrupt-header"), ("b", "no-image"), ("c", "ok")]
    samples, _ = group(walk(data))
    assert samples[1][1:3] == (len(A), len(A) + image_bytes_of_b)
    assert "unreadable" in problems(data)


def test_corrupt_header_at_both_ends() -> None:
    assert rows(tar(corrupt(A), B))[0] == ("", "corrupt-header")
    data = tar(A, corrupt(member("z.jpg", b"z" * 700)))
    assert rows(data) == [("a", "ok"), ("", "corrupt-header")]
    entries = walk(data)
    assert account(data, entries, *group(entries)).bytes_end == 1024


def test_no_tar_at_all() -> None:
    assert rows(b"\xff\xd8 not a tar" * 200)[0][1] in ("corrupt-header", "cut")


@pytest.mark.parametrize("cut", [1, 300, 512, 600, 1025, 1537])
def test_cut_file(cut: int) -> None:
    data = (A + B)[:-cut]
    found = rows(data)
    assert found[0] == ("a", "ok")
    if cut == 512:  # exactly the content of b.cls is gone
        assert found[1:] == [("b", "cut")]
    assert found[-1][1] in ("cut", "no-label", "ok")
    assert any(status == "cut" for _, status in found) or cut == 1024
    assert "cut" in problems(data)


def test_cut_inside_extension_header() -> None:
    long_name = member("n" * 300 + ".jpg", b"x", format=tarfile.PAX_FORMAT)
    assert rows(A + long_name[:700]) == [("a", "ok"), ("", "cut")]


def test_concatenated_tars_are_after_the_end() -> None:
    data = tar(A) + tar(B, C)
    assert rows(data) == [("a", "ok"), ("b", "after-end"), ("c", "after-end")]
    assert [key for key, _ in by_webdataset(data)] == ["a"]
    assert "after the end mark" in problems(data)


def test_single_zero_block_ends_the_shard_as_for_webdataset() -> None:
    data = tar(A, bytes(512), B)
    assert [key for key, _ in by_webdataset(data)] == ["a"]
    assert rows(data) == [("a", "ok"), ("b", "after-end")]


def test_garbage_after_the_end_is_one_row() -> None:
    data = tar(A) + b"secret" * 500
    assert rows(data) == [("a", "ok"), ("", "after-end")]
    assert rows(tar(A) + b"x" * 1024 + bytes(1024) + B) == [
        ("a", "ok"),
        ("", "after-end"),
        ("b", "after-end"),
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(kind: bytes) -> None:
    link = member("b.jpg", kind=kind, link="/etc/passwd")
    assert rows(tar(A, link, member("b.cls", b"1"), C)) == [("a", "ok"), ("b", "not-a-file"), ("c", "ok")]


def test_hard_link_with_a_size_has_no_content() -> None:
    link = with_header("b.jpg", typeflag=b"1", size=b"00000001000\0")
    assert rows(tar(link, C)) == [("b", "not-a-file"), ("c", "ok")]


def test_sparse_members() -> None:
    old = with_header("b.jpg", b"x" * 600, typeflag=b"S")
    pax = member("c.jpg", b"x", format=tarfile.PAX_FORMAT, pax={"GNU.sparse.major": "1"})
    assert rows(tar(old, pax, A)) == [("b", "not-a-file"), ("c", "not-a-file"), ("a", "ok")]


def test_unknown_type_with_content() -> None:
    assert rows(tar(with_header("b.jpg", b"x" * 600, typeflag=b"Q"), A)) == [("b", "not-a-file"), ("a", "ok")]


@pytest.mark.parametrize("name", ["/etc/a", "../a", "x/../a", "..\\a", "C:/a", "\\a"])
def test_unsafe_names(name: str) -> None:
    found = rows(tar(sample(name), C))
    assert found[0][1] == "unsafe-name"
    assert found[-1] == ("c", "ok")


@pytest.mark.parametrize("name", ["a..b/x.jpg", "./a.jpg", "a/b.jpg", "...jpg", "a:b.jpg"])
def test_safe_names(name: str) -> None:
    assert not is_unsafe(name)


def test_directories_belong_to_no_sample() -> None:
    folder = member("d", kind=tarfile.DIRTYPE)
    data = tar(folder, sample("d/a"), sample("d/b"))
    assert rows(data) == [("d/a", "ok"), ("d/b", "ok")]
    entries = walk(data)
    assert account(data, entries, *group(entries)).bytes_directories == 512


def test_directory_inside_a_sample_is_part_of_it() -> None:
    data = tar(member("a.jpg", b"x"), member("d", kind=tarfile.DIRTYPE), member("a.cls", b"1"))
    assert rows(data) == [("a", "ok")]
    assert by_us(data) == by_webdataset(data)


@pytest.mark.parametrize("kind", ["pax", "gnu"])
@pytest.mark.parametrize("name", ["n" * 300, "d" * 150 + "/" + "e" * 150, "größe-日本語", "é" * 200])
def test_long_and_non_ascii_names(kind: str, name: str) -> None:
    layout = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
    pieces = [member(f"{name}.jpg", b"x", format=layout), member(f"{name}.cls", b"1", format=layout)]
    data = tar(*pieces, A)
    assert rows(data) == [(name, "ok"), ("a", "ok")]
    assert by_us(data) == by_webdataset(data)
    assert group(walk(data))[0][0].end == len(pieces[0]) + len(pieces[1])


def test_ustar_prefix_and_raw_bytes_in_names() -> None:
    name = "d" * 120 + "/" + "e" * 90
    data = tar(member(f"{name}.jpg", b"x"), member("\udcff.jpg", b"x"))
    assert [key for key, _ in rows(data)] == [name, "\udcff"]


def test_pax_size_wins() -> None:
    big = member("b.jpg", b"x" * 600, format=tarfile.PAX_FORMAT, pax={"size": "600", "comment": "é"})
    assert rows(tar(big, A)) == [("b", "ok"), ("a", "ok")]


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,  # negative
        b"\x80" + b"\xff" * 11,  # 2^88
        b"77777777777\0",
        b"-0000000001\0",
        b"garbage....\0",
    ],
)
def test_insane_sizes_cost_one_row_and_no_more(size: bytes) -> None:
    found = rows(tar(A, with_header("b.jpg", b"x" * 100, size=size), C))
    assert found == [("a", "ok"), ("", "corrupt-header"), ("c", "ok")]


def test_hostile_extension_headers() -> None:
    endless = member("x", b"0 path=a\n" * 3, kind=b"x")
    assert rows(tar(endless, A)) == [("", "corrupt-header"), ("a", "ok")]
    for record in (b"30 size=-1\n", b"11 size=-1\n", b"12 size=1e9\n", b"no record"):
        found = rows(tar(member("x", record, kind=b"x"), A))
        assert [status for _, status in found] == ["corrupt-header", "ok"]
    chain = member("x", b"13 comment=x\n", kind=b"x") * 2000  # tarfile would recurse 2,000 deep
    found = rows(tar(chain, A))
    assert found[0] == ("", "corrupt-header")
    assert found[-1] == ("a", "ok")
    huge = member("x", bytes(2 << 20), kind=b"x")
    assert rows(tar(huge, A)) == [("", "corrupt-header"), ("a", "ok")]


def test_global_headers() -> None:
    assert rows(tar(global_header({"comment": "x"}), A)) == [("a", "ok")]
    assert rows(tar(global_header({"path": "evil"}), A)) == [("", "corrupt-header"), ("a", "ok")]


def test_meta_members_and_members_without_extension_are_rows() -> None:
    data = tar(member("__shard__", b"x"), member("__m__/x.jpg", b"x"), member("README", b"x"), A)
    assert rows(data) == [
        ("__shard__", "no-image"),
        ("__m__/x.jpg", "no-image"),
        ("README", "no-image"),
        ("a", "ok"),
    ]
    assert [key for key, _ in by_webdataset(data)] == ["a"]


def test_duplicates_and_case_collisions() -> None:
    twice = member("a.jpg", b"x") + member("a.JPG", b"y") + member("a.cls", b"1")
    assert rows(tar(twice, B)) == [("a", "duplicate-member"), ("b", "ok")]
    with pytest.raises(ValueError, match="duplicate"):
        by_webdataset(tar(twice))
    assert rows(tar(A, A, B)) == [("a", "duplicate-member"), ("b", "ok")]
    assert rows(tar(member("a.__key__", b"x"))) == [("a", "duplicate-member")]


def test_repeated_key() -> None:
    assert rows(tar(A, B, A)) == [("a", "ok"), ("b", "ok"), ("a", "repeated-key")]


def test_images() -> None:
    assert rows(tar(member("a.cls", b"1"))) == [("a", "no-image")]
    assert rows(tar(member("a.jpg", b"x"), member("a.png", b"x"))) == [("a", "two-images")]
    assert rows(tar(member("a.WEBP", b"x"), member("a.seg.png", b"x"))) == [("a", "ok")]


@pytest.mark.parametrize("extension", ["pkl", "PICKLE", "pyd", "pth", "pt", "x.pkl", "pkl.gz"])
def test_pickles(extension: str) -> None:
    assert rows(tar(member("a.jpg", b"x"), member(f"a.{extension}", b"x"))) == [("a", "pickle-member")]
    assert rows(tar(member(f"__m__/a.{extension}", b"x"))) == [(f"__m__/a.{extension}", "pickle-member")]


def test_what_is_no_pickle() -> None:
    assert not any(is_pickle(extension) for extension in ("npy", "json", "pt.txt", "cls", "jpg"))


names = st.one_of(
    st.text("ab./_-é", min_size=1, max_size=12),
    st.sampled_from(
        ["a.jpg", "a.cls", "a.JPG", "b.jpg", "__x__", "__x__/a.jpg", "d/a.jpg", "n" * 130 + ".jpg"]
    ),
)
formats = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
kinds = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE])
members = st.builds(
    lambda name, data, layout, kind, mtime: member(
        name,
        b"" if kind == tarfile.DIRTYPE or name[-1] == "/" else data,  # V7: a name with a slash is a folder
        kind=kind,
        format=layout,
        mtime=mtime,
    ),
    names,
    st.binary(max_size=1100),
    formats,
    kinds,
    st.integers(0, 2**40),
)


@given(st.lists(members, max_size=8))
@settings(max_examples=150, deadline=None)
def test_members_are_those_of_tarfile(pieces: list[bytes]) -> None:
    data = tar(*pieces)
    rows(data)
    ours = [
        (e.name, e.start, e.data, e.size) for e in walk(data) if e.kind in ("file", "directory") and e.name
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        theirs = [(m.name, m.offset, m.offset_data, m.size) for m in reference if m.name]
    assert ours == theirs


@given(st.lists(members, max_size=8))
@settings(max_examples=150, deadline=None)
def test_samples_are_those_of_webdataset(pieces: list[bytes]) -> None:
    data = tar(*pieces)
    try:
        expected = by_webdataset(data)
    except ValueError:  # a duplicate: webdataset gives up, we have a row that says so
        assert {status for _, status in rows(data)} & {"duplicate-member", "unsafe-name"}
    else:
        assert by_us(data) == expected


@given(st.text("ab./_\n-", max_size=12))
@settings(max_examples=500)
def test_name_splitting_is_that_of_webdataset(name: str) -> None:
    key, extension = base_plus_ext(name)
    expected = None if key is None or re.match(r"__[^/]*__($|/)", name) else (key, extension.lower())
    assert split_name(name) == expected


@given(
    st.lists(st.sampled_from([A[:512], A, B, bytes(512), b"junk" * 128, corrupt(C)]), max_size=6), st.data()
)
@settings(max_examples=150, deadline=None)
def test_any_damage_keeps_every_byte_accounted_for(pieces: list[bytes], draw: st.DataObject) -> None:
    raw = bytearray(tar(*pieces, A))
    for position in draw.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6)):
        raw[position] = draw.draw(st.integers(0, 255))
    rows(bytes(raw[: draw.draw(st.integers(0, len(raw)))]))


@given(st.integers(0, 511), st.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_fast_header_path_accepts_what_tarfile_accepts(position: int, value: int) -> None:
    """One byte of a header is changed, after a first header has opened the fast path."""
    changed = bytearray(member("b.jpg", b"x" * 10))
    changed[position] = value
    data = tar(member("a.jpg", b"x" * 10), bytes(changed))
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        theirs = [(m.name, m.size) for m in reference]
    ours = [(e.name, e.size) for e in walk(data) if e.kind != "end"]
    if len(theirs) == 2:
        assert ours == theirs
    else:
        assert walk(data)[1].kind == "corrupt"
