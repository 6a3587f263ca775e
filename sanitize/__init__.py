"""Find poisoned samples in WebDataset image corpora, and backdoors in trained classifiers.

    import sanitize

    report = sanitize.scan("shards/", trusted="clean/", out="run")
    print(report.verdict, report.flagged, report.path)

The functions have the names and options of the commands; errors are in ``sanitize.errors``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sanitize.checkpoints.audit import InspectReport
    from sanitize.checkpoints.load import LoadConfig
    from sanitize.checkpoints.repair_file import RepairReport
    from sanitize.progress import Progress
    from sanitize.reporting.build import Report

__version__ = "0.1.0"
__all__ = ["filter", "inspect", "repair", "report", "scan"]


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
        alpha: largest share of clean samples that may be lost, kept with a confidence of 90 %;
            default 0.07 unless reject is given.
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
        alpha: as for `scan`; with neither, and the method of the scan, what the scan was told.
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
    if alpha is None and reject is None and method in (None, scanned.method):
        alpha, reject = scanned.alpha, scanned.reject
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


def inspect(
    checkpoint: str | Path,
    *,
    trusted: str | Path | None = None,
    out: str | Path = "sanitize-inspect",
    method: str = "combined",
    classes: str | None = None,
    references: Sequence[str | Path] = (),
    arch: str = "auto",
    class_names: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resolution: int | None = None,
    label: str = "cls",
    device: str = "auto",
    seed: int = 0,
    allow_pipe: bool = False,
    progress: Progress | None = None,
) -> InspectReport:
    """Look for a backdoor in a trained classifier: ``sanitize inspect``.

    Args:
        checkpoint: ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` or folder of transformers or open_clip.
        trusted: shards of clean labelled images; None only for the method ``quick``.
        out: folder for report.html and report.json, made if it is not there.
        method: ``combined``, ``universal-changes``, ``calibrated-trigger-inversion``, ``neural-cleanse`` or
            ``quick``.
        classes: labels joined by commas, or ``top:20``; None rebuilds triggers for all classes.
        references: three or more classifiers of the same classes that are known to be clean, of the same
            architecture and preprocessing; only with the method ``combined``.
        arch: ``auto``, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER`` or ``package.module:factory``.
        class_names: labels in the order of the head; None: the trusted labels are class numbers.
        prompts: for a CLIP model, with ``{}`` for the label.
        mean: of each channel, of pixels in [0, 1]; None: as the architecture has it.
        std: likewise.
        resolution: side in pixels that the model takes.
        label: ``cls``, ``txt`` or ``json:path.to.field``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of the split of the trusted images, the internal repair and the first triggers.
        allow_pipe: run the commands of ``pipe:`` shards.
        progress: as for `scan`.

    Returns:
        The report: verdict, score, suspected class, path of report.html, and all facts as a dict.

    Raises:
        sanitize.errors.SanitizeError: with a message that says what to do.
    """
    from dataclasses import replace

    from sanitize.checkpoints.audit import audit
    from sanitize.checkpoints.inspect import InspectConfig, check_asked, parse_classes
    from sanitize.checkpoints.load import load_classifier, load_with_trusted
    from sanitize.checkpoints.references import load_references
    from sanitize.progress import Silent

    config = InspectConfig(method=method, seed=seed)
    check_asked(method, trusted=trusted is not None, references=len(references))
    wanted = _load_config(checkpoint, arch, class_names, prompts, mean, std, resolution, device)
    if trusted is None:
        loaded, images = load_classifier(wanted), None
    else:
        loaded, images = load_with_trusted(wanted, str(trusted), label, allow_pipe=allow_pipe)
    classifier, notes = loaded.classifier, list(loaded.notes)
    config = replace(config, classes=parse_classes(classes, classifier))
    clean = None
    if images is not None:
        clean, said = load_references(wanted, [Path(path) for path in references], classifier, images)
        notes += said
    words = wanted.words()
    if trusted is not None:
        words += ["--trusted", str(trusted)]
    if label != "cls":
        words += ["--label", label]
    if allow_pipe:
        words.append("--allow-pipe")
    return audit(
        classifier, images, config, Path(out), str(checkpoint), progress or Silent(), notes, words, clean
    )


def repair(
    checkpoint: str | Path,
    *,
    trusted: str | Path,
    out: str | Path,
    method: str = "pivotal-unlearning",
    max_accuracy_loss: float = 0.02,
    calibrate: bool = False,
    retune_check: bool = False,
    arch: str = "auto",
    class_names: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resolution: int | None = None,
    label: str = "cls",
    device: str = "auto",
    seed: int = 0,
    allow_pipe: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Take a backdoor out of a trained checkpoint: ``sanitize repair``. An interrupted run to `out` goes on.

    Args:
        checkpoint: a file, or a folder of transformers or open_clip; never written to.
        trusted: clean images with the model's labels, in the form of a scan's; two or more a class.
        out: new checkpoint in the input's format; OUT.json with all facts lies beside it.
        method: see ``sanitize repair --help``.
        max_accuracy_loss: how far held-out accuracy may fall, as a fraction; one standard error more,
            up to twice as much, passes.
        calibrate: choose the method's settings on a backdoor planted in a copy.
        retune_check: plant a backdoor in a copy, repair it, and try to bring it back.
        arch: ``auto``, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER`` or ``package.module:factory``.
        class_names: labels in the order of the head; None: the trusted labels are class numbers.
        prompts: for a CLIP model, with ``{}`` for the label.
        mean: of each channel, of pixels in [0, 1].
        std: likewise.
        resolution: side of the images in pixels.
        label: ``cls``, ``txt`` or ``json:path.to.field``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of the split, the order of the images, and what a method draws.
        allow_pipe: run the commands of ``pipe:`` shards.
        progress: as for `scan`.

    Raises:
        sanitize.errors.SanitizeError: with a message that says what to do.
    """
    from sanitize.checkpoints.load import check_output, load_with_trusted, save
    from sanitize.checkpoints.repair import RepairConfig
    from sanitize.checkpoints.repair_file import repair_file
    from sanitize.progress import Silent

    progress = progress or Silent()
    config = RepairConfig(method=method, max_accuracy_loss=max_accuracy_loss, seed=seed)
    wanted = _load_config(checkpoint, arch, class_names, prompts, mean, std, resolution, device)
    loaded, images = load_with_trusted(wanted, str(trusted), label, allow_pipe=allow_pipe)
    check_output(loaded, Path(out))
    for note in loaded.notes:
        progress.note(note)
    return repair_file(
        loaded.classifier,
        images,
        config,
        Path(out),
        str(checkpoint),
        lambda state, path: save(loaded, state, path),
        progress,
        with_calibration=calibrate,
        with_retune_check=retune_check,
    )


def _load_config(
    checkpoint: str | Path,
    arch: str,
    class_names: Sequence[str] | None,
    prompts: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resolution: int | None,
    device: str,
) -> LoadConfig:
    from sanitize.checkpoints.load import LoadConfig

    return LoadConfig(
        checkpoint=Path(checkpoint),
        arch=arch,
        class_names=None if class_names is None else tuple(class_names),
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        resolution=resolution,
        device=device,
        **({} if prompts is None else {"prompts": tuple(prompts)}),
    )
