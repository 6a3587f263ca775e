"""The whole main job on a small generated corpus: CPU, no download, ground truth beside it."""

from __future__ import annotations

import colorsys
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from sanitize.errors import RunFolderError
from sanitize.progress import Progress

SIDE = 32
CLASSES = ("circle", "cross", "diamond", "moon", "ring", "square", "star", "triangle")
PER_CLASS = 800
TRUSTED_PER_CLASS = 25
PER_SHARD = 1_200
ATTACKS = ("badnets:0.03", "frequency:0.03", "sinusoid:0.03")
EPOCHS = 20
MARKER = ".sanitize-demo"


def run_demo(out: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Generate, poison, scan, compare.

    Args:
        out: folder for corpus/, trusted/ and run/; made anew if an earlier demo left it.
        seed: of the pictures, the attacks and the scan.

    Returns:
        Per attack how many samples were planted and found, what clean data was lost, and the report's path.
    """
    import sanitize

    _clear(out)
    truth = write_corpus(out, seed)
    progress.note(
        f"{len(truth):,} pictures of {len(CLASSES)} shapes in {out / 'corpus'}; planted: {', '.join(ATTACKS)}"
    )
    report = sanitize.scan(
        out / "corpus", trusted=out / "trusted", out=out / "run", epochs=EPOCHS, seed=seed, progress=progress
    )
    return {**_compare(out / "run", truth), "verdict": report.verdict, "report": str(report.path)}


def in_words(found: dict[str, Any]) -> str:
    """The comparison as a small table."""
    lines = [found["verdict"], "", f"{'attack':<14}{'planted':>8}{'found':>8}{'recall':>9}"]
    for attack in found["attacks"]:
        lines.append(
            f"{attack['attack']:<14}{attack['planted']:>8}{attack['found']:>8}{attack['recall']:>9.0%}"
        )
    clean = found["clean"]
    lines += [
        f"{'clean':<14}{clean['samples']:>8}{clean['lost']:>8}{clean['lost_ratio']:>9.0%}  lost",
        "",
        f"Report: {found['report']}",
    ]
    return "\n".join(lines)


def _clear(out: Path) -> None:
    """Remove an earlier demo, which the marker vouches for, and nothing else."""
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; give another --out")
    if out.exists() and any(out.iterdir()):
        strangers = {path.name for path in out.iterdir()} - {"corpus", "trusted", "run", MARKER}
        if strangers or not (out / MARKER).is_file():
            raise RunFolderError(
                f"{out} holds {min(strangers, default='files')} that no demo made; give another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Made by sanitize demo, which replaces this folder when it runs again.\n")


def _compare(run: Path, truth: dict[str, str]) -> dict[str, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(run / "decisions.parquet", columns=["key", "flagged"])
    flagged = dict(zip(table["key"].to_pylist(), table["flagged"].to_pylist(), strict=True))
    attacks = []
    for name in (attack.partition(":")[0] for attack in ATTACKS):
        keys = [key for key, attack in truth.items() if attack == name]
        found = sum(flagged[key] for key in keys)
        attacks.append({"attack": name, "planted": len(keys), "found": found, "recall": found / len(keys)})
    clean = [key for key, attack in truth.items() if not attack]
    lost = sum(flagged[key] for key in clean)
    return {
        "attacks": attacks,
        "clean": {"samples": len(clean), "lost": lost, "lost_ratio": lost / len(clean)},
    }


def write_corpus(out: Path, seed: int) -> dict[str, str]:
    """Write corpus/ and trusted/ shards of generated pictures, with ATTACKS planted in the corpus.

    Returns:
        Key of every corpus sample -> its attack, "" if clean.
    """
    from sanitize.attacks.plant import AttackSpec, plant

    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), PER_CLASS + TRUSTED_PER_CLASS))
    images = np.stack([picture(int(label), rng) for label in labels])
    trusted = np.zeros(len(labels), bool)
    for class_id in range(len(CLASSES)):
        trusted[np.flatnonzero(labels == class_id)[:TRUSTED_PER_CLASS]] = True
    planted = plant(
        images[~trusted], labels[~trusted], [AttackSpec.parse(attack) for attack in ATTACKS], seed=seed
    )
    _write_shards(out / "trusted", "trusted", images[trusted], labels[trusted])
    keys = _write_shards(out / "corpus", "scraped", planted.images, planted.plan.labels)
    names = [*planted.plan.names, ""]
    return {key: names[attack] for key, attack in zip(keys, planted.plan.truth, strict=True)}


def picture(class_id: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One shape over clutter: colour, place, size, angle, contrast and noise vary; (32, 32, 3) uint8."""
    scale = 4
    size = SIDE * scale
    canvas = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size), 3)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 5)):
        a, b = rng.integers(0, size, 2), rng.integers(0, size, 2)
        draw.line([*map(int, a), *map(int, b)], fill=_colour(rng), width=int(rng.integers(2, 8)))
    mask = _shape(CLASSES[class_id], int(size * rng.uniform(0.45, 0.75)), scale)
    mask = mask.rotate(float(rng.uniform(-25, 25)), expand=True)
    opacity = rng.uniform(0.75, 1.0)
    mask = mask.point(lambda value: int(value * opacity))
    room = [max(1, size - side) for side in mask.size]
    corner = int(rng.integers(0, room[0])), int(rng.integers(0, room[1]))
    canvas.paste(Image.new("RGB", mask.size, _class_colour(class_id, rng)), corner, mask)
    small = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1)))).resize((SIDE, SIDE), 4)
    noisy = np.asarray(small, np.float32) + rng.normal(0, rng.uniform(2, 8), (SIDE, SIDE, 3))
    return noisy.clip(0, 255).round().astype(np.uint8)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _class_colour(class_id: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour near the class's own hue in four of five pictures: real classes have colours, loosely."""
    hue = class_id / len(CLASSES) + rng.normal(0, 0.06) if rng.random() < 0.8 else rng.random()
    rgb = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.0))
    red, green, blue = (int(255 * value) for value in rgb)
    return red, green, blue


