"""Small good and hostile tars, byte by byte, for all tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

END_MARK = bytes(1024)


def image_bytes(seed: int = 0, fmt: str = "jpeg", size: int = 32) -> bytes:
    """An encoded square RGB image of smooth noise; `fmt` is a Pillow format name."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, fmt)
    return stream.getvalue()


def member(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    format: int = tarfile.USTAR_FORMAT,
    pax: Mapping[str, str] | None = None,
    mtime: int = 0,
) -> bytes:
    """Header (with extension headers where `format` needs them), content and padding of one member."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname, info.mtime = len(data), kind, link, mtime
    info.pax_headers = dict(pax or {})
    header = info.tobuf(format, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % 512)


def sample(key: str, label: str = "0", *, seed: int = 0, extension: str = "jpg", size: int = 8) -> bytes:
    """Two members: KEY.jpg and KEY.cls."""
    fmt = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}[extension.lower()]
    image = image_bytes(seed, fmt, size)
    return member(f"{key}.{extension}", image) + member(f"{key}.cls", label.encode())


def global_header(fields: Mapping[str, str]) -> bytes:
    """A PAX global header."""
    return tarfile.TarInfo.create_pax_global_header(dict(fields))


def with_header(name: str, data: bytes = b"", **fields: bytes) -> bytes:
    """A member whose raw header fields (size, mode, magic, typeflag) are overwritten, checksum made right."""
    places = {"mode": 100, "size": 124, "typeflag": 156, "magic": 257}
    raw = bytearray(member(name, data))
    for field, value in fields.items():
        raw[places[field] : places[field] + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def corrupt(piece: bytes, at: int = 0) -> bytes:
    """`piece` with a damaged checksum in the header at byte `at`."""
    raw = bytearray(piece)
    raw[at + 148 : at + 156] = b"xxxxxxxx"
    return bytes(raw)


def tar(*pieces: bytes, end: bytes = END_MARK) -> bytes:
    """Pieces and the end mark."""
    return b"".join(pieces) + end


def shard(path: Path, samples: Iterable[bytes | Mapping[str, object]], end: bytes = END_MARK) -> Path:
    """Write a shard of raw pieces, or of ``{"__key__": key, extension: bytes or text}``."""
    pieces = []
    for item in samples:
        if isinstance(item, bytes):
            pieces.append(item)
            continue
        for extension, value in item.items():
            if extension != "__key__":
                data = value if isinstance(value, bytes) else str(value).encode()
                pieces.append(member(f"{item['__key__']}.{extension}", data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(*pieces, end=end))
    return path


def corpus(folder: Path, samples: int = 40, classes: int = 2, shards: int = 2, first: int = 0) -> Path:
    """A folder of good shards; labels go round, every image is different (seeded by `first` + number)."""
    per_shard = -(-samples // shards)
    for number in range(shards):
        rows = range(number * per_shard, min(samples, (number + 1) * per_shard))
        pieces = [sample(f"{first + i:06d}", str(i % classes), seed=first + i) for i in rows]
        shard(folder / f"data-{number:03d}.tar", pieces)
    return folder
