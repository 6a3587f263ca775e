"""Bad input through `sanitize scan`: an error or quarantine with a reason, nothing lost, no traceback."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import corrupt, global_header, image_bytes, member, sample, shard, tar, with_header
from conftest import Outcome, Shards, run_cli, scan_arguments
from PIL import Image
from test_pixels import encoded, grey_png16, noise

QUICK = {"epochs": 3, "resolution": 8, "reject": 0.1}
GOOD = [sample(f"good{i:03d}", str(i % 2), seed=i) for i in range(80)]
TRUSTED = [sample(f"t{i:03d}", str(i % 2), seed=1000 + i) for i in range(60)]

HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
MARKUP = "[bold red]x[/] [link=file:///etc/passwd]y[/link]"
ESCAPE = "\x1b[31mred\x1b]0;title\x07\x1b[2J\u202eevil"


def place(folder: Path, corpus: dict[str, bytes], trusted: list[bytes] | None = None) -> Shards:
    for name, data in corpus.items():
        path = folder / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "corpus").mkdir(exist_ok=True)
    shard(folder / "trusted" / "t.tar", TRUSTED if trusted is None else trusted)
    return Shards(folder / "corpus", folder / "trusted")


def scan(folder: Path, shards: Shards, **changes: object) -> Outcome:
    outcome = run_cli(*scan_arguments(shards, folder / "run", **{**QUICK, **changes}))
    assert "Traceback" not in outcome.err
    return outcome


def scanned(folder: Path, shards: Shards, **changes: object) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The report, and the statuses of each key; everything reconciles."""
    outcome = scan(folder, shards, json=True, **changes)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    counts = report["counts"]
    assert counts["indexed"] == counts["kept"] + counts["quarantined"]
    assert counts["quarantined"] == counts["suspicious"] + counts["unusable"]
    rows = pq.read_table(folder / "run" / "decisions.parquet").to_pylist()
    assert counts["indexed"] == len(rows)
    statuses: dict[str, list[str]] = {}
    for row in rows:
        statuses.setdefault(row["key"], []).append(row["status"])
        assert (row["reason"] is None) == (not row["flagged"])
        if row["status"] != "ok":
            assert row["flagged"]
    return report, statuses


def with_image(key: str, image: bytes, extension: str = "png") -> bytes:
    return member(f"{key}.{extension}", image) + member(f"{key}.cls", b"0")


def wild_images() -> dict[str, bytes]:
    picture = Image.fromarray(noise(16, 16, 3))
    ramp = (noise(16, 16).astype("uint16")) * 257
    palette = picture.quantize(8)
    return {
        "grey": encoded(picture.convert("L"), "png"),
        "palette": encoded(palette, "png"),
        "seethrough": encoded(palette, "png", transparency=1),
        "cmyk": encoded(picture.convert("CMYK"), "jpeg"),
        "deep": grey_png16(ramp, 1),
        "deeprgb": grey_png16(ramp[..., None].repeat(3, axis=2), 3),
        "rgba": encoded(picture.convert("RGBA"), "png"),
        "webp": encoded(picture, "webp"),
        "animated": encoded(picture, "webp", save_all=True, append_images=[picture.rotate(90)]),
        "bomb": encoded(Image.new("1", (10_000, 10_000)), "png"),
        "empty": b"",
        "truncated": encoded(picture.resize((200, 200)), "png")[:900],
        "garbage": b"\xff\xd8\xff" + bytes(range(256)) * 4,
    }


def test_every_kind_of_image(tmp_path: Path) -> None:
    pieces = [with_image(key, data) for key, data in wild_images().items()]
    report, statuses = scanned(tmp_path, place(tmp_path, {"a.tar": tar(*GOOD, *pieces)}))
    expected = {key: ["ok"] for key in wild_images()} | {
        "animated": ["animated"],
        "bomb": ["too-large"],
        "empty": ["undecodable"],
        "truncated": ["undecodable"],
        "garbage": ["undecodable"],
    }
    assert {key: statuses[key] for key in expected} == expected
    assert report["counts"]["indexed"] == len(GOOD) + len(pieces)
    assert report["counts"]["unusable"] == 5


