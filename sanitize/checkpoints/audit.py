"""`sanitize inspect` of a loaded checkpoint: the inspection, its report.html and its report.json."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sanitize
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import (
    METHODS,
    WITH_REFERENCES,
    InspectConfig,
    Inspection,
    inspect_classifier,
)
from sanitize.checkpoints.trigger_inversion import Triggers, predict, stamp
from sanitize.checkpoints.trusted import TrustedImages, to_pixels
from sanitize.errors import UsageError
from sanitize.progress import Progress
from sanitize.reporting.checkpoint_page import TriggerPictures, render
from sanitize.reporting.text import listed
from sanitize.rundir import disk_errors, write_atomic

HTML, JSON = "report.html", "report.json"
PICTURES = 8
"""Trusted images that a trigger is shown on."""
CLASSES_PICTURED, MOST_NAMED = 3, 5
"""Most classes over the threshold whose triggers are shown, and that the verdict names beside the first."""


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """What an inspection found and where it is written."""

    path: Path
    """report.html; report.json lies beside it."""
    verdict: str
    """One sentence."""
    backdoored: bool
    """Whether the score is over the threshold."""
    compared: bool
    """Whether there was anything to compare classes by; if not, there is no verdict."""
    score: float
    threshold: float
    suspected: str
    """Label of the class with the highest score, whatever the verdict."""
    facts: dict[str, Any] = field(repr=False)
    """All of report.json."""

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: JSON types only, no NaN."""
        return self.facts

    def summary(self) -> str:
        """The few lines that the command prints."""
        verdict = self.facts["verdict"]
        lines = [
            self.verdict,
            "",
            f"  score        {self.score:>8.2f}   threshold {self.threshold:.2f} ({verdict['method']})",
            f"  highest in   {self.suspected}",
            f"  how sure     {verdict['calibration']}",
            f"  seconds      {sum(self.facts['seconds'].values()):>8.1f}",
            *[f"  note         {note}" for note in self.facts["notes"]],
            "",
            f"Report: {self.path}",
        ]
        return "\n".join(lines)


def audit(
    classifier: Classifier,
    trusted: TrustedImages | None,
    config: InspectConfig,
    out: Path,
    source: str,
    progress: Progress,
    loading: Sequence[str] = (),
    words: Sequence[str] = (),
    references: Mapping[str, Classifier] | None = None,
) -> InspectReport:
    """Inspect a classifier and write report.html and report.json into a folder, which is made if need be.

    Args:
        source: the checkpoint as the user named it.
        loading: what was found out while it was loaded, in sentences.
        words: of a command line, what `sanitize repair` is given to load the same model and images; none:
            the checkpoint alone is known.
        references: networks known to be clean, by the name that the user gave.

    Raises:
        SanitizeError: as `inspect_classifier`; or the folder cannot be written.
    """
    _make_folder(out)
    for note in loading:
        progress.note(note)
    references = references or {}
    found = inspect_classifier(classifier, trusted, config, progress, references)
    facts = facts_of(found, classifier, trusted, config, source, loading, words, list(references))
    page = render(facts, [] if trusted is None else _pictures(found, classifier, trusted))
    with disk_errors(out):
        write_atomic(out / HTML, page.encode("utf-8"))
        write_atomic(out / JSON, json.dumps(facts, indent=1, allow_nan=False).encode("ascii"))
    return InspectReport(
        path=out / HTML,
        verdict=facts["verdict"]["sentence"],
        backdoored=found.verdict.backdoored,
        compared=found.verdict.compared,
        score=found.verdict.score,
        threshold=found.verdict.threshold,
        suspected=facts["verdict"]["suspected_label"],
        facts=facts,
    )


