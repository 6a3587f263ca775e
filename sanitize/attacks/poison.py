"""`sanitize poison`: a copy of a corpus with known attacks in it, and test sets that carry the triggers.

Two passes over the shards: one reads keys and labels and chooses the samples, one decodes, stamps and
writes, a shard at a time. Every image is re-encoded and every label member rewritten in the same way,
poisoned or not, so that neither the file format nor a tar header tells poison apart.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sanitize.attacks import SurrogateCorpus, Trigger, get, make_trigger, stamp
from sanitize.attacks.encoding import check_format, decode, encode
from sanitize.attacks.plant import AttackSpec, Plan, from_float, plan, surrogate_subset, to_float
from sanitize.attacks.resample import resize
from sanitize.attacks.sheet import COLUMNS, Column, draw_sheet, make_column
from sanitize.attacks.surrogate import surrogate_side
from sanitize.attacks.trigger_file import SavedTrigger, load_trigger, save_trigger
from sanitize.corpus.index import storable
from sanitize.corpus.labels import BadLabelError, class_names, label_extension, read_label
from sanitize.corpus.shards import (
    DIRECTORY,
    END,
    FILE,
    GLOBAL,
    IMAGE_EXTENSIONS,
    ODD,
    Entry,
    Sample,
    group,
    walk,
)
from sanitize.corpus.sources import ENDINGS, Buffer, Source, each_shard, expand, open_tar
from sanitize.errors import InputError, UsageError
from sanitize.progress import Progress, Silent
from sanitize.rundir import disk_errors, write_atomic, write_table

TRUTH_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("attack", pa.string()),
        ("true_label", pa.string()),
        ("given_label", pa.string()),
    ]
)
"""Columns of truth.parquet: a row a sample, in the order of the shards; attack is null for a clean sample,
both labels are null for one that cannot be used and was copied as it is."""


class _Listing(NamedTuple):
    """The samples of one shard that will be written."""

    keys: list[str]
    labels: list[str | None]
    """None for a sample that cannot be used."""


class _Job(NamedTuple):
    source: Source
    path: Path
    scratch: Path
    label: str
    image_format: str
    quality: int
    first: int
    """Position of the shard's first sample in the corpus."""
    attacks: list[str | None]
    """Of each sample, in order."""
    given: list[str | None]
    strength: float
    training: bool
    seed: int
    triggers: dict[str, Trigger]


class _Written(NamedTuple):
    undecodable: list[int]
    """Positions in the shard; these samples are copied as they are."""
    columns: dict[str, list[Column]]


