"""Decode every image once, to uint8 at the proxy's resolution."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sanitize.corpus.sources import Source, each_shard, open_tar
from sanitize.progress import Progress
from sanitize.rundir import create_array

MAX_PIXELS = 50_000_000
"""A larger image is not decoded: a few of them would fill the memory of every core."""
CHUNK_SAMPLES = 2_048
MEASURED, MEASURED_SHARDS = 200, 4
"""Images, and shards of which they are, whose size decides at which resolution a corpus is decoded."""
SMALL_SIDE = 48
"""Up to this median short side a corpus counts as small images."""


class ImageError(Exception):
    """An image that cannot be used; the text is a status code of the index."""


def decode(data: bytes, resolution: int | None) -> npt.NDArray[np.uint8]:
    """One image, RGB, resized by area averaging to a square; at its own size without a resolution.

    The whole image is squeezed into the square rather than cropped: a trigger may sit in a corner.
    Grey, palette and CMYK images are converted, 16-bit ones scaled to 8 bits, alpha is dropped, EXIF
    rotation is ignored, as most training pipelines do.

    Args:
        data: the encoded file.
        resolution: side in pixels, or None.

    Returns:
        (resolution, resolution, 3) uint8, or (H, W, 3).

    Raises:
        ImageError: with the status "undecodable", "too-large" or "animated".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, resolution)
    except (Image.DecompressionBombError, MemoryError):
        raise ImageError("too-large") from None
    # Pillow's decoders raise almost anything on damaged files, SyntaxError and struct.error among them.
    except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, EOFError) as error:
        raise ImageError("undecodable") from error
    except Exception as error:
        if type(error).__module__ in ("struct", "zlib"):
            raise ImageError("undecodable") from error
        raise


def _decode(data: bytes, resolution: int | None) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageError("too-large")
        # MPO, a photograph with a depth map or a second view behind it, is a JPEG to everybody else.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ImageError("animated")
        if resolution:
            # Lets libjpeg skip work on large photographs: it decodes at 1/2, 1/4 or 1/8.
            image.draft("RGB", (2 * resolution, 2 * resolution))
        rgb = _to_rgb(image)
    if resolution and rgb.size != (resolution, resolution):
        rgb = rgb.resize((resolution, resolution), Image.Resampling.BOX)
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # In integers: floats would take 16 bytes a pixel while they last.
        values = np.asarray(image).clip(0, 65_535).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


class SomeRows:
    """Some rows of (N, R, R, 3) pixels, read when they are asked for; indexed along the first axis."""

    def __init__(self, pixels: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp]) -> None:
        self._pixels, self._rows = pixels, rows
        self.shape = (len(rows), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        found: npt.NDArray[np.uint8] = self._pixels[self._rows[rows]]
        return found


def median_side(sources: list[Source], table: pa.Table, scratch: Path) -> float | None:
    """Median short side, in pixels, of 200 corpus images from up to four shards; None if none can be read."""
    usable = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.invert(table["trusted"])))
    usable = usable.select(["shard", "image_offset", "image_size"])
    by_name = {source.name: source for source in sources}
    sides = []
    names = _spaced(usable["shard"].unique().to_pylist(), MEASURED_SHARDS)
    for name in names:
        rows = usable.filter(pc.equal(usable["shard"], name)).to_pylist()
        with open_tar(by_name[name], scratch) as data:
            for row in _spaced(rows, MEASURED // len(names)):
                start = row["image_offset"]
                size = _size_of(bytes(data[start : start + row["image_size"]]))
                sides += [min(size)] if size else []
    return float(np.median(sides)) if sides else None


def _spaced(values: list[Any], count: int) -> list[Any]:
    """At most `count` of the values, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, count)]


def choose_resolution(side: float | None) -> int:
    """32 for images whose median short side is at most 48 px, 64 above."""
    return 64 if side is not None and side > SMALL_SIDE else 32


def _size_of(data: bytes) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def decode_all(
    sources: list[Source],
    table: pa.Table,
    path: Path,
    resolution: int,
    *,
    scratch: Path,
    workers: int,
    progress: Progress,
) -> pa.Table:
    """Decode the image of every usable row of the index into one .npy file.

    Args:
        sources: in the order of their rows: corpus first, trusted after.
        table: the index; rows of a source are consecutive.
        path: the file to write: uint8 (N, resolution, resolution, 3), zeros where there is no image.
        resolution: side in pixels.

    Returns:
        The index with the status of undecodable, too large and animated images set.
    """
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(exist_ok=True)
    create_array(temporary, (table.num_rows, resolution, resolution, 3), np.uint8)
    status = np.array(table["status"].to_pylist(), dtype=object)
    jobs = [
        _Job(source, rows, offsets, sizes, temporary, resolution, scratch)
        for source, rows, offsets, sizes in _chunks(sources, table, status)
    ]
    remote = not all(source.local for source in sources)
    with progress.stage("decode", int((status == "ok").sum()), "images") as advance:
        for rows, statuses in each_shard(_decode_chunk, jobs, workers, remote=remote):
            status[rows] = statuses
            advance(len(rows))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    column = table.schema.get_field_index("status")
    return table.set_column(column, "status", pa.array(status.tolist(), pa.string()))


def _chunks(
    sources: list[Source], table: pa.Table, status: npt.NDArray[np.object_]
) -> Iterator[tuple[Source, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Chunks of rows that a core can decode alone; a shard that must be unpacked first is one chunk."""
    offsets, sizes = table["image_offset"].to_numpy(), table["image_size"].to_numpy()
    usable = status == "ok"
    shard = table["shard"].combine_chunks().dictionary_encode()
    names = shard.dictionary.to_pylist()
    codes = shard.indices.to_numpy()
    trusted = table["trusted"].to_numpy(zero_copy_only=False)
    boundary = np.flatnonzero((np.diff(codes) != 0) | (np.diff(trusted.astype(np.int8)) != 0)) + 1
    by_name = {source.name: source for source in sources}
    for rows in np.split(np.arange(table.num_rows), boundary):
        source = by_name[names[codes[rows[0]]]]
        rows = rows[usable[rows]]
        step = CHUNK_SAMPLES if source.local and not source.compression else max(1, len(rows))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            yield source, chunk, offsets[chunk], sizes[chunk]


class _Job(NamedTuple):
    source: Source
    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    path: Path
    resolution: int
    scratch: Path


def _decode_chunk(job: _Job) -> tuple[npt.NDArray[np.int64], list[str]]:
    pixels = np.lib.format.open_memmap(job.path, mode="r+")
    statuses = []
    with open_tar(job.source, job.scratch) as data:
        for row, offset, size in zip(job.rows, job.offsets, job.sizes, strict=True):
            try:
                pixels[row] = decode(bytes(data[offset : offset + size]), job.resolution)
                statuses.append("ok")
            except ImageError as error:
                statuses.append(str(error))
    return job.rows, statuses
