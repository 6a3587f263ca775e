"""Find poisoned samples in WebDataset image corpora before training on them.

    import sanitize

    report = sanitize.scan("shards/", trusted="clean/", out="run")
    print(report.verdict, report.flagged, report.path)

The functions have the names and options of the commands; errors are in ``sanitize.errors``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sanitize.progress import Progress
    from sanitize.reporting.build import Report

__version__ = "0.1.0"
__all__ = ["filter", "report", "scan"]


def scan(
    shards: str | Path,
    *,
    trusted: str | Path,
    out: str | Path = "sanitize-run",
    label: str = "cls",
    resolution: int | None = None,
    allow_pipe: bool = False,
    proxy: str = "auto",
    epochs: int = 20,
    device: str = "auto",
    trajectory: str = "eval",
    seed: int = 0,
    method: str = "combined",
    alpha: float | None = None,
    reject: float | None = None,
    class_cap: float | None = None,
    no_class_cap: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Scan a corpus: ``sanitize scan``. A run that was interrupted in `out` goes on.

    Args:
        shards: folder, glob, brace list, ``::``-joined, ``@list.txt`` or fsspec URL.
        trusted: small clean subset with the same labels, in the same form; at least 50 samples.
        out: run folder, made if it is not there.
        label: ``cls``, ``txt`` or ``json:path.to.field``.
        resolution: side of the proxy images in pixels; None: 32 for small images, else 64.
        allow_pipe: run the commands of ``pipe:`` shards.
        proxy: ``auto``, ``small`` or a torchvision constructor such as ``resnet18``.
        epochs: epochs of proxy training.
        device: ``auto``, ``cpu`` or ``cuda``.
        trajectory: ``eval`` (losses after each epoch) or ``online`` (training-time losses, cheaper).
        seed: of initialisation, order and scores.
        method: how samples are scored; see ``sanitize scan --help``.
        alpha: share of clean samples that may be lost; default 0.05 unless reject is given.
        reject: share of the corpus to flag instead; ``badloss``, ``abl`` and others default to
            the share they were published with.
        class_cap: largest share of a class that may be flagged; None: 0.5.
        no_class_cap: flag whatever the scores say.
        progress: where to show progress; None: nowhere. ``sanitize.progress.for_stderr()`` is the command's.

    Returns:
        The report: verdict, counts, path of report.html, and all facts as a dict.

    Raises:
        sanitize.errors.SanitizeError: with a message that says what to do.
    """
    from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
    from sanitize.pipeline import run_scan

    config = ScanConfig(
        corpus=CorpusConfig(
            shards=str(shards),
            trusted=str(trusted),
            label=label,
            resolution=resolution,
            allow_pipe=allow_pipe,
        ),
        proxy=ProxyConfig(proxy=proxy, epochs=epochs, device=device, trajectory=trajectory, seed=seed),
        decision=DecisionConfig.choose(method, alpha, reject, class_cap, no_class_cap),
    )
    return run_scan(config, Path(out), progress)


def filter(
    run: str | Path,
    *,
    method: str | None = None,
    alpha: float | None = None,
    reject: float | None = None,
    class_cap: float | None = None,
    no_class_cap: bool = False,
    allow_pipe: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make a new decision, shards and report from a finished run: ``sanitize filter``.

    Trains only a second model that the method asks for and the run does not have.

    Args:
        run: run folder of a scan.
        method: None: the method of the scan.
        alpha: as for `scan`.
        reject: as for `scan`.
        class_cap: largest share of a class that may be flagged; None: that of the scan.
        no_class_cap: flag whatever the scores say.
        allow_pipe: run the commands of ``pipe:`` shards.
        progress: as for `scan`.

    Raises:
        sanitize.errors.SanitizeError: with a message that says what to do.
    """
    from sanitize.config import DecisionConfig
    from sanitize.pipeline import decision_of, filter_run

    scanned = decision_of(Path(run))
    decision = DecisionConfig.choose(
        method or scanned.method, alpha, reject, class_cap, no_class_cap, scanned.class_cap
    )
    return filter_run(Path(run), decision, allow_pipe, progress)


def report(run: str | Path) -> Report:
    """Build report.html and report.json of a finished run again: ``sanitize report``.

    Raises:
        sanitize.errors.SanitizeError: with a message that says what to do.
    """
    from sanitize.pipeline import rebuild_report

    return rebuild_report(Path(run))
