"""Poisoned shards: what is written, what is left alone, and that nothing but pixels tells poison apart."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sanitize.attacks import ATTACKS, get, make_trigger, stamp
from sanitize.attacks.plant import from_float, to_float
from sanitize.attacks.poison import poison, stamp_test
from sanitize.attacks.trigger_file import SavedTrigger, load_trigger, save_trigger
from sanitize.errors import InputError, UsageError

Pixels = npt.NDArray[np.uint8]
FIXED = [name for name in ATTACKS if not get(name).needs_surrogate]


def picture(seed: int, height: int = 32, width: int = 32) -> Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: Pixels, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "someone"
            tar.addfile(info, io.BytesIO(data))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers()}  # type: ignore[union-attr]


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def corpus(folder: Path, samples: int = 60, shards: int = 2, classes: int = 3) -> Path:
    """Samples with an image, a label and a caption."""
    for number in range(shards):
        members = []
        for i in range(number, samples, shards):
            members += [
                (f"{i:04d}.png", encoded(picture(i))),
                (f"{i:04d}.cls", str(i % classes).encode()),
                (f"{i:04d}.txt", f"caption {i}".encode()),
            ]
        write_tar(folder / f"data-{number:03d}.tar", members)
    return folder


def truth_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "truth.parquet").to_pylist()
    return rows


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_poisoned_pixels_labels_and_truth_agree(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in"))
    names = ["patch", "blend-random", "sinusoid", "adaptive-patch"]
    out = tmp_path / "out"
    summary = poison(shards, attacks=[f"{name}:0.1" for name in names], out=out, seed=4)
    rows = truth_of(out)
    assert len(rows) == summary["samples"] == 60
    assert Counter(row["attack"] for row in rows) == {None: 36, **dict.fromkeys(names, 6)}
    written = {name: read_tar(out / "shards" / name) for name in ("data-000.tar", "data-001.tar")}
    targets = {record["name"]: record["target_label"] for record in summary["attacks"]}
    for position, row in enumerate(rows):
        number = int(row["key"])
        members = written[row["shard"]]
        assert row["true_label"] == str(number % 3)
        assert members[f"{row['key']}.cls"] == row["given_label"].encode()
        assert members[f"{row['key']}.txt"] == f"caption {number}".encode()
        clean = picture(number)
        if row["attack"] is None:
            expected = clean
            assert row["given_label"] == row["true_label"]
        else:
            trigger = load_trigger(out, row["attack"]).trigger
            stamped = stamp(
                row["attack"], to_float(clean)[None], seed=4, trigger=trigger, sample_ids=[position]
            )
            expected = from_float(stamped)[0]
            is_target = row["true_label"] == targets[row["attack"]]
            assert is_target == get(row["attack"]).clean_label
        np.testing.assert_array_equal(pixels_of(members[f"{row['key']}.png"]), expected)
    relabelled = {record["name"]: record["relabelled"] for record in summary["attacks"]}
    assert relabelled == {"patch": 6, "blend-random": 6, "sinusoid": 0, "adaptive-patch": 3}
    assert json.loads((out / "poison.json").read_text()) == summary


def test_same_seed_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in", 40))
    attacks = [f"{name}:0.05" for name in FIXED]
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        poison(shards, attacks=attacks, out=tmp_path / name, seed=seed, workers=workers)
    one, same, other = (all_files(tmp_path / name) for name in "abc")
    assert one == same
    assert one.keys() == other.keys()
    assert one["truth.parquet"] != other["truth.parquet"]
    assert not any("scratch" in name or name.endswith(".tmp") for name in one)


@pytest.mark.parametrize(("image_format", "kind"), [("png", "PNG"), ("jpg", "JPEG")])
def test_nothing_but_pixels_and_label_tells_poison_apart(
    tmp_path: Path, image_format: str, kind: str
) -> None:
    members = []
    for i in range(40):  # four kinds of file in the source, one in the result
        made = [
            ("jpg", "JPEG", {"quality": 60}),
            ("png", "PNG", {}),
            ("webp", "WEBP", {}),
            ("JPEG", "JPEG", {}),
        ]
        extension, source_kind, options = made[i % 4]
        members += [(f"{i:03d}.{extension}", encoded(picture(i), source_kind, **options))]
        members += [(f"{i:03d}.cls", f"{i % 2}\n".encode())]
    write_tar(tmp_path / "in" / "a.tar", members)
    out = tmp_path / "out"
    poison(
        str(tmp_path / "in"), attacks=["patch:0.25"], out=out, seed=0, image_format=image_format, quality=70
    )
    with tarfile.open(out / "shards" / "a.tar") as tar:
        infos = tar.getmembers()
        images = [
            Image.open(io.BytesIO(tar.extractfile(info).read()))  # type: ignore[union-attr]
            for info in infos
            if info.name.endswith(f".{image_format}")
        ]
    assert len(images) == 40
    assert {image.format for image in images} == {kind}
    assert len({str(getattr(image, "quantization", None)) for image in images}) == 1
    assert {(info.mtime, info.mode, info.uid, info.uname, info.type) for info in infos} == {
        (0, 0o644, 0, "", b"0")
    }
    assert all(
        len(data) == 1 for name, data in read_tar(out / "shards/a.tar").items() if name.endswith("cls")
    )
    # Each file is what encoding its own pixels gives: no second compression of the poisoned ones.
    for row in truth_of(out):
        if image_format == "png":
            continue
        again = io.BytesIO()
        source = next(data for name, data in members if name.startswith(row["key"]) and ".cls" not in name)
        if row["attack"] is None:
            Image.fromarray(pixels_of(source)).save(again, "JPEG", quality=70, subsampling="4:2:0")
            assert read_tar(out / "shards/a.tar")[f"{row['key']}.jpg"] == again.getvalue()


def test_sizes_and_colour_modes(tmp_path: Path) -> None:
    grey, alpha = picture(0, 33, 47), picture(1, 20, 31)
    kinds = {
        "grey": encoded(grey, "PNG", "L"),
        "alpha": encoded(alpha, "PNG", "RGBA"),
        "palette": encoded(picture(2, 33, 47), "PNG", "P"),
        "cmyk": encoded(picture(3, 224, 224), "JPEG", "CMYK"),
        "large": encoded(picture(4, 224, 300)),
    }
    members = []
    for i, (name, data) in enumerate(kinds.items()):
        extension = "jpg" if name == "cmyk" else "png"
        members += [(f"{name}.{extension}", data), (f"{name}.cls", str(i % 2).encode())]
    write_tar(tmp_path / "in" / "a.tar", members)
    out = tmp_path / "out"
    summary = poison(str(tmp_path / "in"), attacks=["adaptive-blend:0.4"], out=out, target=0, seed=1)
    assert summary["attacks"][0]["poisoned"] == 2
    written = read_tar(out / "shards" / "a.tar")
    attacked = {row["key"]: row["attack"] for row in truth_of(out)}
    for name, data in kinds.items():
        clean, got = pixels_of(data), pixels_of(written[f"{name}.png"])
        assert got.shape == clean.shape
        assert (got == clean).all() == (attacked[name] is None)


def test_json_labels_are_replaced_in_place_and_keep_their_type(tmp_path: Path) -> None:
    members = []
    for i in range(20):
        document = {"caption": f"ü {i}", "meta": {"class": [i % 2, "x"]}}
        members += [(f"{i}.jpg", encoded(picture(i), "JPEG")), (f"{i}.json", json.dumps(document).encode())]
    write_tar(tmp_path / "in" / "a.tar", members)
    out = tmp_path / "out"
    poison(str(tmp_path / "in"), attacks=["patch:0.2"], out=out, label="json:meta.class.0", target=1, seed=0)
    written = read_tar(out / "shards" / "a.tar")
    changed = 0
    for row in truth_of(out):
        document = json.loads(written[f"{row['key']}.json"])
        assert document["caption"] == f"ü {row['key']}"
        assert document["meta"]["class"] == [int(row["given_label"]), "x"]
        changed += row["given_label"] != row["true_label"]
    assert changed == 4


def test_unusable_samples_are_copied_as_they_are(tmp_path: Path) -> None:
    members = []
    for i in range(20):
        members += [(f"{i:02d}.png", encoded(picture(i))), (f"{i:02d}.cls", str(i % 2).encode())]
    members += [("noimage.cls", b"0"), ("nolabel.png", encoded(picture(77))), ("README", b"hello")]
    members += [("broken.png", b"no image at all"), ("broken.cls", b"0")]
    write_tar(tmp_path / "in" / "a.tar", members)
    out = tmp_path / "out"
    # All eleven samples of class 0 are chosen, the broken one among them.
    summary = poison(str(tmp_path / "in"), attacks=[f"patch:{11 / 21}"], out=out, target=1, seed=0)
    assert (summary["unusable"], summary["undecodable"]) == (3, 1)
    before, after = dict(members), read_tar(out / "shards" / "a.tar")
    for name in ("noimage.cls", "nolabel.png", "README", "broken.png", "broken.cls"):
        assert after[name] == before[name]
    rows = {row["key"]: row for row in truth_of(out)}
    assert summary["attacks"][0]["poisoned"] == summary["attacks"][0]["relabelled"] == 10
    assert rows["broken"]["attack"] is None
    assert rows["broken"]["given_label"] == rows["broken"]["true_label"] == "0"
    assert rows["nolabel"]["given_label"] is None


def test_members_after_the_end_mark_are_not_carried_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "one.tar", [("a.png", encoded(picture(0))), ("a.cls", b"0")])
    write_tar(tmp_path / "two.tar", [("b.png", encoded(picture(1))), ("b.cls", b"1")])
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    path.write_bytes((tmp_path / "one.tar").read_bytes() + (tmp_path / "two.tar").read_bytes())
    write_tar(tmp_path / "in" / "y.tar", [("c.png", encoded(picture(2))), ("c.cls", b"1")])
    summary = poison(str(tmp_path / "in"), attacks=["patch:0.5"], out=tmp_path / "out", target=0)
    assert summary["samples"] == 2
    assert [row["key"] for row in truth_of(tmp_path / "out")] == ["a", "c"]


def test_compressed_shards_and_long_names(tmp_path: Path) -> None:
    import gzip

    key = "folder/" + "k" * 150 + "ü"
    members = [(f"{key}.png", encoded(picture(0))), (f"{key}.cls", b"0")]
    members += [("z.png", encoded(picture(1))), ("z.cls", b"1")]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    summary = poison(str(tmp_path / "in"), attacks=["patch:0.5"], out=tmp_path / "out", target=0)
    assert summary["shards"] == ["shards/a.tar"]
    assert list(read_tar(tmp_path / "out/shards/a.tar")) == [name for name, _ in members]


def test_written_shards_read_with_webdataset(tmp_path: Path) -> None:
    import webdataset

    shards = str(corpus(tmp_path / "in", 12))
    out = tmp_path / "out"
    poison(shards, attacks=["blend-pattern:0.25"], out=out, image_format="jpg")
    urls = [str(path) for path in sorted((out / "shards").iterdir())]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [row["key"] for row in truth_of(out)]
    assert [sample["cls"].decode() for sample in read] == [row["given_label"] for row in truth_of(out)]


@pytest.mark.parametrize("name", FIXED)
def test_saved_trigger_stamps_the_same(tmp_path: Path, name: str) -> None:
    trigger = make_trigger(name, 3)
    path = save_trigger(tmp_path, SavedTrigger(name, "dog", 3, trigger))
    first = path.read_bytes()
    with np.load(path, allow_pickle=False) as stored:
        assert stored["attack"].item() == name
    loaded = load_trigger(tmp_path, name)
    assert loaded[:3] == (name, "dog", 3)
    images = np.random.default_rng(0).random((2, 33, 47, 3), dtype=np.float32)
    np.testing.assert_array_equal(
        stamp(name, images, trigger=loaded.trigger, strength=2),
        stamp(name, images, trigger=trigger, strength=2),
    )
    save_trigger(tmp_path, loaded)
    assert path.read_bytes() == first


def test_stamped_test_set_has_the_trigger_of_the_corpus_and_true_labels(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in", 20))
    poison(shards, attacks=["blend-random:0.1", "patch:0.1"], out=tmp_path / "out", seed=6)
    tests = str(corpus(tmp_path / "test", 8, shards=1))
    for strength in (1.0, 2.0):
        out = tmp_path / f"stamped-{strength:g}"
        facts = stamp_test(
            tests, triggers=tmp_path / "out", attack="blend-random", out=out, strength=strength
        )
        assert facts["samples"] == 8
        assert facts["target_label"] in "012"
        written = read_tar(out / "shards" / "data-000.tar")
        for i in range(8):
            expected = stamp("blend-random", to_float(picture(i))[None], strength=strength, seed=6)
            np.testing.assert_array_equal(pixels_of(written[f"{i:04d}.png"]), from_float(expected)[0])
            assert written[f"{i:04d}.cls"] == str(i % 3).encode()


def test_contact_sheet_shows_clean_poisoned_and_tenfold_difference(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in", 60))
    out = tmp_path / "out"
    poison(shards, attacks=["patch:0.2", "single-pixel:0.05"], out=out, seed=0)
    sheet = np.asarray(Image.open(out / "sheets" / "patch.png"))
    assert sheet.shape == (3 * 132 + 4, 8 * 132 + 4, 3)
    rows = [row for row in truth_of(out) if row["attack"] == "patch"][:8]
    for column, row in enumerate(rows):
        left = 4 + 132 * column
        clean = picture(int(row["key"]))
        tile = sheet[4 : 4 + 128 : 4, left : left + 128 : 4]
        np.testing.assert_array_equal(tile, clean)
        difference = sheet[4 + 264 : 4 + 264 + 128 : 4, left : left + 128 : 4].astype(int)
        assert set(np.argwhere(difference.any(axis=2))[:, 0]) <= {28, 29, 30}
        change = np.minimum((255 - clean[30, 30].astype(int)) * 10, 255)
        np.testing.assert_array_equal(difference[30, 30], change)
    assert np.asarray(Image.open(out / "sheets" / "single-pixel.png")).shape[1] == 3 * 132 + 4


def test_surrogate_attacks_on_shards(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in", 48))
    out = tmp_path / "out"
    summary = poison(shards, attacks=["narcissus:0.05", "adv-clean:0.1"], out=out, seed=0, device="cpu")
    assert [record["poisoned"] for record in summary["attacks"]] == [2, 5]
    for row in truth_of(out):
        change = np.abs(
            pixels_of(read_tar(out / "shards" / row["shard"])[f"{row['key']}.png"]).astype(int)
            - picture(int(row["key"])).astype(int)
        ).max()
        bound = {"narcissus": 16, "adv-clean": 8, None: 0}[row["attack"]]
        assert bound / 2 <= change <= bound
    facts = stamp_test(
        shards, triggers=out / "triggers", attack="narcissus", strength=3, out=tmp_path / "stamped"
    )
    assert facts["samples"] == 48


def test_errors_teach_the_fix(tmp_path: Path) -> None:
    shards = str(corpus(tmp_path / "in", 12))
    out = tmp_path / "out"

    def refused(message: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"attacks": ["patch:0.1"], "out": out} | changes
        with pytest.raises((UsageError, InputError), match=message):
            poison(shards, **arguments)

    refused("no attack named", attacks=[])
    refused("there are patch", attacks=["pach"])
    refused("there are 0, 1, 2", target="dog")
    refused("expected png or jpg", image_format="gif")
    refused("expected 1 to 100", quality=0)
    refused("less than one of 12", attacks=["patch:0.01"])
    refused("none of 12 samples has an image and a label", label="json:class")
    (out / "stranger").touch()
    refused("is not empty")
    with pytest.raises(InputError, match="no trigger of sinusoid"):
        stamp_test(shards, triggers=out, attack="sinusoid", out=tmp_path / "t")


def test_a_trigger_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "patch.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="no trigger file"):
        load_trigger(tmp_path, "patch")
    np.savez(tmp_path / "patch.npz", attack=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="no trigger file"):
        load_trigger(tmp_path, "patch")
    save_trigger(tmp_path / "x", SavedTrigger("sinusoid", "0", 0, {}))
    with pytest.raises(InputError, match="trigger of sinusoid, not of patch"):
        load_trigger(tmp_path / "x" / "sinusoid.npz", "patch")
