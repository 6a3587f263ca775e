"""Progress on stderr: bars with rates and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

Advance = Callable[[int], None]


Stage = AbstractContextManager[Advance]


class Progress(Protocol):
    """What a stage needs: ``with progress.stage("index", total, "B") as advance: advance(n)``."""

    def stage(self, name: str, total: int, unit: str) -> Stage: ...

    def note(self, text: str) -> None: ...


class Silent:
    """Shows nothing: the default of the Python API."""

    @contextmanager
    def _stage(self) -> Iterator[Advance]:
        yield lambda n: None

    def stage(self, name: str, total: int, unit: str) -> Stage:
        return self._stage()

    def note(self, text: str) -> None:
        pass


class PlainLines:
    """At most one line every ten seconds while a stage runs, and one when it ends."""

    def __init__(self, stream: TextIO, every_s: float = 10.0) -> None:
        self._stream, self._every_s = stream, every_s

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stage(self, name: str, total: int, unit: str) -> Stage:
        return self._stage(name, total, unit)

    @contextmanager
    def _stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        began = shown = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, shown
            done += n
            now = time.monotonic()
            if now - shown >= self._every_s and done < total:
                shown = now
                left_s = (now - began) / max(done, 1) * (total - done)
                share = f"{100 * done / max(total, 1):.0f} %"
                self.note(f"{name}: {share}, {_rate(done, now - began, unit)}, {left_s:.0f} s left")

        yield advance
        spent_s = time.monotonic() - began
        self.note(f"{name}: done in {spent_s:.1f} s, {_rate(done, spent_s, unit)}")


class Bars:
    """Rich progress bars."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def stage(self, name: str, total: int, unit: str) -> Stage:
        return self._stage(name, total, unit)

    @contextmanager
    def _stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]:>16}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        began = time.monotonic()
        done = 0
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total, rate="")

            def advance(n: int) -> None:
                nonlocal done
                done += n
                bars.update(task, completed=done, rate=_rate(done, time.monotonic() - began, unit))

            yield advance


def _rate(done: int, spent_s: float, unit: str) -> str:
    per_s = done / max(spent_s, 1e-9)
    if unit == "B":
        return f"{per_s / 1e6:.0f} MB/s"
    return f"{per_s:,.0f} {unit}/s"


def for_stderr() -> Progress:
    """Bars if stderr is a terminal, plain lines otherwise."""
    return Bars(sys.stderr) if sys.stderr.isatty() else PlainLines(sys.stderr)
