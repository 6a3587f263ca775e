import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builders import image_bytes, member, sample, shard
from PIL import Image

from sanitize.corpus import pixels
from sanitize.corpus.index import build_index
from sanitize.corpus.pixels import (
    ImageError,
    SomeRows,
    choose_resolution,
    decode,
    decode_all,
    median_side,
)
from sanitize.corpus.sources import Source, expand
from sanitize.progress import Silent

Pixels = npt.NDArray[np.uint8]


def encoded(picture: Image.Image, fmt: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, fmt, **options)
    return stream.getvalue()


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, 16)
    return str(caught.value)


def grey_png16(values: npt.NDArray[np.uint16], channels: int) -> bytes:
    """A 16-bit PNG made by hand: Pillow writes none in RGB."""
    height, width = values.shape[:2]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
def test_formats(fmt: str) -> None:
    data = image_bytes(3, fmt, 32)
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(picture.convert("RGB"))
    found = decode(data, 32)
    assert found.dtype == np.uint8
    assert found.shape == (32, 32, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (20, 16), (37, 53)])
def test_area_resize_against_a_naive_mean(height: int, width: int) -> None:
    picture = noise(height, width, 3)
    found = decode(encoded(Image.fromarray(picture), "png"), 16).astype(float)
    if height % 16 == 0 and width % 16 == 0:
        blocks = picture.reshape(16, height // 16, 16, width // 16, 3)
        assert np.abs(found - blocks.mean(axis=(1, 3))).max() <= 1.0
    else:  # blocks have fractional borders; the mean of the whole stays
        np.testing.assert_allclose(found.mean(axis=(0, 1)), picture.mean(axis=(0, 1)), atol=6)


def test_a_large_jpeg_keeps_its_colours_where_they_are() -> None:
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[:256, :256], picture[:256, 256:], picture[256:, :256] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    found = decode(encoded(Image.fromarray(picture), "jpeg", quality=95), 16).astype(int)
    for y, x, colour in ((2, 2, (255, 0, 0)), (2, 13, (0, 255, 0)), (13, 2, (0, 0, 255)), (13, 13, (0,) * 3)):
        assert np.abs(found[y, x] - colour).max() < 8


def test_grey_one_bit_and_alpha() -> None:
    grey = noise(16, 16)
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "png"), 16), expected)
    with_alpha = np.stack([grey, noise(16, 16, seed=1)], axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(with_alpha, "LA"), "png"), 16), expected)
    colour = noise(16, 16, 4)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(colour), "png"), 16), colour[..., :3])
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(decode(encoded(bits, "png"), 16))) == {0, 255}


def test_palette_with_and_without_transparency() -> None:
    indices = noise(16, 16) % 4
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(palette.tobytes())
    for options in ({}, {"transparency": 1}, {"transparency": b"\x00\x80\xff\x10"}):
        found = decode(encoded(picture, "png", **options), 16)
        np.testing.assert_array_equal(found, palette[indices])


def test_cmyk_jpeg() -> None:
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = decode(encoded(flat, "jpeg", quality=95), 16).astype(int)
    assert np.abs(found - (255, 0, 0)).max() < 16


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_cut(channels: int) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values = ramp if channels == 1 else np.repeat(ramp[..., None], 3, axis=2)
    found = decode(grey_png16(values, channels), 16).astype(float)
    assert np.abs(found - (ramp / 257)[..., None]).max() <= 1.0


@pytest.mark.parametrize("fmt", ["webp", "png"])
def test_animated(fmt: str) -> None:
    frames = [Image.fromarray(noise(16, 16, 3, seed=i)) for i in range(3)]
    assert refused(encoded(frames[0], fmt, save_all=True, append_images=frames[1:])) == "animated"


def test_a_photograph_with_a_second_view_behind_it_is_its_first_view() -> None:
    views = [Image.fromarray(noise(16, 16, 3, seed=i)) for i in range(2)]
    data = encoded(views[0], "mpo", save_all=True, append_images=views[1:])
    np.testing.assert_array_equal(decode(data, 16), decode(encoded(views[0], "jpeg"), 16))


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated(fmt: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(64, 64, 3)), fmt)
    assert refused(data[: int(share * len(data))]) == "undecodable"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        bytes(5000),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a" + bytes(50),
        b"<svg/>",
    ],
)
def test_no_image_at_all(data: bytes) -> None:
    assert refused(data) == "undecodable"


def test_a_format_that_shards_may_not_hold() -> None:
    assert refused(encoded(Image.new("RGB", (8, 8)), "tiff")) == "undecodable"