def _make_folder(out: Path) -> None:
    """Refuse, before the work is done, a folder that the report cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {out}: no folder can be made there ({error.strerror}); give another"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: no permission to write there; give another folder")


def facts_of(
    found: Inspection,
    classifier: Classifier,
    trusted: TrustedImages | None,
    config: InspectConfig,
    source: str,
    loading: Sequence[str],
    words: Sequence[str],
    references: Sequence[str],
) -> dict[str, Any]:
    """All of report.json: JSON types, None for what was not measured."""
    verdict = found.verdict
    label = classifier.label(verdict.suspected)
    unknown = "" if "--trusted" in words else " --trusted CLEAN"
    return {
        "verdict": {
            **dataclasses.asdict(verdict),
            "over": list(verdict.over),
            "over_labels": [classifier.label(class_id) for class_id in verdict.over],
            "suspected_label": label,
            "sentence": sentence(found, classifier),
            "next": _next(found, shlex.join(words or [source]) + unknown, bool(references)),
        },
        "scores": {name: _number(score) for name, score in found.scores.items()},
        "statistics": [
            _statistic(name, scores, classifier)
            for name, scores in found.class_scores.items()
            if name not in METHODS or METHODS[name] == (name,)
        ],
        "classes": [_class(found, classifier, class_id) for class_id in range(classifier.classes)],
        "triggers": {name: _success(triggers) for name, triggers in found.triggers.items()},
        "notes": found.notes,
        "model": {
            "source": source,
            "architecture": classifier.architecture,
            "loading": " ".join(loading),
            "classes": classifier.classes,
            "resolution": classifier.resolution,
            "mean": classifier.mean.flatten().tolist(),
            "std": classifier.std.flatten().tolist(),
            "accuracy": found.accuracy,
            "repaired_accuracy": found.repaired_accuracy,
            "trusted_images": None if trusted is None else len(trusted),
            "references": list(references),
        },
        "settings": {
            name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, dict)
        }
        | {f"inversion.{name}": value for name, value in dataclasses.asdict(config.inversion).items()},
        "seconds": {name: round(value, 2) for name, value in found.seconds.items()},
        "versions": {"sanitize": sanitize.__version__, "torch": torch.__version__},
    }


def sentence(found: Inspection, classifier: Classifier) -> str:
    """The verdict in words."""
    if found.verdict.backdoored:
        first, *others = (classifier.label(class_id) for class_id in found.verdict.over)
        are = "classes {} are" if len(others) > 1 else "class {} is"
        more = f"; {are.format(listed(others, MOST_NAMED))} over the threshold, too" if others else ""
        return f"This model looks backdoored, towards class {first}{more}"
    if not found.verdict.compared:
        return "The classes of this model could not be compared, so this is no verdict; see the notes"
    if found.verdict.method == "quick":
        return "The quick statistics see no sign of a backdoor"
    return "No class of this model stands out as the target of a backdoor"


def _next(found: Inspection, given: str, compared: bool) -> list[dict[str, str]]:
    """What to do now; `given` is what every command line here begins with."""
    if found.verdict.backdoored and found.verdict.method == "quick":
        return [
            {
                "text": "Do not deploy it as it is. The quick look is often wrong both ways: rebuild "
                "triggers and see what they look like:",
                "command": f"sanitize inspect {given}",
            }
        ]
    if found.verdict.backdoored:
        return [
            {
                "text": "Do not deploy it as it is. Look at what was rebuilt below: a meaningless mark "
                "speaks for a backdoor, the class's natural features speak against it."
            },
            {
                "text": "Prefer another model where there is one. Else repair a copy; what is left of the "
                "backdoor cannot be measured without its trigger, and inspecting the copy does not tell:",
                "command": f"sanitize repair {given} --out FIXED",
            },
        ]
    if found.verdict.method == "quick":
        return [
            {
                "text": "The quick look misses much. Rebuild triggers before you rely on it:",
                "command": f"sanitize inspect {given}",
            }
        ]
    more = {
        "text": "With three or more clean networks of the same classes it sees more: what is natural for a "
        "class is then taken off:",
        "command": f"sanitize inspect {given} --reference CLEAN_1 --reference CLEAN_2 --reference CLEAN_3",
    }
    return [more] * (found.verdict.method == WITH_REFERENCES and not compared) + [
        {
            "text": "This does not prove the model clean: see below what it cannot tell. Where a backdoor "
            "would do harm, repair a copy all the same: it takes minutes, says what it cost, and may end "
            "without one that kept its accuracy:",
            "command": f"sanitize repair {given} --out FIXED",
        }
    ]


def _statistic(name: str, scores: Any, classifier: Classifier) -> dict[str, Any]:
    return {
        "statistic": name,
        "largest": float(np.nanmax(scores)),
        "label": classifier.label(int(np.nanargmax(scores))),
    }


def _class(found: Inspection, classifier: Classifier, class_id: int) -> dict[str, Any]:
    scores = {name: _number(values[class_id]) for name, values in found.class_scores.items()}
    return {
        "class_id": class_id,
        "label": classifier.label(class_id),
        "score": scores[found.verdict.method],
        "scores": scores,
    }


def _success(triggers: Triggers) -> list[dict[str, Any]]:
    def value(values: Any, place: int) -> float | None:
        return None if values is None else _number(values[place])

    return [
        {
            "class_id": int(class_id),
            "success": _number(triggers.success[place]),
            "repaired_success": value(triggers.repaired_success, place),
            "repaired_kept": value(triggers.repaired_kept, place),
            "mask_size": float(triggers.mask[place].sum()),
            "l2": float(np.linalg.norm(triggers.pattern[place])),
        }
        for place, class_id in enumerate(triggers.classes)
    ]


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pictures(found: Inspection, classifier: Classifier, trusted: TrustedImages) -> list[TriggerPictures]:
    """Triggers of the classes over the threshold, or of the highest, on trusted images of other classes."""
    return [
        _picture(name, triggers, class_id, others, classifier)
        for class_id in found.verdict.over[:CLASSES_PICTURED] or (found.verdict.suspected,)
        for others in [_some_others(trusted, class_id)]
        for name, triggers in found.triggers.items()
        if class_id in triggers.classes
    ]


def _some_others(trusted: TrustedImages, class_id: int) -> Any:
    """(N, R, R, 3) images of other classes, spread over them."""
    others = trusted.take(np.flatnonzero(trusted.class_id != class_id))
    spread = np.argsort(np.random.default_rng(0).permutation(len(others)))[:PICTURES]
    return others.take(np.sort(spread)).pixels


def _picture(
    name: str, triggers: Triggers, class_id: int, before: Any, classifier: Classifier
) -> TriggerPictures:
    place = int(np.flatnonzero(triggers.classes == class_id)[0])
    strongest = float(triggers.mask[place].max())
    added = strongest == 0
    mask, pattern = triggers.tensors(place, torch.device("cpu"))
    grey = torch.full((1, *pattern.shape), 0.5)
    # what is added, or laid over the whole image, is often too faint to see
    magnified = max(1, int(0.5 / max(float(pattern.abs().max()), 1e-3) if added else 1 / strongest))
    strong = magnified * pattern if added else pattern
    stamped = stamp(to_pixels(before, torch.device("cpu")), mask, pattern, added)
    after = _images(stamped)
    return TriggerPictures(
        class_id=class_id,
        label=classifier.label(class_id),
        statistic=name,
        trigger=_images(stamp(grey, (magnified * mask).clamp(max=1), strong, added))[0],
        magnified=magnified,
        before=before,
        after=after,
        called=[classifier.label(int(class_id)) for class_id in predict(classifier, after)],
        success=float(triggers.success[place]),
        repaired_success=(
            None if triggers.repaired_success is None else float(triggers.repaired_success[place])
        ),
    )


def _images(pixels: torch.Tensor) -> Any:
    """(N, R, R, 3) uint8."""
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
