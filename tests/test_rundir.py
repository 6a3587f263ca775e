import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sanitize.errors import DiskFullError, InputError, RunFolderError, SanitizeError, UsageError
from sanitize.rundir import RunDir, create_array, disk_errors, write_atomic, write_table

CONFIG = {"corpus": {"shards": "a", "label": "cls"}, "proxy": {"seed": 0}}


def done(path: Path) -> Path:
    """A run folder with one finished stage."""
    with RunDir.create(path, CONFIG, {}) as run, run.stage("index") as facts:
        facts["rows"] = 3
    return path


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stage_is_timed_and_marked(tmp_path: Path) -> None:
    path = done(tmp_path / "deep" / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["config"] == CONFIG
    assert manifest["stages"]["index"]["rows"] == 3
    assert manifest["stages"]["index"]["seconds"] >= 0
    with RunDir.open(path) as run:
        assert run.is_done("index")
        run.forget("index", "never")
    with RunDir.open(path) as run:
        assert not run.is_done("index")


def test_a_stage_that_fails_is_not_marked(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", CONFIG, {}) as run:
        with pytest.raises(KeyError), run.stage("index"):
            raise KeyError
        assert not run.is_done("index")


def test_the_lock_keeps_others_out_until_the_end(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG, {}):
        for enter in (lambda: RunDir.create(tmp_path, CONFIG, {}), lambda: RunDir.open(tmp_path)):
            with pytest.raises(RunFolderError, match="in use by another sanitize process"):
                enter()
    with RunDir.open(tmp_path):
        pass


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    path = done(tmp_path / "run")
    other = {"corpus": {"shards": "a", "label": "txt"}, "proxy": {"seed": 0, "epochs": 5}}
    with pytest.raises(RunFolderError) as caught:
        RunDir.create(path, other, {})
    assert "corpus.label: 'cls' there, 'txt' now" in str(caught.value)
    assert "proxy.epochs: None there, 5 now" in str(caught.value)
    assert "shards" not in str(caught.value)
    with RunDir.create(path, CONFIG, {}) as run:  # and the lock was let go
        assert run.is_done("index")


def test_settings_can_be_corrected_while_nothing_is_finished(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG, {}):
        pass
    with RunDir.create(tmp_path, {"corpus": {"label": "txt"}}, {"sanitize": "1"}):
        pass
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"config": {"corpus": {"label": "txt"}}, "versions": {"sanitize": "1"}, "stages": {}}


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"not a run folder and not empty \(it holds notes.txt\)"):
        RunDir.create(tmp_path, CONFIG, {})
    with pytest.raises(InputError, match="not a run folder"):
        RunDir.open(tmp_path)
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        with pytest.raises(UsageError, match="is a file, or lies in one"):
            RunDir.create(out, CONFIG, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"config": {}}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    for enter in (lambda: RunDir.create(tmp_path, CONFIG, {}), lambda: RunDir.open(tmp_path)):
        with pytest.raises(RunFolderError, match=r"manifest[.]json is not"):
            enter()


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG, {}) as run:
        (tmp_path / "kept").mkdir()
        for name in ("a.npy.tmp", "kept/b.tar.tmp", "kept/b.tar"):
            (tmp_path / name).write_text("x")
        run.clear_temporary()
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == [".lock", "kept/b.tar", "manifest.json"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_come_back(tmp_path: Path) -> None:
    table = pa.table({"key": ["a", None], "x": pa.array([1, 2], pa.int32())})
    write_table(tmp_path / "t.parquet", table)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_arrays_have_their_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = create_array(tmp_path / "a.npy", (5, 1000), np.float32)
    array[3] = 7
    array.flush()
    assert np.load(tmp_path / "a.npy")[3].tolist() == [7] * 1000
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= 20_000
    assert create_array(tmp_path / "none.npy", (0, 3), np.uint8).shape == (0, 3)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        create_array(tmp_path / "b.npy", (5, 1000), np.float32)
    assert not (tmp_path / "b.npy").exists()


def test_troubles_of_the_disk_in_words(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"No space left.*What was finished before still stands; free"):
        with disk_errors(tmp_path):
            full()
    with pytest.raises(SanitizeError, match="elsewhere: Permission denied; check"):
        with disk_errors(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "elsewhere")
    with pytest.raises(FileNotFoundError):
        with disk_errors(tmp_path):
            raise FileNotFoundError(errno.ENOENT, "x")