def test_any_damaged_byte_is_decoded_or_refused() -> None:
    rng = np.random.default_rng(0)
    for fmt in ("png", "jpeg", "webp"):
        good = bytearray(image_bytes(1, fmt, 24))
        for _ in range(80):
            data = good.copy()
            for at in rng.integers(0, len(data), 3):
                data[at] = rng.integers(256)
            try:
                outcome = str(decode(bytes(data), 16).shape)
            except ImageError as error:
                outcome = str(error)
            assert outcome in ("(16, 16, 3)", "undecodable", "animated", "too-large")


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """100 megapixels in a dozen kB."""
    return encoded(Image.new("1", (10_000, 10_000)), "png")


def test_a_hundred_megapixels_are_refused_without_decoding(bomb: bytes) -> None:
    assert len(bomb) < 100_000
    began = time.monotonic()
    assert refused(bomb) == "too-large"
    assert time.monotonic() - began < 1.0


def test_more_than_pillow_takes() -> None:
    small = grey_png16(np.zeros((8, 8), np.uint16), 1)
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    assert refused(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]) == "too-large"


def test_choose_resolution() -> None:
    assert [choose_resolution(side) for side in (None, 8, 32, 48, 49, 224)] == [32, 32, 32, 32, 64, 64]


class Case:
    def __init__(self, folder: Path, pieces: dict[str, list[bytes]]) -> None:
        for name, samples in pieces.items():
            shard(folder / "corpus" / name, samples)
        shard(folder / "trusted" / "t.tar", [sample(f"t{i}", str(i % 2), seed=900 + i) for i in range(60)])
        self.folder = folder
        self.sources: list[Source] = expand(str(folder / "corpus")) + expand(str(folder / "trusted"))
        self.index = build_index(
            self.sources[:-1], self.sources[-1:], label="cls", scratch=folder, workers=1, progress=Silent()
        ).table

    def decode(self, name: str, workers: int = 1) -> tuple[Any, Pixels]:
        path = self.folder / name / "pixels.npy"
        table = decode_all(
            self.sources,
            self.index,
            path,
            8,
            scratch=self.folder,
            workers=workers,
            progress=Silent(),
        )
        assert [p.name for p in path.parent.iterdir()] == ["pixels.npy"]
        return table, np.load(path)


def broken(key: str, image: bytes) -> bytes:
    return member(f"{key}.png", image) + member(f"{key}.cls", b"0")


def test_parallel_chunks_and_serial_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: bytes
) -> None:
    good = [sample(f"k{i:03d}", str(i % 2), seed=i) for i in range(40)]
    bad = [broken("bomb", bomb), broken("zero", b""), broken("half", image_bytes(1, "png", 32)[:200])]
    case = Case(tmp_path, {"a.tar": good[:20] + bad, "b.tar": good[20:]})
    serial_table, serial = case.decode("serial")
    monkeypatch.setattr(pixels, "CHUNK_SAMPLES", 7)
    parallel_table, parallel = case.decode("parallel", workers=3)
    np.testing.assert_array_equal(serial, parallel)
    assert serial_table.equals(parallel_table)
    status = dict(zip(serial_table["key"].to_pylist(), serial_table["status"].to_pylist(), strict=True))
    assert (status["bomb"], status["zero"], status["half"]) == ("too-large", "undecodable", "undecodable")
    assert sum(value == "ok" for value in status.values()) == 100
    for row in serial_table.to_pylist():
        url = next(source.url for source in case.sources if source.name == row["shard"])
        data = Path(url).read_bytes()[row["image_offset"] :][: row["image_size"]]
        expected = decode(data, 8) if row["status"] == "ok" else 0
        assert (serial[row["sample_id"]] == expected).all()


def test_median_side_is_that_of_the_readable_images(tmp_path: Path) -> None:
    pieces = [sample(f"k{i}", str(i % 2), seed=i, size=size) for i, size in enumerate([20] * 30)]
    case = Case(tmp_path, {"a.tar": [*pieces, broken("zero", b"")]})
    only_corpus = case.index.slice(0, 31)
    assert median_side(case.sources, only_corpus, tmp_path) == 20
    assert median_side(case.sources, only_corpus.slice(30), tmp_path) is None


def test_median_side_looks_at_shards_all_over(tmp_path: Path) -> None:
    shards = {
        f"{number}.tar": [
            sample(f"k{i}", str(i % 2), seed=i, size=20 if number == 0 else 40) for i in range(9)
        ]
        for number, size in enumerate([20, 40, 40])
    }
    case = Case(tmp_path, shards)
    assert median_side(case.sources, case.index, tmp_path) == 40, "the trusted ones are 32 px"


def test_some_rows_are_indexed_like_an_array() -> None:
    everything = noise(9, 4, 4, 3)
    rows = np.array([1, 2, 5, 8])
    some = SomeRows(everything, rows)
    assert (len(some), some.shape) == (4, (4, 4, 4, 3))
    for index in (slice(1, 3), np.array([3, 0]), np.array([True, False, True, False])):
        np.testing.assert_array_equal(some[index], everything[rows][index])
