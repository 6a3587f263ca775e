import gzip
import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from builders import corrupt, image_bytes, member, sample, shard, tar

from sanitize.corpus.index import MIN_CLASS_SAMPLES, SCHEMA, STATUS, Index, _row, build_index
from sanitize.corpus.shards import group, walk
from sanitize.corpus.sources import expand
from sanitize.errors import InputError
from sanitize.progress import Silent

TRUSTED = [sample(f"t{i:03d}", str(i % 2), seed=1000 + i) for i in range(60)]
GOOD = [sample(f"k{i:03d}", str(i % 2), seed=i) for i in range(20)]


def index(
    folder: Path,
    corpus: list[bytes] | dict[str, bytes],
    trusted: list[bytes] | None = None,
    label: str = "cls",
    workers: int = 1,
) -> Index:
    """Index of shards made of pieces; a dict gives whole files by name."""
    if isinstance(corpus, dict):
        (folder / "corpus").mkdir()
        for name, data in corpus.items():
            (folder / "corpus" / name).write_bytes(data)
    else:
        shard(folder / "corpus" / "c.tar", corpus)
    shard(folder / "trusted" / "t.tar", TRUSTED if trusted is None else trusted)
    scratch = folder / "scratch"
    scratch.mkdir()
    return build_index(
        expand(str(folder / "corpus")),
        expand(str(folder / "trusted")),
        label=label,
        scratch=scratch,
        workers=workers,
        progress=Silent(),
    )


def statuses(found: Index) -> list[tuple[str, str]]:
    rows = found.table.filter(pa.compute.invert(found.table["trusted"]))
    return list(zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True))


def test_rows_and_records(tmp_path: Path) -> None:
    found = index(tmp_path, {"a.tar": tar(*GOOD[:10]), "b.tar": tar(*GOOD[10:])}, workers=2)
    table = found.table
    assert table.schema.equals(SCHEMA)
    assert table["sample_id"].to_pylist() == list(range(80))
    assert table["trusted"].to_pylist() == [False] * 20 + [True] * 60
    assert table["shard"].to_pylist() == ["a.tar"] * 10 + ["b.tar"] * 10 + ["t.tar"] * 60
    assert found.class_names == ["0", "1"]
    assert found.notes == []
    row = table.slice(11, 1).to_pylist()[0]
    image = image_bytes(11, "jpeg", 8)
    assert (row["key"], row["label"], row["class_id"], row["status"]) == ("k011", "1", 1, "ok")
    assert row["image_sha256"] == hashlib.sha256(image).hexdigest()
    raw = (tmp_path / "corpus" / "b.tar").read_bytes()
    assert raw[row["image_offset"] :][: row["image_size"]] == image
    assert raw[row["start"] : row["end"]] == GOOD[11]
    record = found.shards[1]
    assert record["name"] == "b.tar"
    assert record["trusted"] is False
    assert record["bytes"] == record["tar_bytes"] == len(raw)
    assert record["sha256"] == hashlib.sha256(raw).hexdigest()
    assert record["samples"] == 10
    assert record["problems"] == []
    parts = ("samples", "directories", "end", "unreadable")
    assert sum(record[f"bytes_{part}"] for part in parts) == len(raw)
    json.dumps(found.shards)


