"""Images of a labelled corpus in memory, as they are or with a trigger on them."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from sanitize.attacks import Trigger, stamp
from sanitize.attacks.encoding import encode
from sanitize.attacks.plant import from_float, to_float
from sanitize.corpus.labels import BadLabelError, label_extension, read_label
from sanitize.corpus.pixels import ImageError, decode
from sanitize.corpus.shards import END, IMAGE_EXTENSIONS, Entry, Sample, group, walk
from sanitize.corpus.sources import Buffer, expand, open_tar
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
            for sample in _samples(buffer):
                image = IMAGE_EXTENSIONS & sample.members.keys()
                text = sample.members.get(label_extension(label))
                if len(image) != 1 or text is None:
                    continue
                try:
                    content = {label_extension(label): _content(buffer, text)}
                    own = number.get(read_label(label, content) or "")
                except BadLabelError:
                    continue
                if own is not None:
                    files.append(_content(buffer, sample.members[min(image)]))
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
    jpeg_quality: int | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images at the proxy's resolution; a trigger is put on at the image's own size, before resizing.

    Args:
        jpeg_quality: of a JPEG that every image is made in between, triggered or not; None for no loss.

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
            if jpeg_quality is None:
                images += [_resized(pixels, resolution) for pixels in batch]
            else:
                images += [decode(encode(pixels, "jpg", jpeg_quality), resolution) for pixels in batch]
            kept += [row for row, _ in same]
    if not images:
        raise InputError("no test image can be decoded")
    return np.stack(images), encoded.class_id[kept]


def _resized(pixels: npt.NDArray[np.uint8], resolution: int) -> npt.NDArray[np.uint8]:
    if pixels.shape[:2] == (resolution, resolution):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BOX))


def rewrite_images(
    shards: str,
    out: Path,
    image_format: str,
    quality: int = 95,
    change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None = None,
) -> None:
    """Write shards anew into the folder `out`, with every image decoded, changed and encoded alike.

    Keys and other members stay. An image that cannot be decoded is copied; what is no whole sample is left
    out. `out` appears when all of it is written.

    Args:
        shards: in any form that a scan takes.
        image_format: ``png`` or ``jpg``.
        quality: of JPEG.
        change: gives new pixels for (H, W, 3) ones; None keeps them.

    Raises:
        InputError: unreadable shards.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for source in expand(shards):
        path = partial / (source.name if source.name.endswith(".tar") else f"{source.name}.tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_tar(source, partial) as buffer, tarfile.open(path, "w") as tar:
            for sample in _samples(buffer):
                for extension, entry in sample.members.items():
                    name, content = entry.name, _content(buffer, entry)
                    if extension in IMAGE_EXTENSIONS:
                        name, content = _encoded_again(name, content, image_format, quality, change)
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    os.replace(partial, out)


def _encoded_again(
    name: str,
    content: bytes,
    image_format: str,
    quality: int,
    change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None,
) -> tuple[str, bytes]:
    try:
        pixels = decode(content, None)
    except ImageError:
        return name, content
    stem = name[: name.rindex(".")]
    return f"{stem}.{image_format}", encode(change(pixels) if change else pixels, image_format, quality)


def _samples(buffer: Buffer) -> list[Sample]:
    """What a reader sees of a shard and can use."""
    entries = walk(buffer)
    end = next((i for i, entry in enumerate(entries) if entry.kind == END), len(entries))
    return [sample for sample in group(entries[:end])[0] if sample.status == "ok"]


def _content(buffer: Buffer, entry: Entry) -> bytes:
    return bytes(buffer[entry.data : entry.data + entry.size])
