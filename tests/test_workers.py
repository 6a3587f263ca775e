"""Worker processes end with the process that started them, and do not keep its lock."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from sanitize.corpus.sources import _die_with_parent, each_shard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")

PARENT = """
import fcntl, os, sys, time
from pathlib import Path
from sanitize.corpus.sources import each_shard

FOLDER = Path(sys.argv[1])

def slow(job):
    (FOLDER / f"{os.getpid()}.pid").touch()
    time.sleep(60)

if __name__ == "__main__":
    lock = os.open(FOLDER / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    list(each_shard(slow, [1, 2, 3], workers=2, remote=sys.argv[2] == "spawn"))
"""


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:  # a zombie that nobody waits for has ended, too
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_free(path: Path) -> bool:
    lock = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_parent_takes_its_workers_and_its_lock(tmp_path: Path, start: str, number: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), start], env=environment, start_new_session=True
    )
    try:
        assert wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 60)
        workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
        assert all(map(is_running, workers))
        assert not is_free(tmp_path / ".lock")
        parent.send_signal(number)
        assert parent.wait(10) == -number
        assert wait_for(lambda: is_free(tmp_path / ".lock"), 5)
        assert wait_for(lambda: not any(map(is_running, workers)), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # the workers, too, should they have outlived it


def test_a_worker_whose_parent_is_gone_already_ends() -> None:
    for parent, status in ((os.getpid(), 0), (1 << 30, 1)):
        worker = get_context("fork").Process(target=_die_with_parent, args=(parent,))
        worker.start()
        worker.join(10)
        assert worker.exitcode == status


def brief(job: int) -> int:
    time.sleep(0.05)
    return job


def test_shards_can_be_worked_on_from_any_thread() -> None:
    """The signal comes when the thread that forked ends: it must be the one that waits for the results."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(each_shard(brief, range(6), workers=2)))
    thread.start()
    thread.join(30)
    assert found == list(range(6))