def test_processes_and_compression_change_nothing(tmp_path: Path) -> None:
    raw = tar(*GOOD)
    tables = []
    for number, files in enumerate(
        ({"a.tar": raw}, {"a.tar.gz": gzip.compress(raw)}, {"a.tar.zst": zstandard.compress(raw)})
    ):
        (tmp_path / str(number)).mkdir()
        found = index(tmp_path / str(number), files, workers=2)
        tables.append(found.table.drop_columns(["shard"]))
        assert found.shards[0]["tar_bytes"] == len(raw)
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_every_status_of_the_index_in_one_corpus(tmp_path: Path) -> None:
    image = image_bytes(5, "png", 8)
    bad = [
        member("n1.cls", b"0"),
        member("n2.jpg", image) + member("n2.png", image) + member("n2.cls", b"0"),
        member("n3.jpg", image),
        member("n4.jpg", image) + member("n4.cls", b"two\nlines"),
        sample("n5", "lonely"),
        member("n6.jpg", image) + member("n6.JPG", image) + member("n6.cls", b"0"),
        GOOD[0],
        sample("../n8", "0"),
        member("n9.jpg", kind=b"2", link="x") + member("n9.cls", b"0"),
        sample("n10", "0") + member("n10.pkl", b"x"),
        corrupt(member("n11.cls", b"0")),
        sample("n12", "0"),
    ]
    whole = tar(*GOOD, *bad) + GOOD[1]
    found = index(tmp_path, {"a.tar": whole, "b.tar": tar(sample("z", "0"))[:700]})
    expected = [
        ("n1", "no-image"),
        ("n2", "two-images"),
        ("n3", "no-label"),
        ("n4", "bad-label"),
        ("n5", "unknown-label"),
        ("n6", "duplicate-member"),
        ("k000", "repeated-key"),
        ("../n8", "unsafe-name"),
        ("n9", "not-a-file"),
        ("n10", "pickle-member"),
        ("", "corrupt-header"),
        ("n12", "ok"),
        ("k001", "after-end"),
        ("z", "cut"),
    ]
    assert statuses(found)[20:] == expected
    assert {status for _, status in statuses(found)} <= STATUS.keys()
    assert found.table["class_id"].to_pylist()[20:34] == [-1] * 11 + [0, -1, -1]
    assert "unreadable" in found.shards[0]["problems"][0]
    assert "cut" in found.shards[1]["problems"][0]


