import io
import os
import pty
import re
import sys
import threading
import time

import pytest

from sanitize import progress
from sanitize.progress import Bars, PlainLines, Silent, for_stderr


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_plain_lines_are_few_and_say_what_is_left(clock: Clock) -> None:
    stream = io.StringIO()
    with PlainLines(stream).stage("train", 1000, "samples") as advance:
        for _ in range(100):
            clock.now += 0.25
            advance(10)
    assert stream.getvalue().splitlines() == [
        "train: 40 %, 40 samples/s, 15 s left",
        "train: 80 %, 40 samples/s, 5 s left",
        "train: done in 25.0 s, 40 samples/s",
    ]


def test_bytes_are_megabytes_and_empty_stages_are_fine(clock: Clock) -> None:
    stream = io.StringIO()
    with PlainLines(stream).stage("index", 0, "B"):
        pass
    with PlainLines(stream).stage("write", 5_000_000, "B") as advance:
        clock.now += 2
        advance(5_000_000)
    assert stream.getvalue() == "index: done in 0.0 s, 0 MB/s\nwrite: done in 2.0 s, 2 MB/s\n"


def test_a_stage_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), PlainLines(stream).stage("train", 10, "samples"):
        raise KeyError
    assert stream.getvalue() == ""


def test_silence() -> None:
    with Silent().stage("index", 10, "B") as advance:
        advance(10)
    Silent().note("nothing")


def test_bars_on_a_terminal() -> None:
    """Real pseudo-terminal: a bar, a rate, the time left, and notes as they are."""
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                return
            if not chunk:
                return
            seen.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        bars = Bars(terminal)
        bars.note("[bold]a [/] key")
        with bars.stage("decode", 200, "images") as advance:
            for _ in range(4):
                advance(50)
                time.sleep(0.12)
    reader.join(5)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "[bold]a [/] key" in text
    assert "decode" in text
    assert "100 %" in text
    assert "images/s" in text
    assert "left" in text
    assert "\u2501" in text  # the bar itself


def test_stderr_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(for_stderr(), PlainLines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(for_stderr(), Bars)