def broken_pieces() -> dict[str, tuple[bytes, str]]:
    """Key -> bytes in mid-shard and the status they must get."""
    image = image_bytes(1, "png", 8)
    return {
        "nolabel": (member("nolabel.png", image), "no-label"),
        "noimage": (member("noimage.cls", b"0"), "no-image"),
        "README": (member("README", b"hello"), "no-image"),
        "two": (member("two.png", image) + with_image("two", image, "jpg"), "two-images"),
        "unknown": (sample("unknown", "never seen"), "unknown-label"),
        "badlabel": (sample("badlabel", "a\nb"), "bad-label"),
        "escapelabel": (sample("escapelabel", ESCAPE), "bad-label"),
        "pickle": (with_image("pickle", image) + member("pickle.pkl", b"cos\nsystem\n."), "pickle-member"),
        "case": (member("case.jpg", image) + member("case.JPG", image), "duplicate-member"),
        "link": (member("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), "not-a-file"),
        "hardlink": (member("hardlink.jpg", kind=tarfile.LNKTYPE, link="good000.jpg"), "not-a-file"),
        "device": (member("device.jpg", kind=tarfile.CHRTYPE), "not-a-file"),
        "fifo": (member("fifo.jpg", kind=tarfile.FIFOTYPE), "not-a-file"),
        "../up": (with_image("../up", image), "unsafe-name"),
        "/etc/abs": (with_image("/etc/abs", image), "unsafe-name"),
        "good001": (sample("good001", "1", seed=501), "repeated-key"),
        "sparse": (with_header("sparse.jpg", image, typeflag=b"S"), "not-a-file"),
    }


def test_every_kind_of_broken_sample(tmp_path: Path) -> None:
    pieces = broken_pieces()
    data = tar(*GOOD[:40], *(piece for piece, _ in pieces.values()), *GOOD[40:])
    report, statuses = scanned(tmp_path, place(tmp_path, {"a.tar": data}))
    for key, (_, status) in pieces.items():
        assert status in statuses[key], key
    assert statuses["good001"] == ["ok", "repeated-key"]
    assert sum(found == ["ok"] for found in statuses.values()) == len(GOOD) - 1
    assert report["counts"]["unusable"] == len(pieces)
    with tarfile.open(tmp_path / "run" / "kept" / "a.tar") as kept:
        assert all(name.startswith("good") for name in kept.getnames())


def test_every_kind_of_broken_tar(tmp_path: Path) -> None:
    whole = tar(*GOOD[:20])
    twice = [sample(f"twice{i}", str(i % 2), seed=700 + i) for i in range(4)]
    files = {
        "a-good.tar": tar(*GOOD),
        "b-corrupt.tar": tar(sample("b0"), corrupt(sample("b1")), sample("b2", "1")),
        "c-cut.tar": tar(sample("c0"), with_image("c1", image_bytes(3, "png", 32)))[: -2048 - 300],
        "d-after.tar": tar(sample("d0")) + b"garbage" * 100,
        "e-concatenated.tar": tar(*twice[:2]) + tar(*twice[2:]),
        "f-empty.tar": b"",
        "g-zeros.tar": bytes(10240),
        "h-notar.tar": b"this is no tar at all" * 100,
        "i-same-key.tar": tar(sample("good000", "0", seed=800)),
        "j-global.tar": tar(global_header({"comment": HTML}), sample("j0")),
        "k-noend.tar": whole[: -len(bytes(1024))].replace(b"good", b"kind"),
    }
    shards = place(tmp_path, files)
    report, statuses = scanned(tmp_path, shards)
    assert any("corrupt-header" in found for found in statuses.values())
    assert statuses["c1"] == ["cut"]
    assert statuses["good000"] == ["ok", "ok"]
    assert statuses["b0"] == statuses["b2"] == statuses["d0"] == statuses["j0"] == ["ok"]
    assert [statuses[f"twice{i}"] for i in range(4)] == [["ok"]] * 2 + [["after-end"]] * 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    records = {record["name"]: record for record in manifest["shards"]}
    for name, data in files.items():
        parts = ("samples", "directories", "end", "unreadable")
        assert sum(records[name][f"bytes_{part}"] for part in parts) == len(data)
    for name in (
        "b-corrupt.tar",
        "c-cut.tar",
        "d-after.tar",
        "e-concatenated.tar",
        "f-empty.tar",
        "h-notar.tar",
    ):
        assert records[name]["problems"], name
    assert report["counts"]["indexed"] == sum(len(found) for found in statuses.values())


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, layout: int) -> None:
    names = ["n" * 300, "漢字" * 60, "dir/" + "é" * 140]
    pieces = [
        member(f"{name}.png", image_bytes(i, "png", 8), format=layout)
        + member(f"{name}.cls", b"1", format=layout)
        for i, name in enumerate(names)
    ]
    _, statuses = scanned(tmp_path, place(tmp_path, {"a.tar": tar(*GOOD, *pieces)}))
    assert [statuses[name] for name in names] == [["ok"]] * 3
    with tarfile.open(tmp_path / "run" / "kept" / "a.tar") as kept:
        written = set(kept.getnames())
    with tarfile.open(tmp_path / "run" / "quarantine" / "a.tar") as quarantined:
        written |= set(quarantined.getnames())
    assert {f"{name}.png" for name in names} <= written


def test_keys_and_labels_are_inert(tmp_path: Path) -> None:
    """HTML, rich markup and terminal escapes in keys and labels, all flagged so that all are shown."""
    hostile = []
    for number, text in enumerate((HTML, MARKUP)):
        hostile += [
            sample(f"{text}{i}".replace("/", "_"), text, seed=2000 + 50 * number + i) for i in range(20)
        ]
    hostile += [sample(f"{ESCAPE}{i}", "0", seed=3000 + i) for i in range(20)]
    hostile += [member(f"{ESCAPE}broken.png", b"") + member(f"{ESCAPE}broken.cls", ESCAPE.encode())]
    trusted = [*TRUSTED, *(sample(f"h{i}", HTML, seed=4000 + i) for i in range(5))]
    shards = place(tmp_path, {"a.tar": tar(*GOOD, *hostile)}, trusted)
    plain = scan(tmp_path, shards, reject=0.9, class_cap=1.0)
    assert plain.code == 0
    again = scan(tmp_path, shards, reject=0.9, class_cap=1.0, json=True)
    page = (tmp_path / "run" / "report.html").read_text()
    for printed in (plain.out, plain.err, again.out, again.err, page):
        assert "\x1b" not in printed
        assert "\x07" not in printed
        assert "\u202e" not in printed
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert MARKUP.split()[0] in page
    assert (tmp_path / "run" / "report.json").read_text().isascii()
    assert json.dumps(HTML) in again.out  # whole, for machines
    assert (tmp_path / "run" / "manifest.json").read_text().isascii()


def test_labels_in_an_error_are_inert(tmp_path: Path) -> None:
    trusted = [sample(f"t{i}", f"{MARKUP}{HTML}\u202e{i % 3}", seed=i) for i in range(60)]
    outcome = scan(tmp_path, place(tmp_path, {"a.tar": tar(*GOOD)}, trusted))
    assert outcome.code == 3
    assert "no label in common" in outcome.err
    assert "[bold red]" in outcome.err  # shown as it is, not interpreted
    assert "\u202e" not in outcome.err
    key = [member(f"{ESCAPE}.png", b"x")]
    outcome = scan(tmp_path / "b", place(tmp_path / "b", {"a.tar": tar(*key)}))
    assert (outcome.code, "\x1b" in outcome.err) == (3, False)
    assert "\\x1b[31mred" in outcome.err


def labels(text: str, count: int, first: int) -> list[bytes]:
    return [sample(f"x{first + i}", text, seed=first + i) for i in range(count)]


ERRORS: dict[str, tuple[dict[str, bytes], list[bytes], str]] = {
    "empty folder": ({}, TRUSTED, "holds no shard"),
    "no shard in it": ({"notes.txt": b"x"}, TRUSTED, "holds no shard"),
    "empty shards": ({"a.tar": tar(), "b.tar": b""}, TRUSTED, "the corpus has no usable sample: its shards"),
    "no tar": ({"a.tar": b"x" * 5000}, TRUSTED, "the corpus has no usable sample"),
    "trusted empty": ({"a.tar": tar(*GOOD)}, [], "the trusted set has no usable sample"),
    "trusted too small": ({"a.tar": tar(*GOOD)}, TRUSTED[:49], "has 49 usable samples"),
    "one class": (
        {"a.tar": tar(*labels("0", 40, 0))},
        labels("0", 60, 900),
        "all usable samples have the label '0'",
    ),
    "no common label": ({"a.tar": tar(*GOOD)}, labels("cat", 60, 900), "no label in common"),
    "no label member": (
        {"a.tar": tar(*(member(f"{i}.png", b"x") for i in range(9)))},
        TRUSTED,
        'no ".cls" member in any of 9 samples; shard a.tar',
    ),
    "trusted undecodable": (
        {"a.tar": tar(*GOOD)},
        [with_image(f"t{i}", b"nothing") + b"" for i in range(60)],
        "0 trusted samples can be used and --method mahalanobis needs 50",
    ),
    "corpus undecodable": (
        {"a.tar": tar(*(member(f"{i}.png", b"") + member(f"{i}.cls", b"%d" % (i % 2)) for i in range(40)))},
        TRUSTED,
        "that can be decoded have 0 labels; at least 2",
    ),
    "compressed under another name": ({"a.tar": b"\x1f\x8b" + bytes(600)}, TRUSTED, "rename it"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_input_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    corpus, trusted, message = ERRORS[case]
    outcome = scan(tmp_path, place(tmp_path, corpus, trusted))
    assert outcome.code == 3
    assert message in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ") or "error: " in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    "spec",
    ["none-*.tar", "none-{0..3}.tar", "none.tar", "@none.txt", "a.zip", "nodir/", "", "memory://none.tar"],
)
def test_no_shard_matches(tmp_path: Path, spec: str) -> None:
    shards = place(tmp_path, {"a.tar": tar(*GOOD)})
    local = spec if spec.startswith(("@", "memory:")) or not spec else str(tmp_path / spec)
    outcome = run_cli(*scan_arguments(shards._replace(corpus=Path("x")), tmp_path / "run"))
    assert outcome.code == 3
    arguments = scan_arguments(shards, tmp_path / "run")
    arguments[1] = local
    outcome = run_cli(*arguments)
    assert outcome.code == 3
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_trusted_with_a_class_the_corpus_lacks_and_without_one_it_has(tmp_path: Path) -> None:
    own = [sample(f"c{i}", str(2 + i % 2), seed=500 + i) for i in range(60)]
    trusted = [*TRUSTED, *labels("99", 5, 5000)]
    report, statuses = scanned(tmp_path, place(tmp_path, {"a.tar": tar(*GOOD, *own)}, trusted))
    notes = " ".join(report["notes"])
    assert "5 trusted samples have labels that the corpus lacks: 99." in notes
    assert "2 corpus classes have no trusted sample" in notes
    assert statuses["c0"] == ["ok"]


def test_same_shard_on_both_sides(tmp_path: Path) -> None:
    shards = place(tmp_path, {"a.tar": tar(*GOOD)})
    outcome = scan(tmp_path, shards._replace(trusted=shards.corpus))
    assert (outcome.code, "is both corpus and trusted" in outcome.err) == (3, True)


@pytest.mark.parametrize("spec", ["txt", "json:meta.class"])
def test_other_label_sources(tmp_path: Path, spec: str) -> None:
    def labelled(key: str, label: str, seed: int) -> bytes:
        body = label.encode() if spec == "txt" else json.dumps({"meta": {"class": label}}).encode()
        image = member(f"{key}.png", image_bytes(seed, "png", 8))
        return image + member(f"{key}.{spec.split(':')[0]}", body)

    names = ("a café", "<b>dog</b>")
    corpus = [labelled(f"k{i}", names[i % 2], i) for i in range(60)]
    trusted = [labelled(f"t{i}", names[i % 2], 900 + i) for i in range(60)]
    broken = member("odd.png", image_bytes(1, "png", 8)) + member("odd.json", b"{not json")
    report, statuses = scanned(
        tmp_path, place(tmp_path, {"a.tar": tar(*corpus, broken)}, trusted), label=spec
    )
    assert statuses["odd"] == ["no-label" if spec == "txt" else "bad-label"]
    assert report["counts"]["unusable"] == 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["class_names"] == ["<b>dog</b>", "a café"]


def test_nothing_is_unpickled_or_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    marker = tmp_path / "owned"

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(marker),)

    evil = pickle.dumps(Bomb())
    pieces = [with_image(f"p{i}", evil, "jpg") for i in range(3)]
    pieces += [with_image("q", evil) + member(f"q.{extension}", evil) for extension in ("pkl", "pth", "pyd")]
    scanned(tmp_path, place(tmp_path, {"a.tar": tar(*GOOD, *pieces)}))
    assert not marker.exists()
