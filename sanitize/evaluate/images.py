"""Images of a labelled corpus in memory, as they are or with a trigger on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from sanitize.attacks import Trigger, stamp
from sanitize.attacks.plant import from_float, to_float
from sanitize.corpus.labels import BadLabelError, label_extension, read_label
from sanitize.corpus.pixels import ImageError, decode
from sanitize.corpus.shards import END, IMAGE_EXTENSIONS, group, walk
from sanitize.corpus.sources import expand, open_tar
from sanitize.errors import InputError

_CHUNK = 1_024


class Encoded(NamedTuple):
    """Usable samples of shards."""

    files: list[bytes]
    """(N,) encoded images."""
    class_id: npt.NDArray[np.int64]
    """(N,)"""


def read_encoded(shards: str, label: str, class_names: Sequence[str], scratch: Path) -> Encoded:
    """Encoded images and class ids of the samples that have an image and one of `class_names`.

    Args:
        shards: in any form that a scan takes.
        label: ``cls``, ``txt`` or ``json:path.to.field``.

    Raises:
        InputError: no such sample.
    """
    number = {name: class_id for class_id, name in enumerate(class_names)}
    files, class_id = [], []
    for source in expand(shards):
        with open_tar(source, scratch) as buffer:
            entries = walk(buffer)
            end = next((i for i, entry in enumerate(entries) if entry.kind == END), len(entries))
            for sample in group(entries[:end])[0]:
                image = IMAGE_EXTENSIONS & sample.members.keys()
                text = sample.members.get(label_extension(label))
                if sample.status != "ok" or len(image) != 1 or text is None:
                    continue
                try:
                    content = bytes(buffer[text.data : text.data + text.size])
                    own = number.get(read_label(label, {label_extension(label): content}) or "")
                except BadLabelError:
                    continue
                if own is not None:
                    entry = sample.members[min(image)]
                    files.append(bytes(buffer[entry.data : entry.data + entry.size]))
                    class_id.append(own)
    if not files:
        raise InputError(f"{shards}: no sample has an image and one of the labels of the corpus")
    return Encoded(files, np.array(class_id, np.int64))


def decode_all(
    encoded: Encoded,
    resolution: int,
    attack: str | None = None,
    trigger: Trigger | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images at the proxy's resolution; a trigger is put on at the image's own size, before resizing.

    Returns:
        (M, resolution, resolution, 3) uint8 and (M,) class ids of the images that can be decoded.
    """
    images, kept = [], []
    for start in range(0, len(encoded.files), _CHUNK):
        by_shape: dict[tuple[int, ...], list[tuple[int, npt.NDArray[np.uint8]]]] = {}
        for row in range(start, min(start + _CHUNK, len(encoded.files))):
            try:
                pixels = decode(encoded.files[row], None)
            except ImageError:
                continue
            by_shape.setdefault(pixels.shape, []).append((row, pixels))
        for same in by_shape.values():
            batch = np.stack([pixels for _, pixels in same])
            if attack:
                stamped = stamp(attack, to_float(batch), strength=strength, seed=seed, trigger=trigger)
                batch = from_float(stamped)
            images += [_resized(pixels, resolution) for pixels in batch]
            kept += [row for row, _ in same]
    if not images:
        raise InputError("no test image can be decoded")
    return np.stack(images), encoded.class_id[kept]


def _resized(pixels: npt.NDArray[np.uint8], resolution: int) -> npt.NDArray[np.uint8]:
    if pixels.shape[:2] == (resolution, resolution):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BOX))
