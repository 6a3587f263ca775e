"""Reference networks: clean classifiers of the same classes, that a checkpoint is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sanitize.checkpoints.anomalies import Scores, centred, compares
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.load import LoadConfig, load_classifier, settled
from sanitize.checkpoints.repair import check, parameter_distance
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.checkpoints.tuning import accuracy
from sanitize.errors import InputError, SanitizeError, UsageError

RELATED = 0.5
"""Distance of the parameters, in norms of the checkpoint's, below which one network descends from the other:
small networks of the same recipe and other seeds are 1.1 apart."""
FEWEST = 3
"""References that show how far clean networks differ."""
WEAK = 0.1
"""Accuracy below the model's from which on a reference is called weak."""


def load_references(
    config: LoadConfig, paths: Sequence[Path], classifier: Classifier, trusted: TrustedImages
) -> tuple[dict[str, Classifier], list[str]]:
    """Read the networks that the user names, with the options of the checkpoint.

    Args:
        config: of the checkpoint.
        classifier: the checkpoint's.
        trusted: at its resolution.

    Returns:
        The classifiers by the names given, and what was found out about them, in sentences.

    Raises:
        UsageError: a path that was given before, or is the checkpoint.
        SanitizeError: as `load_classifier` and `check_reference`, with the path in front.
    """
    seen = [config.checkpoint.resolve()]
    found, notes = {}, []
    for path in paths:
        if path.resolve() in seen:
            raise UsageError(f"--reference {path} was given before; give networks that were trained apart")
        seen.append(path.resolve())
        try:
            loaded = load_classifier(replace(config, checkpoint=path))
            check_reference(loaded.classifier, classifier)
            loaded = settled(loaded, trusted)
        except SanitizeError as error:
            raise type(error)(f"--reference {path}: {error}") from error
        found[str(path)] = loaded.classifier
        notes += [f"reference {path}: {note}" for note in loaded.notes]
    return found, notes


def check_references(
    references: Mapping[str, Classifier], classifier: Classifier, trusted: TrustedImages
) -> None:
    """Refuse references that cannot be compared with the model, by name.

    Raises:
        InputError: as `check_reference`, or a network that makes no sense.
    """
    for name, reference in references.items():
        try:
            check_reference(reference, classifier)
            check(reference, trusted)
        except InputError as error:
            raise InputError(f"reference {name}: {error}") from error
    for (one, first), (other, second) in itertools.combinations(references.items(), 2):
        if distance(first, second) == 0:
            raise InputError(f"references {one} and {other} are the same network; give ones trained apart")


def check_reference(reference: Classifier, classifier: Classifier) -> None:
    """Refuse one that cannot be compared with the model.

    Raises:
        InputError: other classes, another resolution, or the model's own weights.
    """
    if reference.classes != classifier.classes:
        raise InputError(f"it has {reference.classes} classes, the checkpoint {classifier.classes}")
    for place in range(classifier.classes):
        theirs, ours = reference.label(place), classifier.label(place)
        if theirs != ours:
            raise InputError(
                f"its output {place} is {theirs!r}, the checkpoint's {ours!r}; --class-names names the "
                "outputs of all of them, where they are in the same order"
            )
    if reference.mean.device != classifier.mean.device:
        raise InputError(f"it is on {reference.mean.device}, the checkpoint on {classifier.mean.device}")
    if reference.resolution != classifier.resolution:
        raise InputError(
            f"it takes {reference.resolution} px, the checkpoint {classifier.resolution}; give one of the "
            "same resolution, or --resolution for all"
        )
    if distance(reference, classifier) == 0:
        raise InputError("it has the very weights of the checkpoint; give a network that was trained apart")


def distance(reference: Classifier, classifier: Classifier) -> float:
    """Of the parameters, in norms of the checkpoint's; infinite between different networks."""
    shapes = [[tuple(value.shape) for value in one.parameters()] for one in (reference, classifier)]
    if shapes[0] != shapes[1]:
        return float("inf")
    with torch.no_grad():
        return parameter_distance(classifier, reference)["relative"]


def doubts(
    references: Mapping[str, Classifier], classifier: Classifier, held_out: TrustedImages
) -> list[str]:
    """What weakens a comparison with these references, in sentences."""
    model_accuracy = accuracy(classifier, held_out)
    notes = []
    for name, reference in references.items():
        apart, own = distance(reference, classifier), accuracy(reference, held_out)
        if apart < RELATED:
            notes.append(
                f"Reference {name} descends from the same weights as the checkpoint (they are {apart:.0%} of "
                "their norm apart): a backdoor that both have is not seen. Give one that was trained apart."
            )
        if apart == float("inf"):
            notes.append(
                f"Reference {name} has other parameters, {reference.architecture}: what is natural for "
                "another network need not be for the model. This was not measured."
            )
        if own < model_accuracy - WEAK:
            notes.append(
                f"Reference {name} gets {own:.0%} of the held-out trusted images right, the model "
                f"{model_accuracy:.0%}: what is natural for it need not be for the model. Check the order of "
                "its classes, or leave it out."
            )
    for (one, first), (other, second) in itertools.combinations(references.items(), 2):
        if distance(first, second) < RELATED:
            notes.append(
                f"References {one} and {other} descend from the same weights: they count twice, and how far "
                "clean networks differ is underrated."
            )
    return notes


def natural_scores(
    own: Mapping[str, Scores], references: Sequence[Mapping[str, Scores]], parts: Sequence[str]
) -> Scores:
    """(C,) what the mean of some statistics, each less its median, is on average in the references.

    A statistic that has nothing to compare with, and is 0 for all classes, in a reference is left out of its
    mean. Where that is so in the model, or in all but one or two references, nothing is natural: no evidence
    is taken off, and none is made.
    """
    means = []
    for part in parts:
        known = [centred(one[part]) for one in references if compares(one[part])]
        enough = len(known) >= FEWEST and compares(own[part])
        means.append(np.mean(known, axis=0) if enough else 0 * own[part])
    natural: Scores = np.mean(means, axis=0)
    return natural