def test_damaged_gzip_is_reported_and_used(tmp_path: Path) -> None:
    packed = gzip.compress(tar(*GOOD), compresslevel=0)
    found = index(tmp_path, {"a.tar.gz": packed[: len(packed) // 2]})
    assert statuses(found)[0] == ("k000", "ok")
    assert statuses(found)[-1][1] == "cut"
    assert "damaged gz stream" in found.shards[0]["problems"][0]


def test_zero_byte_shard_beside_a_good_one(tmp_path: Path) -> None:
    found = index(tmp_path, {"a.tar": b"", "b.tar": tar(*GOOD)})
    assert found.shards[0]["samples"] == 0
    assert found.shards[0]["problems"] == ["an empty file"]


def test_same_key_in_two_shards_is_legal(tmp_path: Path) -> None:
    found = index(tmp_path, {"a.tar": tar(*GOOD), "b.tar": tar(*GOOD)})
    assert {status for _, status in statuses(found)} == {"ok"}


def test_hostile_keys_and_labels_are_stored_raw(tmp_path: Path) -> None:
    hostile = "<b>[red]\x1b[2J"
    extra = [
        sample(hostile, "0"),
        sample("\udcff", "0"),
        *(sample(f"x{i}", "<script>") for i in range(MIN_CLASS_SAMPLES)),
    ]
    found = index(tmp_path, [*GOOD, *extra])
    assert [key for key, _ in statuses(found)][20:22] == [hostile, "\\xff"]
    assert found.class_names == ["0", "1", "<script>"]
    assert found.notes == [
        "1 corpus classes have no trusted sample, so nothing vouches for what clean looks like there: "
        "<script>."
    ]


def test_labels_from_text_and_json(tmp_path: Path) -> None:
    def labelled(key: str, label: str, seed: int) -> bytes:
        text = json.dumps({"meta": {"tags": [label]}}).encode()
        return member(f"{key}.png", image_bytes(seed, "png", 8)) + member(f"{key}.json", text)

    pool = [labelled(f"k{i}", ["dog", "cat"][i % 2], i) for i in range(4)]
    trusted = [labelled(f"t{i}", ["dog", "cat"][i % 2], 100 + i) for i in range(50)]
    found = index(tmp_path, pool, trusted, label="json:meta.tags.0")
    assert found.class_names == ["cat", "dog"]
    assert found.table["class_id"].to_pylist()[:4] == [1, 0, 1, 0]


@pytest.mark.parametrize(("samples", "known"), [(MIN_CLASS_SAMPLES - 1, False), (MIN_CLASS_SAMPLES, True)])
def test_untrusted_label_needs_enough_samples(tmp_path: Path, samples: int, known: bool) -> None:
    found = index(tmp_path, [*GOOD, *(sample(f"x{i}", "new") for i in range(samples))])
    assert ("new" in found.class_names) is known
    assert statuses(found)[-1][1] == ("ok" if known else "unknown-label")


def test_trusted_trouble_becomes_notes(tmp_path: Path) -> None:
    trusted = [*TRUSTED, sample("alien", "9"), member("x.cls", b"0")]
    found = index(tmp_path, GOOD, trusted)
    assert found.table["status"].to_pylist()[-2:] == ["unknown-label", "no-image"]
    assert found.notes == [
        "1 trusted samples cannot be used: 1 no-image.",
        "1 trusted samples have labels that the corpus lacks: 9.",
    ]


def test_shared_images_are_noted(tmp_path: Path) -> None:
    pool = [*GOOD, sample("dup", "0", seed=1001), sample("same", "0", seed=1000)]
    found = index(tmp_path, pool)
    assert any(note.startswith("1 corpus samples have exactly the image") for note in found.notes)
    assert "under another label" in found.notes[0]
    assert "the same label" in found.notes[1]


@pytest.mark.parametrize(
    ("corpus", "trusted", "message"),
    [
        ([], TRUSTED, "the corpus has no usable sample: its shards are empty"),
        (
            [member("a.jpg", b"x")],
            TRUSTED,
            r'no ".cls" member in any of 1 samples; .* key \'a\' has members jpg',
        ),
        ([member("a.cls", b"0")], TRUSTED, "1 of 1 are no-image"),
        (GOOD, [], "the trusted set has no usable sample"),
        (GOOD, [member("a.cls", b"0")], "the trusted set has no usable sample: 1 of 1 are no-image"),
        (GOOD, TRUSTED[:49], "49 usable samples .* 50 are needed"),
        (GOOD, [sample(f"t{i}", "cat") for i in range(60)], "no label in common"),
        ([sample("a", "0")], TRUSTED, "needs at least two"),
        ([b"not a tar at all" * 100], TRUSTED, "corrupt-header"),
    ],
)
def test_errors_teach(tmp_path: Path, corpus: list[bytes], trusted: list[bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        index(tmp_path, corpus, trusted)


def test_wrong_label_option_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has members cls, jpg; pass --label"):
        index(tmp_path, GOOD, label="json:label")


def test_one_shard_cannot_be_corpus_and_trusted(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", GOOD)
    (tmp_path / "link.tar").symlink_to(path)
    for other in (path, tmp_path / "link.tar"):
        with pytest.raises(InputError, match="both corpus and trusted"):
            build_index(
                expand(str(path)),
                expand(str(other)),
                label="cls",
                scratch=tmp_path,
                workers=1,
                progress=Silent(),
            )


class Watched(bytes):
    """Remembers the longest copy that was made of a part of it."""

    longest = 0

    def __getitem__(self, part: Any) -> Any:
        copied = super().__getitem__(part)
        if isinstance(part, slice):
            self.longest = max(self.longest, len(copied))
        return copied


def test_large_members_are_not_copied() -> None:
    image = bytes(3 << 20)
    data = tar(member("a.jpg", image), member("a.cls", b"1" * (2 << 20)), sample("b", "1"))
    buffer = Watched(data)
    samples, _ = group(walk(buffer))
    rows = [_row(buffer, found, "cls") for found in samples]
    assert [row[-1] for row in rows] == ["bad-label", "ok"]
    assert rows[0][-2] == hashlib.sha256(image).hexdigest()
    assert 0 < buffer.longest <= 64 << 10


def test_no_view_keeps_a_shard_mapped(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", GOOD)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    samples, _ = group(walk(mapped))
    assert {_row(mapped, found, "cls")[-1] for found in samples} == {"ok"}
    mapped.close()  # a BufferError, were there a view
    assert mapped.closed
