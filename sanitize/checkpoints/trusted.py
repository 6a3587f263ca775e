"""The trusted images of `inspect` and `repair`, in memory at the model's resolution."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sanitize.checkpoints.classifier import Classifier
from sanitize.corpus.labels import BadLabelError, label_extension, read_label
from sanitize.corpus.pixels import ImageError, decode
from sanitize.corpus.shards import END, IMAGE_EXTENSIONS, Sample, group, walk
from sanitize.corpus.sources import Buffer, expand, open_tar
from sanitize.errors import InputError

NAMED = 5
"""Most labels that a message names before it counts."""
CPU_PIXELS = 640 * 32 * 32
"""Pixels that go through a network at once on a CPU; more is no faster."""
GPU_BATCH = 256
"""Images that are judged at once on a CUDA device."""


@dataclass(frozen=True, kw_only=True)
class TrustedImages:
    """Labelled clean images, as the model is given them."""

    pixels: npt.NDArray[np.uint8]
    """(N, R, R, 3)"""
    class_id: npt.NDArray[np.int64]
    """(N,) outputs of the model's head."""

    def __len__(self) -> int:
        return len(self.class_id)

    def take(self, rows: npt.NDArray[np.intp]) -> TrustedImages:
        """Some of them, in that order."""
        return TrustedImages(pixels=self.pixels[rows], class_id=self.class_id[rows])

    def evenly(self, most: int) -> TrustedImages:
        """All of them, or so many evenly spaced ones."""
        return self.take(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.intp))