def _shape(name: str, side: int, scale: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    last = side - 1
    third = side // 3
    match name:
        case "circle":
            draw.ellipse([0, 0, last, last], fill=255)
        case "ring":
            draw.ellipse([0, 0, last, last], outline=255, width=max(scale, side // 5))
        case "moon":
            draw.ellipse([0, 0, last, last], fill=255)
            draw.ellipse([third, -third // 2, last + third, last - third // 2], fill=0)
        case "square":
            draw.rectangle([side // 10, side // 10, last - side // 10, last - side // 10], fill=255)
        case "diamond":
            draw.polygon([(side // 2, 0), (last, side // 2), (side // 2, last), (0, side // 2)], fill=255)
        case "triangle":
            draw.polygon([(side // 2, 0), (last, last), (0, last)], fill=255)
        case "cross":
            draw.rectangle([third, 0, last - third, last], fill=255)
            draw.rectangle([0, third, last, last - third], fill=255)
        case _:
            angles = np.pi * np.arange(10) / 5
            radii = np.where(np.arange(10) % 2, 0.2, 0.5) * side
            points = zip(side / 2 + radii * np.sin(angles), side / 2 - radii * np.cos(angles), strict=True)
            draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return mask


def _write_shards(
    folder: Path, stem: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> list[str]:
    from webdataset.writer import TarWriter

    folder.mkdir(parents=True)
    keys = [f"{stem}-{number:05d}" for number in range(len(images))]
    for start in range(0, len(images), PER_SHARD):
        with TarWriter(str(folder / f"{stem}-{start // PER_SHARD:04d}.tar"), mtime=0) as writer:
            for row in range(start, min(start + PER_SHARD, len(images))):
                buffer = io.BytesIO()
                Image.fromarray(images[row]).save(buffer, "png")
                name = CLASSES[int(labels[row])]
                writer.write({"__key__": keys[row], "png": buffer.getvalue(), "cls": name.encode()})
    return keys
