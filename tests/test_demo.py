import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import run_cli

from sanitize import demo
from sanitize.errors import RunFolderError
from sanitize.scores import trajectory_classifier


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiftieth of the real demo."""
    monkeypatch.setattr(demo, "PER_CLASS", 30)
    monkeypatch.setattr(demo, "TRUSTED_PER_CLASS", 8)
    monkeypatch.setattr(demo, "PER_SHARD", 100)
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(trajectory_classifier, "TREES", 20)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.tar"))}


def test_the_corpus_is_fixed_by_its_seed(tmp_path: Path) -> None:
    truths = [demo.write_corpus(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert truths[0] == truths[1]
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")
    assert sorted(files(tmp_path / "a")) == [
        *(f"corpus/scraped-{i:04d}.tar" for i in range(3)),
        "trusted/trusted-0000.tar",
    ]


def test_truth_names_what_was_planted(tmp_path: Path) -> None:
    truth = demo.write_corpus(tmp_path, 0)
    count = len(demo.CLASSES) * 30
    assert len(truth) == count
    attacks = [attack.partition(":") for attack in demo.ATTACKS]
    for name, _, ratio in attacks:
        assert sum(found == name for found in truth.values()) == round(float(ratio) * count)
    urls = [str(path) for path in sorted((tmp_path / "corpus").iterdir())]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == list(truth)
    assert {sample["cls"].decode() for sample in found} == set(demo.CLASSES)


def test_every_class_has_its_own_picture() -> None:
    """Shapes differ, or there would be nothing to learn."""
    masks = [np.asarray(demo._shape(name, 60, 4)) for name in demo.CLASSES]
    for i, one in enumerate(masks):
        assert 0.1 < (one > 0).mean() < 0.95
        assert all((one != other).mean() > 0.05 for other in masks[:i])
    picture = demo.picture(3, np.random.default_rng(0))
    assert (picture.shape, picture.dtype) == ((32, 32, 3), np.uint8)


def test_the_demo_runs_twice_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    plain = run_cli("demo", "--out", out)
    assert plain.code == 0
    names = [attack.partition(":")[0] for attack in demo.ATTACKS]
    for word in ("attack", "planted", "recall", *names, "clean", "Report: "):
        assert word in plain.out
    found = json.loads(run_cli("demo", "--out", out, "--json", "--seed", 1).out)
    assert [attack["attack"] for attack in found["attacks"]] == names
    for attack in found["attacks"]:
        assert attack["recall"] == attack["found"] / attack["planted"]
    planted = sum(attack["planted"] for attack in found["attacks"])
    assert found["clean"]["samples"] + planted == len(demo.CLASSES) * 30
    assert Path(found["report"]).is_file()


def test_only_a_demo_is_replaced(tmp_path: Path) -> None:
    """A folder that merely looks like one, with somebody's shards in it, stays."""
    mine = tmp_path / "corpus" / "mine.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    (tmp_path / "trusted").mkdir()
    for out in (tmp_path, mine):
        with pytest.raises(RunFolderError, match="give another --out"):
            demo._clear(out)
    assert run_cli("demo", "--out", tmp_path).code == 4
    assert mine.read_bytes() == b"precious"
    own = tmp_path / "own"
    demo._clear(own)
    (own / "corpus").mkdir()
    demo._clear(own)
    assert [path.name for path in own.iterdir()] == [demo.MARKER]
    (own / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds notes\.txt"):
        demo._clear(own)
