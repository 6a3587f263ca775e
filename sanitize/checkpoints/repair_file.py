"""`sanitize repair` of a loaded checkpoint: repair, measure before and after, write OUT and OUT.json.

Until both are written, what an interrupted run needs to go on lies in OUT.partial/.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sanitize
from sanitize.checkpoints.calibrate import calibrate
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.repair import RepairConfig, Repaired, repair_classifier, settings_of
from sanitize.checkpoints.retune import retune_check
from sanitize.checkpoints.trigger_inversion import (
    InversionConfig,
    evaluate,
    masked_triggers,
    smallest_working,
)
from sanitize.checkpoints.trusted import TrustedImages, split
from sanitize.errors import RunFolderError, TrainingError, UsageError
from sanitize.progress import Progress
from sanitize.rundir import _acquire, _differences, disk_errors, write_atomic

CONFIG, CALIBRATED, STATE = "config.json", "calibrated.json", "state.pt"
MOST_INVERTED = 50
"""Classes up to which triggers are rebuilt for all of them; with more the measure is left out."""

Save = Callable[[Mapping[str, torch.Tensor], Path], list[Path]]
"""(state dict of the repaired network, OUT) -> the files that were written."""


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What a repair did and where it is written."""

    path: Path
    """The fixed checkpoint; PATH.json lies beside it."""
    repaired: bool
    """False: no model was within the accuracy loss, and no checkpoint was written."""
    facts: dict[str, Any] = field(repr=False)
    """All of the JSON file."""

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file: JSON types only, no NaN."""
        return self.facts


def repair_file(
    classifier: Classifier,
    trusted: TrustedImages,
    config: RepairConfig,
    out: Path,
    source: str,
    save: Save,
    progress: Progress,
    *,
    with_calibration: bool = False,
    with_retune_check: bool = False,
) -> RepairReport:
    """Repair a loaded checkpoint and write the result; an interrupted run to the same `out` goes on.

    Args:
        source: the checkpoint as the user named it.
        save: writes a state dict in the checkpoint's format.

    Raises:
        UsageError: `out` is there already, or the facts of a repair that succeeded.
        RunFolderError: OUT.partial is of a repair with other settings, or in use.
        SanitizeError: as `repair_classifier`.
    """
    facts_path = out.with_name(out.name + ".json")
    for path in (out, facts_path):
        if path.exists() and not (path == facts_path and _came_to_nothing(path)):
            raise UsageError(f"{path} is there already; give another --out, or move it away")
    wanted = _identity(classifier, trusted, config, with_calibration, with_retune_check)
    with _partial(out.with_name(out.name + ".partial"), wanted) as partial:
        facts: dict[str, Any] = {"sanitize": sanitize.__version__, "source": source}
        if with_calibration:
            facts["calibration"] = _calibrated(classifier, trusted, config, partial, progress)
            config = replace(config, settings=facts["calibration"]["chosen"])
        try:
            found = repair_classifier(classifier, trusted, config, progress, partial / STATE)
        except TrainingError:  # there is nothing to go on from, and another method may be told the same OUT
            shutil.rmtree(partial)
            raise
        facts |= {**found.facts, "history": found.history}
        facts["inverted_trigger"] = inverted_trigger(classifier, found, trusted, config, progress)
        if with_retune_check:
            facts["retune_check"] = retune_check(classifier, trusted, config, progress)
        repaired = bool(found.facts["repaired"])
        with disk_errors(out):
            files = save(found.classifier.network.state_dict(), out) if repaired else []
            facts["files"] = [str(path) for path in files]
            write_atomic(facts_path, json.dumps(facts, indent=1, allow_nan=False).encode("ascii"))
        shutil.rmtree(partial)
    return RepairReport(path=out, repaired=repaired, facts=facts)


def _came_to_nothing(facts: Path) -> bool:
    """Whether this is what a repair without a result left, which another method may write over."""
    try:
        found = json.loads(facts.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("repaired") is False and "sanitize" in found


def inverted_trigger(
    original: Classifier, found: Repaired, trusted: TrustedImages, config: RepairConfig, progress: Progress
) -> dict[str, Any] | None:
    """The smallest trigger that Neural Cleanse rebuilds from the original, tried on both models.

    Returns:
        Its class, its success on held-out images of other classes before and after, and how many of these the
        repaired model calls the class without it; None for a head of more than MOST_INVERTED classes. Where
        no trigger works on half of the images, that of the one that works on most.
    """
    classes = range(original.classes)
    if len(classes) > MOST_INVERTED:
        progress.note(f"{len(classes)} classes: no triggers are rebuilt; see sanitize inspect --classes")
        return None
    work, held_out = split(trusted, config.held_out_ratio, config.seed)
    inversion = InversionConfig()
    with progress.stage("invert", inversion.steps * len(classes), "steps") as advance:
        triggers = masked_triggers(original, work, held_out, classes, inversion, config.seed, advance)
    smallest = smallest_working(triggers)
    if smallest is None:
        smallest = int(np.nanargmax(triggers.success))
    mask, pattern = triggers.tensors(smallest, original.mean.device)
    with_it, without_it = (
        evaluate(found.classifier, held_out, [smallest], shown[None], pattern[None], added=False)[0][0]
        for shown in (mask, torch.zeros_like(mask))
    )
    return {
        "class": original.label(smallest),
        "success_before": _number(triggers.success[smallest]),
        "success_after": _number(with_it),
        "untriggered_after": _number(without_it),
    }


def in_words(report: RepairReport) -> str:
    """The few lines that `sanitize repair` prints."""
    facts = report.facts
    change, error = 100 * facts["accuracy_change"], 100 * facts["accuracy_change_se"]
    limit = f"{100 * facts['max_accuracy_loss']:g} points"
    if report.repaired:
        first = (
            f"Repaired by {facts['method']}; kept step {facts['kept_step']}. That accuracy fell by "
            f"{limit} or less is {facts['confidence_within']:.0%} sure."
        )
    else:
        first = (
            f"Not repaired: every model of {facts['method']} clearly lost more than {limit}. Nothing was "
            "written; trust more images, or try another --method, --calibrate or a larger "
            "--max-accuracy-loss."
        )
    lines = [
        first,
        "",
        f"  held-out accuracy  {facts['before']['held_out_accuracy']:>7.1%} -> "
        f"{facts['after']['held_out_accuracy']:.1%}   ({change:+.1f} ± {error:.1f} points, "
        f"{facts['trusted']['held_out']} images)",
        f"  weights moved by   {facts['parameter_distance']['relative']:>7.1%} of their norm",
    ]
    if "suspected_triggers" in facts:
        none = "no trigger: changes of all classes instead, more may be left"
        lines.append(f"  suspected          {', '.join(_suspected(facts)) or none}")
    for other in facts["passed_over"]:
        instead = [name for name in _suspected(other) if name not in _suspected(facts)]
        cost = (
            "the loss was not finite" if "error" in other else f"{100 * other['accuracy_change']:+.1f} points"
        )
        lines.append(f"  tried as well      {', '.join(instead) or 'changes of all classes'} ({cost})")
    trigger = facts["inverted_trigger"]
    if trigger is not None and trigger["success_before"] is not None:
        lines.append(
            f"  rebuilt trigger    {trigger['success_before']:>7.1%} -> {trigger['success_after']:.1%}   "
            f"(towards {trigger['class']}; {trigger['untriggered_after']:.1%} without it)"
        )
    if "retune_check" in facts:
        check = facts["retune_check"]
        lines.append(
            f"  planted trigger    {check['planted_success']:>7.1%} -> {check['repaired_success']:.1%}, "
            f"after tuning on {check['poisoned_images']} poisoned images {check['retuned_success']:.1%} "
            f"(never planted: {check['never_planted_success']:.1%})"
        )
    files = facts["files"]
    return "\n".join([*lines, "", *files, f"Facts: {report.path}.json"])


def _suspected(facts: Mapping[str, Any]) -> list[str]:
    """The triggers that a repair suspected."""
    return [f"{one['kind']} towards {one['class']}" for one in facts["suspected_triggers"] or []]


def _calibrated(
    classifier: Classifier, trusted: TrustedImages, config: RepairConfig, partial: Path, progress: Progress
) -> dict[str, Any]:
    """Facts of the calibration, from an interrupted run if it got that far."""
    path = partial / CALIBRATED
    if path.exists():
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts
    facts = calibrate(classifier, trusted, config, progress).facts
    with disk_errors(partial):
        write_atomic(path, json.dumps(facts).encode())
    return facts


@contextmanager
def _partial(path: Path, wanted: dict[str, Any]) -> Iterator[Path]:
    """The locked folder of an unfinished repair, made or found."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = _acquire(path)
    try:
        config = path / CONFIG
        if config.exists():
            differences = _differences(json.loads(config.read_text()), wanted)
            if differences:
                raise RunFolderError(
                    f"{path} is of a repair with other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nGive another --out, or remove the folder"
                )
        with disk_errors(path):
            write_atomic(config, json.dumps(wanted, indent=1).encode())
        yield path
    finally:
        os.close(lock)


def _identity(
    classifier: Classifier,
    trusted: TrustedImages,
    config: RepairConfig,
    calibration: bool,
    retune: bool,
) -> dict[str, Any]:
    """What has to be equal for an interrupted run to go on."""
    weights, images = hashlib.sha256(), hashlib.sha256()
    for name, value in classifier.state_dict().items():
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    images.update(trusted.pixels.tobytes() + trusted.class_id.tobytes())
    work, _ = split(trusted, config.held_out_ratio, config.seed)
    settings = settings_of(config.method, classifier.classes, len(work), config.settings)
    return {
        "sanitize": sanitize.__version__,
        **dataclasses.asdict(config),
        "settings": dataclasses.asdict(settings),
        "calibrate": calibration,
        "retune_check": retune,
        "checkpoint_sha256": weights.hexdigest(),
        "trusted_sha256": images.hexdigest(),
    }


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