def poison(
    shards: str,
    *,
    attacks: Sequence[str],
    out: Path,
    target: int | str | None = None,
    seed: int = 0,
    label: str = "cls",
    image_format: str = "png",
    quality: int = 95,
    workers: int = 1,
    allow_pipe: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``out/shards/*.tar``, ``out/truth.parquet``, ``out/triggers/*.npz``, ``out/sheets/*.png`` and
    ``out/poison.json``; the same arguments give the same bytes, whatever the number of workers.

    Args:
        shards: the corpus, in any form that a scan takes.
        attacks: ``NAME`` or ``NAME:ratio`` each.
        out: a folder that is new or empty.
        target: label of the target class of all attacks; None draws one for each.
        label: where the label is: ``cls``, ``txt`` or ``json:path.to.field``.
        image_format: ``png`` or ``jpg``, of all images.
        quality: of JPEG, 1 to 100.
        workers: processes.
        device: where surrogates train: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        What is in poison.json: samples, unusable, undecodable (counts), classes, shards, settings, and a
        record an attack with target_label, poisoned, relabelled, clean_label, test_strengths and its files.

    Raises:
        UsageError: an unknown attack, a ratio or target that the corpus cannot serve.
        InputError: unreadable shards, or no usable sample.
    """
    progress = progress or Silent()
    check_format(image_format, quality)
    if not attacks:
        raise UsageError(
            "no attack named; pass --attack NAME[:ratio], for instance --attack blend-random:0.01"
        )
    specs = [AttackSpec.parse(text) for text in attacks]
    sources = expand(shards, allow_pipe=allow_pipe)
    with _new_folder(out) as scratch:
        listings = _list_all(sources, label, scratch, workers, progress)
        names, ids = _class_ids(listings)
        specs = [_with_target(spec, target, names) for spec in specs]
        made = plan(ids, specs, classes=len(names), seed=seed)
        corpora = _surrogate_corpora(
            made, ids, sources, listings, label, seed, device, scratch, workers, progress
        )
        triggers = {name: make_trigger(name, seed, corpora.get(name)) for name in made.names}
        planned = [made.names[i] if i >= 0 else None for i in made.truth.tolist()]
        given = [names[i] if i >= 0 else None for i in made.labels.tolist()]
        template = _Job(
            sources[0], out, scratch, label, image_format, quality, 0, [], [], 1.0, True, seed, triggers
        )
        jobs = _jobs(template, sources, listings, planned, given, out / "shards")
        written = _write_all(jobs, workers, "poison", progress, fresh=bool(corpora))
        return _finish(out, made, names, listings, jobs, written, triggers, seed)


def stamp_test(
    shards: str,
    *,
    triggers: Path,
    attack: str,
    out: Path,
    strength: float = 1.0,
    label: str = "cls",
    image_format: str = "png",
    quality: int = 95,
    workers: int = 1,
    allow_pipe: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``out/shards/*.tar``: every image of a test set with a saved trigger on it, true labels kept.

    The attack success rate is the share of the samples whose true label is not the target that a model gives
    the target label.

    Args:
        shards: the test set.
        triggers: the --out of `poison`, or its triggers folder, or one .npz file.
        attack: name.
        strength: 1 is the strength of the poison.
        out, label, image_format, quality, workers: as in `poison`; choose the encoding of the training set.

    Returns:
        attack, target_label, strength, samples, unusable, undecodable, shards.

    Raises:
        InputError: no such trigger, or unreadable shards.
    """
    progress = progress or Silent()
    check_format(image_format, quality)
    if not 0 < strength <= 100:
        raise UsageError(f"--strength {strength}: expected above 0 and up to 100")
    saved = load_trigger(triggers, attack)
    sources = expand(shards, allow_pipe=allow_pipe)
    with _new_folder(out) as scratch:
        listings = _list_all(sources, label, scratch, workers, progress)
        given = [text for listing in listings for text in listing.labels]
        template = _Job(
            sources[0], out, scratch, label, image_format, quality, 0, [], [],
            strength, False, saved.seed, {attack: saved.trigger},
        )  # fmt: skip
        planned = [attack if text is not None else None for text in given]
        jobs = _jobs(template, sources, listings, planned, given, out / "shards")
        written = _write_all(jobs, workers, "stamp", progress, fresh=get(attack).needs_surrogate)
    return {
        "attack": attack,
        "target_label": saved.target_label,
        "strength": strength,
        "samples": len(given),
        "unusable": given.count(None),
        "undecodable": sum(len(part.undecodable) for part in written),
        "shards": [str(job.path) for job in jobs],
    }


def in_words(made: dict[str, Any], out: Path) -> str:
    """What `poison` or `stamp_test` did, in a few lines."""
    lines = [f"{made['samples']:,} samples in {out / 'shards'}, {made['unusable']:,} unusable"]
    if "attacks" not in made:
        return lines[0] + f", stamped with {made['attack']} (target {made['target_label']!a})"
    for attack in made["attacks"]:
        target = f"target {attack['target_label']!a}"
        lines.append(f"  {attack['name']:<22}{attack['poisoned']:>8,} poisoned   {target}")
    return "\n".join([*lines, f"Truth: {out / 'truth.parquet'}   triggers, contact sheets: {out}"])


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Make `out`, which must be new or empty; yields a scratch folder in it that is gone afterwards."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; give a new --out, so that two corpora are never mixed")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=out) as scratch:
            yield Path(scratch)


def _list_all(
    sources: list[Source], label: str, scratch: Path, workers: int, progress: Progress
) -> list[_Listing]:
    jobs = [(source, label, scratch) for source in sources]
    listings = []
    with progress.stage("labels", len(jobs), "shards") as advance:
        for listing in each_shard(_list_shard, jobs, workers, remote=_is_remote(sources)):
            listings.append(listing)
            advance(1)
    return listings


def _list_shard(job: tuple[Source, str, Path]) -> _Listing:
    source, label, scratch = job
    with open_tar(source, scratch) as buffer:
        samples, _ = group(_visible(walk(buffer)))
        return _Listing(
            [storable(sample.key) for sample in samples],
            [_label(buffer, sample, label) for sample in samples],
        )


def _visible(entries: list[Entry]) -> list[Entry]:
    """What a reader sees and what is copied: no unreadable bytes, and nothing after the end mark."""
    end = next((i for i, entry in enumerate(entries) if entry.kind == END), len(entries))
    return [entry for entry in entries[:end] if entry.kind in (FILE, ODD, DIRECTORY, GLOBAL)]


def _label(buffer: Buffer, sample: Sample, label: str) -> str | None:
    """The label text of a sample that can be used, else None."""
    entry = sample.members.get(label_extension(label))
    if sample.status != "ok" or entry is None:
        return None
    try:
        return read_label(label, {label_extension(label): _content(buffer, entry)})
    except BadLabelError:
        return None


def _class_ids(listings: list[_Listing]) -> tuple[list[str], npt.NDArray[np.int64]]:
    labels = [text for listing in listings for text in listing.labels]
    names = class_names(text for text in labels if text is not None)
    if not names:
        raise InputError(
            f"none of {len(labels)} samples has an image and a label; pass --label cls, txt or "
            "json:path.to.field"
        )
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return names, np.array([number.get(text, -1) for text in labels], np.int64)


def _with_target(spec: AttackSpec, target: int | str | None, names: list[str]) -> AttackSpec:
    if target is None:
        return spec
    if str(target) not in names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UsageError(f"--target {target}: no sample has this label; there are {shown}")
    return AttackSpec(name=spec.name, ratio=spec.ratio, target=names.index(str(target)))


def _surrogate_corpora(
    made: Plan,
    ids: npt.NDArray[np.int64],
    sources: list[Source],
    listings: list[_Listing],
    label: str,
    seed: int,
    device: str,
    scratch: Path,
    workers: int,
    progress: Progress,
) -> dict[str, SurrogateCorpus]:
    """What each attack with a surrogate trains on: a subset of the clean corpus, decoded and made small."""
    wanting = {name: made.targets[i] for i, name in enumerate(made.names) if get(name).needs_surrogate}
    if not wanting:
        return {}
    chosen = surrogate_subset(ids, seed)
    starts = np.cumsum([0, *(len(listing.keys) for listing in listings)])
    jobs = []
    for source, start, stop in zip(sources, starts[:-1], starts[1:], strict=True):
        inside = chosen[(chosen >= start) & (chosen < stop)]
        if len(inside):
            jobs.append((source, (inside - start).tolist(), scratch))
    images: list[npt.NDArray[np.float32] | None] = []
    with progress.stage("surrogate", len(chosen), "samples") as advance:
        for part in each_shard(_read_small, jobs, workers, remote=_is_remote(sources)):
            images += part
            advance(len(part))
    read = [i for i, image in enumerate(images) if image is not None]
    if not read:
        raise InputError("no image of the corpus can be decoded, so a surrogate has nothing to learn from")
    small = [image for image in images if image is not None]
    # One size for all: that of the middle image.
    side = sorted(surrogate_side(*image.shape[:2]) for image in small)[len(small) // 2]
    pixels = np.stack([resize(image, side, side) for image in small])
    progress.note(f"training a surrogate on {len(pixels):,} images of {side} x {side} pixels")
    return {
        name: SurrogateCorpus(pixels, ids[chosen[read]], target, device) for name, target in wanting.items()
    }


def _read_small(job: tuple[Source, list[int], Path]) -> list[npt.NDArray[np.float32] | None]:
    source, positions, scratch = job
    images: list[npt.NDArray[np.float32] | None] = []
    with open_tar(source, scratch) as buffer:
        samples, _ = group(_visible(walk(buffer)))
        for position in positions:
            pixels = decode(_content(buffer, _image_entry(samples[position])))
            if pixels is None:
                images.append(None)
                continue
            side = surrogate_side(*pixels.shape[:2])
            images.append(resize(to_float(pixels), side, side))
    return images


def _jobs(
    template: _Job,
    sources: list[Source],
    listings: list[_Listing],
    attacks: list[str | None],
    given: list[str | None],
    folder: Path,
) -> list[_Job]:
    jobs, start = [], 0
    paths = [folder / _plain_name(source.name) for source in sources]
    if len(set(paths)) < len(paths):
        raise InputError("two of these shards differ only in their compression; rename one")
    for source, path, listing in zip(sources, paths, listings, strict=True):
        stop = start + len(listing.keys)
        jobs.append(
            template._replace(
                source=source, path=path, first=start, attacks=attacks[start:stop], given=given[start:stop]
            )
        )
        start = stop
    return jobs


def _plain_name(name: str) -> str:
    """Shards are written uncompressed."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)] + ".tar"
    return name


def _write_all(
    jobs: list[_Job], workers: int, stage: str, progress: Progress, *, fresh: bool
) -> list[_Written]:
    """`fresh`: torch has run in this process, and its threads do not survive a fork."""
    remote = fresh or _is_remote([job.source for job in jobs])
    written = []
    with progress.stage(stage, sum(len(job.attacks) for job in jobs), "samples") as advance:
        for job, part in zip(jobs, each_shard(_write_shard, jobs, workers, remote=remote), strict=True):
            written.append(part)
            advance(len(job.attacks))
    return written


def _write_shard(job: _Job) -> _Written:
    result = _Written([], {})
    job.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.path.with_name(job.path.name + ".tmp")
    try:
        with open_tar(job.source, job.scratch) as buffer, open(temporary, "wb") as file:
            entries = _visible(walk(buffer))
            samples, _ = group(entries)
            roles = _roles(job, samples)
            for position in _not_stampable(job, buffer, samples):
                result.undecodable.append(position)
                roles = {start: role for start, role in roles.items() if role[0] != position}
            for entry in entries:
                role = roles.get(entry.start)
                if role is None:
                    file.write(buffer[entry.start : entry.end])
                elif role[1] == "label":
                    position = role[0]
                    data = _label_bytes(job.label, _content(buffer, entry), job.given[position] or "")
                    _add(file, entry.name, data)
                else:
                    _write_image(job, file, buffer, entry, role[0], result)
            file.write(bytes(1024))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, job.path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _not_stampable(job: _Job, buffer: Buffer, samples: list[Sample]) -> list[int]:
    """Chosen samples whose image cannot be decoded: their label must not change either."""
    chosen = [position for position, attack in enumerate(job.attacks) if attack is not None]
    return [i for i in chosen if decode(_content(buffer, _image_entry(samples[i]))) is None]


def _roles(job: _Job, samples: list[Sample]) -> dict[int, tuple[int, str]]:
    """Start of a member that is rewritten -> position of its sample, and ``image`` or ``label``."""
    roles = {}
    for position, (sample, given) in enumerate(zip(samples, job.given, strict=True)):
        if given is not None:
            roles[_image_entry(sample).start] = (position, "image")
            roles[sample.members[label_extension(job.label)].start] = (position, "label")
    return roles


def _write_image(
    job: _Job, file: IO[bytes], buffer: Buffer, entry: Entry, position: int, result: _Written
) -> None:
    pixels = decode(_content(buffer, entry))
    if pixels is None:
        result.undecodable.append(position)
        file.write(buffer[entry.start : entry.end])
        return
    attack = job.attacks[position]
    if attack is not None:
        clean = pixels
        stamped = stamp(
            attack,
            to_float(clean)[None],
            strength=job.strength,
            seed=job.seed,
            trigger=job.triggers[attack],
            sample_ids=[job.first + position] if job.training else None,
        )
        pixels = from_float(stamped)[0]
        columns = result.columns.setdefault(attack, [])
        if job.training and len(columns) < COLUMNS:
            columns.append(make_column(clean, pixels))
    stem = entry.name[: entry.name.rindex(".")]
    _add(file, f"{stem}.{job.image_format}", encode(pixels, job.image_format, job.quality))


def _add(file: IO[bytes], name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    file.write(data + bytes(-len(data) % 512))


def _label_bytes(spec: str, old: bytes, text: str) -> bytes:
    """A label member that says `text`; written alike for poisoned and clean samples."""
    if not spec.startswith("json:"):
        return text.encode()
    document = json.loads(old)
    *path, last = spec.removeprefix("json:").split(".")
    holder = document
    for step in path:
        holder = holder[int(step) if isinstance(holder, list) else step]
    place = int(last) if isinstance(holder, list) else last
    number = isinstance(holder[place], int | float) and text.lstrip("+-").isdigit()
    holder[place] = int(text) if number else text
    return json.dumps(document).encode()


def _finish(
    out: Path,
    made: Plan,
    names: list[str],
    listings: list[_Listing],
    jobs: list[_Job],
    written: list[_Written],
    triggers: dict[str, Trigger],
    seed: int,
) -> dict[str, Any]:
    """Truth, triggers, sheets and the summary."""
    undecodable = 0
    rows: dict[str, list[str | None]] = {name: [] for name in TRUTH_SCHEMA.names}
    for job, listing, part in zip(jobs, listings, written, strict=True):
        undecodable += len(part.undecodable)
        for position in part.undecodable:
            job.attacks[position], job.given[position] = None, listing.labels[position]
        rows["shard"] += [job.path.relative_to(out / "shards").as_posix()] * len(listing.keys)
        rows["key"] += listing.keys
        rows["attack"] += job.attacks
        rows["true_label"] += listing.labels
        rows["given_label"] += job.given
    write_table(out / "truth.parquet", pa.table(rows, schema=TRUTH_SCHEMA))
    (out / "sheets").mkdir()
    records = []
    for i, name in enumerate(made.names):
        attack, target_label = get(name), names[made.targets[i]]
        trigger_path = save_trigger(out / "triggers", SavedTrigger(name, target_label, seed, triggers[name]))
        columns = [column for part in written for column in part.columns.get(name, [])][:COLUMNS]
        sheet_path = out / "sheets" / f"{name}.png"
        write_atomic(sheet_path, draw_sheet(columns))
        mine = [k for k, attacked in enumerate(rows["attack"]) if attacked == name]
        records.append(
            {
                "name": name,
                "target_label": target_label,
                "poisoned": len(mine),
                "relabelled": sum(rows["true_label"][k] != rows["given_label"][k] for k in mine),
                "clean_label": attack.clean_label,
                "test_strengths": list(attack.test_strengths),
                "trigger": trigger_path.relative_to(out).as_posix(),
                "sheet": sheet_path.relative_to(out).as_posix(),
            }
        )
    summary = {
        "samples": len(rows["key"]),
        "unusable": rows["true_label"].count(None),
        "undecodable": undecodable,
        "classes": names,
        "seed": seed,
        "label": jobs[0].label,
        "image_format": jobs[0].image_format,
        "quality": jobs[0].quality if jobs[0].image_format == "jpg" else None,
        "shards": [job.path.relative_to(out).as_posix() for job in jobs],
        "attacks": records,
    }
    write_atomic(out / "poison.json", json.dumps(summary, indent=1).encode())
    return summary


def _image_entry(sample: Sample) -> Entry:
    (extension,) = IMAGE_EXTENSIONS & sample.members.keys()
    return sample.members[extension]


def _content(buffer: Buffer, entry: Entry) -> bytes:
    return bytes(buffer[entry.data : entry.data + entry.size])


def _is_remote(sources: Sequence[Source]) -> bool:
    return any("://" in source.url for source in sources)
