"""What a scan will cost: `sanitize scan --dry-run`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sanitize import scores
from sanitize.config import ScanConfig
from sanitize.corpus.index import Index, build_index
from sanitize.corpus.pixels import ImageError, choose_resolution, decode, median_side
from sanitize.corpus.sources import Source, open_tar
from sanitize.pipeline import check_choices, cores, find_sources, largest_label
from sanitize.progress import Progress
from sanitize.rundir import disk_errors
from sanitize.scores.class_mixtures import SAMPLE_BYTES

_DECODED = 200
_STEPS = 4
_PROCESS_BYTES = 1_150_000_000
"""Resident memory of PyTorch with a small network and its optimiser (docs/benchmarks.md)."""
_CHECKPOINT_BYTES = 20_000_000
_GROUP_SECONDS = 0.0017
"""A sample on one core, in all views."""


def estimate(config: ScanConfig, progress: Progress) -> dict[str, Any]:
    """Index the shards, time a few images and training steps, and extrapolate. Writes nothing that stays.

    Returns:
        samples, unusable, trusted, classes, shards, bytes, disk_bytes, memory_bytes, time_s, resolution,
        proxy, device, dtype, notes.
    """
    check_choices(config)
    with tempfile.TemporaryDirectory() as folder, disk_errors(Path(folder)):
        scratch = Path(folder)
        corpus, trusted = find_sources(config.corpus)
        began = time.monotonic()
        index = build_index(
            corpus, trusted, label=config.corpus.label, scratch=scratch, workers=cores(), progress=progress
        )
        index_s = time.monotonic() - began
        side = median_side(corpus + trusted, index.table, scratch)
        resolution = config.corpus.resolution or choose_resolution(side)
        decode_s = _decode_s(corpus, index, resolution, scratch)
    rows = index.table.num_rows
    usable = int(pc.sum(pc.equal(index.table["status"], "ok")).as_py())
    in_trusted = int(pc.sum(index.table["trusted"]).as_py())
    unusable = int(
        pc.sum(pc.and_not(pc.not_equal(index.table["status"], "ok"), index.table["trusted"])).as_py()
    )
    corpus_bytes = sum(shard["bytes"] for shard in index.shards if not shard["trusted"])
    setup, train_s = _train_s(config, usable, len(index.class_names), resolution)
    pixel_bytes = rows * resolution**2 * 3
    searched = scores.searches_groups(config.decision.method)
    largest = largest_label(index.table["label"])[1] if searched else 0
    groups_s = usable * _GROUP_SECONDS if searched else 0.0
    return {
        "samples": rows - in_trusted,
        "unusable": unusable,
        "trusted": in_trusted,
        "classes": len(index.class_names),
        "shards": len(corpus),
        "bytes": corpus_bytes,
        "disk_bytes": corpus_bytes + pixel_bytes + 4 * rows * config.proxy.epochs + _CHECKPOINT_BYTES,
        "memory_bytes": _PROCESS_BYTES
        + pixel_bytes
        + 12 * rows * config.proxy.epochs
        + SAMPLE_BYTES * largest,
        "time_s": round(index_s + (decode_s * usable + groups_s) / cores() + train_s, 1),
        "resolution": resolution,
        **setup,
        "notes": index.notes,
    }


def in_words(guess: dict[str, Any]) -> str:
    """The estimate as a few lines."""
    lines = [
        f"samples   {guess['samples']:,} in {guess['shards']} shards, {guess['unusable']:,} unusable",
        f"trusted   {guess['trusted']:,}",
        f"classes   {guess['classes']:,}",
        f"bytes     {_size(guess['bytes'])}",
        f"proxy     {guess['proxy']} at {guess['resolution']} px, {guess['dtype']} on {guess['device']}",
        f"disk      about {_size(guess['disk_bytes'])} (shards, pixels, trajectories)",
        f"memory    about {_size(guess['memory_bytes'])}, of which the pixels may stay on disk",
        f"time      about {guess['time_s'] / 60:.0f} min"
        if guess["time_s"] > 90
        else f"time      about {guess['time_s']:.0f} s",
    ]
    return "\n".join(lines + [f"note: {note}" for note in guess["notes"]])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _decode_s(corpus: list[Source], index: Index, resolution: int, scratch: Path) -> float:
    """Seconds per image on one core, from the first images."""
    table = index.table.filter(pc.equal(index.table["status"], "ok")).slice(0, _DECODED)
    first = table["shard"][0].as_py()
    rows = [row for row in table.to_pylist() if row["shard"] == first]
    source = next(source for source in corpus if source.name == first)
    with open_tar(source, scratch) as data:
        began = time.monotonic()
        for row in rows:
            try:
                decode(bytes(data[row["image_offset"] : row["image_offset"] + row["image_size"]]), resolution)
            except ImageError:
                continue
    return (time.monotonic() - began) / len(rows)


def _train_s(config: ScanConfig, usable: int, classes: int, resolution: int) -> tuple[dict[str, Any], float]:
    """Seconds of all training, from a few steps on noise, and what `auto` came to."""
    from sanitize.dynamics import proxy, second_opinion

    setup = proxy.setup(config.proxy, usable)
    rng = np.random.default_rng(0)
    count = _STEPS * setup.batch
    samples = proxy.Samples(
        pixels=rng.integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8),
        class_id=rng.integers(0, classes, count).astype(np.int32),
        rows=np.arange(count),
        classes=classes,
    )
    seconds = proxy.time_one_epoch(samples, config.proxy, setup)
    facts = {"proxy": setup.proxy, "device": setup.device, "dtype": setup.dtype}
    epochs = config.proxy.epochs
    if scores.needs_second_opinion(config.decision.method):
        epochs += second_opinion.EPOCHS
    return facts, seconds / count * usable * epochs