def to_pixels(images: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """(B, R, R, 3) uint8 images as (B, 3, R, R) float32 in [0, 1] on a device."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def split(trusted: TrustedImages, held_out_ratio: float, seed: int) -> tuple[TrustedImages, TrustedImages]:
    """Images to work on and images to judge on, class by class; each class has at least one in both.

    Args:
        trusted: at least two images a class.
        held_out_ratio: share to judge on, between 0 and 1.
        seed: of the draw.

    Returns:
        The larger part, and the part that is held out.
    """
    rng = np.random.default_rng([seed, 11])
    held_out = np.zeros(len(trusted), bool)
    for class_id in np.unique(trusted.class_id):
        own = rng.permutation(np.flatnonzero(trusted.class_id == class_id))
        held_out[own[: min(len(own) - 1, max(1, round(held_out_ratio * len(own))))]] = True
    return trusted.take(np.flatnonzero(~held_out)), trusted.take(np.flatnonzero(held_out))


def load_trusted(
    shards: str, label: str, classifier: Classifier, *, allow_pipe: bool = False
) -> tuple[TrustedImages, list[str]]:
    """Read the trusted images at the model's resolution, with the outputs that their labels stand for.

    A label is the name of a class where the model has names. Where it has none, or no label is a name and
    all are numbers, it is the number of an output. Samples without a usable label or image are left out.

    Args:
        shards: in any form that a scan takes.
        label: ``cls``, ``txt`` or ``json:path.to.field``.

    Returns:
        The images, and sentences about samples that were left out and classes without images.

    Raises:
        InputError: unreadable shards, nothing usable, labels outside the head, one class, or a class with
            fewer than two images.
    """
    labels: list[str] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    unusable: Counter[str] = Counter()
    for text, image in _labelled(shards, label, allow_pipe, unusable):
        try:
            pixels.append(decode(image, classifier.resolution))
            labels.append(text)
        except ImageError as error:
            unusable[str(error)] += 1
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(unusable.items()))
    if not labels:
        raise InputError(
            f"--trusted {shards}: no sample with an image and a label in .{label_extension(label)}"
            + (f" ({left_out})" if left_out else "")
            + "; check --label"
        )
    trusted = TrustedImages(pixels=np.stack(pixels), class_id=_outputs(labels, classifier))
    notes = [f"{unusable.total()} trusted samples were left out ({left_out})"] if unusable else []
    return trusted, notes + _check_counts(trusted, classifier)


def _labelled(
    shards: str, label: str, allow_pipe: bool, unusable: Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """Label text and encoded image of every sample that has both; counts the others."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as scratch:
        for source in expand(shards, allow_pipe=allow_pipe):
            with open_tar(source, Path(scratch)) as buffer:
                entries = walk(buffer)
                end = next((i for i, entry in enumerate(entries) if entry.kind == END), len(entries))
                for sample in group(entries[:end])[0]:
                    found = _label_and_image(buffer, sample, label)
                    if isinstance(found, str):
                        unusable[found] += 1
                    else:
                        yield found


def _label_and_image(buffer: Buffer, sample: Sample, label: str) -> tuple[str, bytes] | str:
    """Both, or the status of the index that says why not."""
    if sample.status != "ok":
        return sample.status
    image = IMAGE_EXTENSIONS & sample.members.keys()
    if len(image) != 1:
        return "two-images" if image else "no-image"
    extension = label_extension(label)
    own = {
        name: bytes(buffer[entry.data : entry.data + entry.size])
        for name, entry in sample.members.items()
        if name == extension or name in image
    }
    try:
        text = read_label(label, own)
    except BadLabelError:
        return "bad-label"
    return "no-label" if text is None else (text, own[min(image)])


def _outputs(labels: Sequence[str], classifier: Classifier) -> npt.NDArray[np.int64]:
    """(N,) outputs of the head that label texts stand for."""
    by_name = _names(classifier)
    distinct = set(labels)
    if distinct.isdisjoint(by_name) and all(text.isascii() and text.isdigit() for text in distinct):
        by_name = {str(number): number for number in range(classifier.classes)}
    outside = Counter(text for text in labels if text not in by_name)
    if outside:
        raise InputError(_outside(outside, classifier))
    found = [by_name[text] for text in labels]
    ambiguous = next((text for text in labels if by_name[text] < 0), None)
    if ambiguous is not None:
        raise InputError(f"two outputs of the model are called {ambiguous}; use their numbers as labels")
    return np.array(found, np.int64)


def _names(classifier: Classifier) -> dict[str, int]:
    """Output by class name, -1 where several outputs have the name; empty for a model without names."""
    names = classifier.class_names or []
    times = Counter(names)
    return {name: number if times[name] == 1 else -1 for number, name in enumerate(names)}


def _outside(outside: Counter[str], classifier: Classifier) -> str:
    listed = ", ".join(f"{text} ({count})" for text, count in outside.most_common(NAMED))
    more = f" and {len(outside) - NAMED} more labels" if len(outside) > NAMED else ""
    has = f"its {classifier.classes} outputs are 0 to {classifier.classes - 1}"
    if classifier.class_names is not None:
        first = ", ".join(classifier.class_names[:NAMED])
        has = f"its {classifier.classes} classes are {first}{', …' if classifier.classes > NAMED else ''}"
    return (
        f"{outside.total()} trusted images have labels outside the model's head: {listed}{more}; {has}. "
        "Give --class-names in the order of its outputs, or another --label"
    )


def _check_counts(trusted: TrustedImages, classifier: Classifier) -> list[str]:
    counts = np.bincount(trusted.class_id, minlength=classifier.classes)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        raise InputError(
            f"all {len(trusted)} trusted images are of class {classifier.label(int(present[0]))}; give "
            "images of two classes, better of all"
        )
    few = present[counts[present] < 2]
    if len(few):
        listed = ", ".join(classifier.label(int(class_id)) for class_id in few[:NAMED])
        raise InputError(
            f"{len(few)} classes have one trusted image ({listed}{', …' if len(few) > NAMED else ''}); two a "
            "class are needed, one to work on and one to judge on"
        )
    absent = classifier.classes - len(present)
    return [f"{absent} of {classifier.classes} classes have no trusted image"] if absent else []


def refuse_constant(classifier: Classifier, trusted: TrustedImages) -> list[str]:
    """Refuse a model that tells nothing apart, and doubt one that is hardly better than chance.

    Returns:
        A sentence with its accuracy on the trusted images, and a warning where that is near chance.

    Raises:
        InputError: one class, or the same logits, for every trusted image; logits that are not finite.
    """
    logits = logits_of(classifier, trusted)
    hints = "check --arch, --mean, --std and --resolution"
    if not np.isfinite(logits).all():
        raise InputError(f"the model's logits are not finite on trusted images; {hints}")
    called = logits.argmax(axis=1)
    if np.ptp(logits, axis=0).max() <= 1e-6 * max(1.0, float(np.abs(logits).max())):
        raise InputError(f"a constant model: its logits are the same for every trusted image; {hints}")
    if len(np.unique(called)) == 1:
        raise InputError(
            f"a constant model: it calls all {len(trusted)} trusted images "
            f"{classifier.label(int(called[0]))}; {hints}"
        )
    accuracy = float((called == trusted.class_id).mean())
    notes = [f"accuracy on the {len(trusted)} trusted images: {accuracy:.1%}"]
    chance = float(np.bincount(trusted.class_id).max() / len(trusted))
    if accuracy <= chance + 3 * np.sqrt(chance * (1 - chance) / len(trusted)):
        notes.append(
            f"warning: that is no better than always naming the largest class ({chance:.1%}), so "
            f"that nothing below can be relied on; {hints}, and the order of --class-names"
        )
    return notes


def images_at_once(device: torch.device, side: int) -> int:
    """How many images of that side are judged together."""
    return GPU_BATCH if device.type == "cuda" else max(1, CPU_PIXELS // side**2)


def logits_of(classifier: Classifier, trusted: TrustedImages) -> npt.NDArray[np.float32]:
    """(N, C) float32 logits, in eval mode."""
    training = classifier.training
    classifier.eval()
    device = classifier.mean.device
    size = images_at_once(device, trusted.pixels.shape[1])
    with torch.no_grad():
        found = [
            classifier(to_pixels(trusted.pixels[start : start + size], device)).float().cpu().numpy()
            for start in range(0, len(trusted), size)
        ]
    classifier.train(training)
    return np.concatenate(found)
