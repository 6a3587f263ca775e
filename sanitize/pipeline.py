"""The story of a scan, top to bottom. Open this first.

    shards, trusted ─ index ─▶ index.parquet ─ pixels ─▶ pixels/pixels.npy ─ train ─▶ trajectories.npy
      ─ second-opinion ─▶ second_opinion.npy (for methods that ask for it)
      ─ scores ─▶ scores.npy, signals.parquet, groups.json ─ decision ─▶ decisions.parquet ─ shards ─▶
      kept/, quarantine/ ─ report ─▶ report.html, report.json

Every stage reads files of the run folder and leaves files there; a stage that is marked done is not run
again. `scan` runs them all, `filter_run` the last three, `rebuild_report` the last one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import sanitize
from sanitize import scores
from sanitize.config import MIN_TRUSTED, CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
from sanitize.corpus import index as index_module
from sanitize.corpus import pixels as pixels_module
from sanitize.corpus.sources import Source, distinct_names, expand, fingerprint
from sanitize.corpus.writer import write_shards
from sanitize.errors import InputError, RunFolderError, UsageError
from sanitize.progress import Progress, Silent
from sanitize.reporting.build import Report, build_report
from sanitize.rundir import RunDir, disk_errors, write_atomic, write_table
from sanitize.scores import ScoreInputs, decide

if TYPE_CHECKING:
    from torch import nn

    from sanitize.dynamics import proxy as proxy_module

INDEX = "index.parquet"
PIXELS = "pixels/pixels.npy"
TRAJECTORIES = "trajectories.npy"
CHECKPOINT = "proxy.pt"
SECOND_OPINION = "second_opinion.npy"
SECOND_CHECKPOINT = "second_opinion.pt"
SCORES = "scores.npy"
SIGNALS = "signals.parquet"
GROUPS = "groups.json"
DECISION_SCORES = "decision_scores.npy"
DECISIONS = "decisions.parquet"
AFTER_SCORES = ("decision", "shards", "report")


def run_scan(config: ScanConfig, out: Path, progress: Progress | None = None) -> Report:
    """Scan a corpus into the run folder `out`, or go on with a scan that was interrupted there.

    Raises:
        SanitizeError: see errors.py; what was finished before still stands.
    """
    progress = progress or Silent()
    check_choices(config)
    corpus, trusted = find_sources(config.corpus)
    with RunDir.create(out, config.to_dict(), _versions()) as run:
        run.clear_temporary()
        _check_same_shards(run, corpus + trusted)
        _index(run, config.corpus, corpus, trusted, progress)
        _pixels(run, config, corpus + trusted, progress)
        _train(run, config, progress)
        second_opinion(run, config.decision.method, config.proxy.seed, progress)
        _scores(run, config.decision.method, config.proxy.seed)
        if _decided_differently(run, config.decision):
            run.forget(*AFTER_SCORES)
        _decide(run, config.decision)
        _write(run, corpus, progress)
        return _report(run)


def check_choices(config: ScanConfig) -> None:
    """Refuse a method, proxy or device that does not exist now, not after an hour of decoding."""
    from sanitize.dynamics import proxy as proxy_module

    scores.load(config.decision.method)
    setup = proxy_module.setup(config.proxy, samples=0)
    if config.corpus.resolution:
        proxy_module.check_fits(setup.proxy, config.corpus.resolution)


def filter_run(
    out: Path, decision: DecisionConfig, allow_pipe: bool = False, progress: Progress | None = None
) -> Report:
    """Make a new decision, new shards and a new report from a run whose training is done.

    Only a method that asks for the second model, which this run does not have yet, trains anything.

    Raises:
        UsageError: the shards come from commands and `allow_pipe` is not set, whatever the scan was told:
            a run folder may be a stranger's.
    """
    progress = progress or Silent()
    scores.load(decision.method)
    with RunDir.open(out) as run:
        config = _finished_config(run)
        corpus = _recorded_sources(run)
        if not allow_pipe and any(source.url.startswith("pipe:") for source in corpus):
            raise UsageError(f"the shards of {out} come from pipe: commands; pass --allow-pipe to run them")
        run.clear_temporary()
        _check_same_shards(run, corpus, with_trusted=False)
        table = pq.read_table(run / INDEX, columns=["label", "class_id", "trusted", "status"])
        _check_enough(table, decision)
        if not _is_scored(run, decision.method):
            _check_memory(table, decision.method)
        second_opinion(run, decision.method, config.proxy.seed, progress)
        _scores(run, decision.method, config.proxy.seed)
        run.forget(*AFTER_SCORES)
        _decide(run, decision)
        _write(run, corpus, progress)
        return _report(run)


def decision_of(out: Path) -> DecisionConfig:
    """The decision that the scan of a run folder was told to make."""
    with RunDir.open(out) as run:
        return _finished_config(run).decision


def rebuild_report(out: Path) -> Report:
    """Build the report of a finished run again."""
    with RunDir.open(out) as run:
        _finished_config(run)
        if not run.is_done("shards"):
            raise InputError(f"{out}: the scan did not finish; run the same sanitize scan command again")
        run.forget("report")
        return _report(run)


def find_sources(config: CorpusConfig) -> tuple[list[Source], list[Source]]:
    """The corpus shards and the trusted shards, all with distinct names."""
    corpus = expand(config.shards, allow_pipe=config.allow_pipe)
    trusted = expand(config.trusted, allow_pipe=config.allow_pipe)
    return corpus, distinct_names(trusted, corpus)


def _recorded_sources(run: RunDir) -> list[Source]:
    """The corpus shards as the index found them.

    Raises:
        InputError: a shard is called something that would be written outside the run folder, which only a
            manifest that was tampered with does.
    """
    for record in run.manifest["shards"]:
        if Path(record["name"]).is_absolute() or ".." in Path(record["name"]).parts:
            raise InputError(f"{run.path}: manifest.json names a shard {record['name']!r}; do not trust it")
    return [
        Source(record["name"], record["url"], record["compression"])
        for record in run.manifest["shards"]
        if not record["trusted"]
    ]


def _index(
    run: RunDir, config: CorpusConfig, corpus: list[Source], trusted: list[Source], progress: Progress
) -> None:
    if run.is_done("index"):
        return
    with run.stage("index") as facts:
        index = index_module.build_index(
            corpus, trusted, label=config.label, scratch=_scratch(run), workers=cores(), progress=progress
        )
        write_table(run / INDEX, index.table)
        run.manifest |= {"class_names": index.class_names, "shards": index.shards, "notes": index.notes}
        facts["rows"] = index.table.num_rows


def _pixels(run: RunDir, config: ScanConfig, sources: list[Source], progress: Progress) -> None:
    if run.is_done("pixels") and ((run / PIXELS).exists() or run.is_done("train")):
        return
    with run.stage("pixels") as facts:
        table = pq.read_table(run / INDEX)
        if "resolution" not in run.manifest:  # decoding changes what the choice is made from
            side = pixels_module.median_side(sources, table, _scratch(run))
            resolution = config.corpus.resolution or pixels_module.choose_resolution(side)
            run.manifest |= {"resolution": resolution, "median_side": side}
            run.save()
        resolution, side = run.manifest["resolution"], run.manifest["median_side"]
        _check_before_decoding(table, config, resolution)
        table = pixels_module.decode_all(
            sources,
            table,
            run / PIXELS,
            resolution,
            scratch=_scratch(run),
            workers=cores(),
            progress=progress,
        )
        _check_enough(table, config.decision)
        write_table(run / INDEX, table)
        facts |= {"resolution": resolution, "median_side": side}


def _check_before_decoding(table: pa.Table, config: ScanConfig, resolution: int) -> None:
    """Refuse what could not work in the end before the long part begins."""
    from sanitize.dynamics import proxy as proxy_module

    _check_enough(table, config.decision)
    _check_memory(table, config.decision.method)
    proxy_module.check_fits(proxy_module.setup(config.proxy, table.num_rows).proxy, resolution)


def _check_enough(table: pa.Table, config: DecisionConfig) -> None:
    """Raise unless there are enough trusted samples for the decision, and classes to tell apart."""
    usable = pc.equal(table["status"], "ok")
    trusted = pc.sum(pc.and_(usable, table["trusted"])).as_py()
    needed = getattr(scores.load(config.method), "MIN_TRUSTED", MIN_TRUSTED)
    if trusted < needed:
        raise InputError(
            f"{trusted} trusted samples can be used and --method {config.method} needs {needed}; "
            "add some to --trusted"
        )
    decide.check_alpha(config.alpha, trusted)
    classes = len(pc.unique(table.filter(pc.and_(usable, pc.invert(table["trusted"])))["class_id"]))
    if classes < 2:
        raise InputError(
            f"the corpus images that can be decoded have {classes} labels; at least 2 are needed"
        )


def _check_memory(table: pa.Table, method: str) -> None:
    """Raise where a class is too large to look for groups in it on this machine."""
    from sanitize.scores.class_mixtures import SAMPLE_BYTES

    if not scores.searches_groups(method):
        return
    label, count = largest_label(table.filter(pc.equal(table["status"], "ok"))["label"])
    needed, there = count * SAMPLE_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{count:,} samples are labelled {label!r}, and to look for groups among them takes about "
            f"{needed / 1e9:.0f} GB of memory; this machine has {there / 1e9:.0f}. Scan the corpus in parts, "
            "or take --method label-conflict, which looks for no groups"
        )


def largest_label(labels: pa.ChunkedArray) -> tuple[str, int]:
    """The label that most samples have, and how many."""
    counts = pc.value_counts(labels)
    largest = counts[int(counts.field("counts").to_numpy().argmax())].as_py()
    return largest["values"], largest["counts"]


def _train(run: RunDir, config: ScanConfig, progress: Progress) -> None:
    if run.is_done("train"):
        return
    from sanitize.dynamics import proxy as proxy_module
    from sanitize.dynamics.trajectories import kept_epochs, open_trajectories

    with run.stage("train") as facts:
        samples = _samples(run)
        setup = proxy_module.setup(config.proxy, len(samples.rows))
        _check_same_setup(run, setup)
        trajectories = open_trajectories(run / TRAJECTORIES, config.proxy.epochs, len(samples.pixels))
        with proxy_module.gpu_memory(setup.device):
            epoch_loss, accuracy = proxy_module.train(
                samples, config.proxy, setup, trajectories, run / CHECKPOINT, progress
            )
        run.manifest["training"] = {
            **asdict(setup),
            "epochs": config.proxy.epochs,
            "trajectory": config.proxy.trajectory,
            "resolution": samples.pixels.shape[1],
            "epoch_loss": epoch_loss,
            "accuracy": accuracy,
            "kept_epochs": kept_epochs(epoch_loss),
        }
        facts["samples"] = len(samples.rows)


def _samples(run: RunDir) -> proxy_module.Samples:
    from sanitize.dynamics import proxy as proxy_module

    table = pq.read_table(run / INDEX, columns=["class_id", "status"])
    return proxy_module.Samples(
        pixels=np.load(run / PIXELS, mmap_mode="r"),
        class_id=table["class_id"].to_numpy(),
        rows=np.flatnonzero(pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False)),
        classes=len(run.manifest["class_names"]),
    )


def _check_same_setup(run: RunDir, setup: proxy_module.Setup, name: str = "setup") -> None:
    """A training that began on a GPU cannot go on without one and end with the same arrays."""
    began = run.manifest.setdefault(name, asdict(setup))
    if began != asdict(setup):
        raise RunFolderError(
            f"{run.path} was begun with {began}, this machine would go on with {asdict(setup)}: "
            "the losses would not be comparable. Go on where it was begun, or give another --out"
        )
    run.save()


def second_opinion(run: RunDir, method: str, seed: int, progress: Progress) -> None:
    """Train the second model and store its losses, if `method` asks for them and they are not there."""
    if run.is_done("second-opinion") or not scores.needs_second_opinion(method):
        return
    from sanitize.dynamics import proxy as proxy_module
    from sanitize.dynamics import second_opinion as second_module

    _check_there(run, PIXELS)
    with run.stage("second-opinion") as facts:
        samples = _samples(run)
        device = run.manifest["config"]["proxy"]["device"]
        config = ProxyConfig(proxy=run.manifest["training"]["proxy"], device=device)
        setup = proxy_module.setup(config, len(samples.rows))
        _check_same_setup(run, setup, "second_setup")
        values = np.full(len(samples.pixels), np.nan, np.float32)
        with proxy_module.gpu_memory(setup.device):
            values[samples.rows] = second_module.losses(
                samples, seed, setup, run / SECOND_CHECKPOINT, progress
            )
        _save_array(run / SECOND_OPINION, values)
        facts |= {"samples": len(samples.rows), "epochs": second_module.EPOCHS}


def _scores(run: RunDir, method: str, seed: int) -> None:
    """Score by `method`, unless it gave the scores that are there."""
    if _is_scored(run, method):
        return
    from sanitize.dynamics.proxy import gpu_memory

    with run.stage("scores") as facts:
        inputs, rows, total = score_inputs(run, seed)
        with gpu_memory(run.manifest["training"]["device"]):
            found = scores.evidence(method, inputs)
        run.forget("scores", *AFTER_SCORES)  # only now: a method that cannot score leaves the run as it was
        values = np.full(total, np.nan, np.float32)
        values[rows] = found.score
        _save_array(run / SCORES, values)
        write_table(run / SIGNALS, pa.table({"row": rows, **found.signals}))
        names = run.manifest["class_names"]
        groups = [_group_record(group, rows, names) | {"suspected": True} for group in found.groups or []]
        groups += [_group_record(group, rows, names) | {"suspected": False} for group in found.shared_groups]
        write_atomic(run / GROUPS, json.dumps(groups, indent=1).encode())
        facts |= {"method": method, "groups_sought": found.groups is not None}


def _is_scored(run: RunDir, method: str) -> bool:
    scored_by = run.manifest["stages"].get("scores", {}).get("method")
    return bool(scored_by == method and (run / SIGNALS).exists())  # older versions left no signals


def _group_record(group: scores.Group, rows: npt.NDArray[np.intp], class_names: list[str]) -> dict[str, Any]:
    """A group for groups.json; `rows` there are rows of the index, the surest members first."""
    order = np.argsort(-group.log_odds, kind="stable")
    return {
        "class_id": group.class_id,
        "label": class_names[group.class_id],
        "signal": group.signal,
        "separation": round(group.separation, 3),
        "trusted": group.trusted,
        "rows": rows[group.rows[order]].tolist(),
    }


def score_inputs(run: RunDir, seed: int) -> tuple[ScoreInputs, npt.NDArray[np.intp], int]:
    """What a method sees, the index rows it sees it of, and how many rows the index has."""
    from sanitize.dynamics.trajectories import columns

    table = pq.read_table(run / INDEX, columns=["class_id", "trusted", "status"])
    losses = np.load(run / TRAJECTORIES, mmap_mode="r")
    kept = run.manifest["training"]["kept_epochs"]
    rows = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False))
    values = columns(losses, kept, rows)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    inputs = ScoreInputs(
        trajectories=np.ascontiguousarray(values[finite]),
        class_id=table["class_id"].to_numpy()[rows[finite]],
        trusted=table["trusted"].to_numpy(zero_copy_only=False)[rows[finite]],
        seed=seed,
        gpu=run.manifest["training"]["device"] == "cuda",
        images=lambda: _images(run, rows[finite]),
        activations=lambda: _activations(run, rows[finite]),
        second_opinion=lambda: _second_losses(run, rows[finite]),
        network=lambda: _network(run),
    )
    return inputs, rows[finite], table.num_rows


def _images(run: RunDir, rows: npt.NDArray[np.intp]) -> scores.Images:
    _check_there(run, PIXELS)
    pixels: npt.NDArray[np.uint8] = np.load(run / PIXELS, mmap_mode="r")
    return pixels if len(rows) == len(pixels) else pixels_module.SomeRows(pixels, rows)


def _second_losses(run: RunDir, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    # A loss that is not finite is no evidence: the sample counts as believed.
    losses: npt.NDArray[np.float32] = np.nan_to_num(np.load(run / SECOND_OPINION)[rows], nan=0, posinf=0)
    return losses


def _activations(run: RunDir, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    from sanitize.scores.network import activations

    return activations(_network(run), np.load(run / PIXELS, mmap_mode="r"), rows)


def _network(run: RunDir) -> nn.Module:
    from sanitize.dynamics import proxy as proxy_module

    _check_there(run, PIXELS, CHECKPOINT)
    stored = run.manifest["training"]
    # The losses belong to the machine that measured them; the finished network runs on any.
    device = "cpu" if run.manifest["config"]["proxy"]["device"] == "cpu" else "auto"
    resolved = proxy_module.setup(ProxyConfig(proxy=stored["proxy"], device=device), 0)
    return proxy_module.trained(_samples(run), resolved, run / CHECKPOINT)


def _check_there(run: RunDir, *names: str) -> None:
    for name in names:
        if not (run / name).exists():
            raise InputError(
                f"{run / name} is gone and this --method looks at it; scan again into a new --out, or "
                "take a method that needs only the trajectories"
            )


def _decide(run: RunDir, config: DecisionConfig) -> None:
    if run.is_done("decision"):
        return
    with run.stage("decision"):
        seed = run.manifest["config"]["proxy"]["seed"]
        inputs, rows, total = score_inputs(run, seed)
        raw = np.load(run / SCORES)[rows]
        made = decide.decide(raw, inputs.class_id, inputs.trusted, config)
        found = pq.read_table(run / SIGNALS)
        signals = {
            "score": raw,
            **decide.signals(inputs.trajectories),
            **{name: found[name].to_numpy() for name in found.column_names if name != "row"},
        }
        flagged = np.flatnonzero(made.flagged)
        table = pq.read_table(run / INDEX)
        table = table.slice(0, int((~table["trusted"].to_numpy(zero_copy_only=False)).sum()))
        scored = _Scatter(rows, table.num_rows)
        status = np.array(table["status"].to_pylist(), dtype=object)
        status[(status == "ok") & ~scored.covered] = "loss-not-finite"
        reason = np.array([None if code == "ok" else index_module.STATUS[code] for code in status], object)
        reason[rows[flagged]] = decide.reasons(inputs, signals, flagged)
        groups = [group for group in json.loads((run / GROUPS).read_text()) if group.get("suspected", True)]
        for group in reversed(groups):  # the crispest has the last word
            members = np.intersect1d(group["rows"], rows[flagged])
            reason[members] = decide.group_reason(group)
        is_flagged = scored(made.flagged, False) | (status != "ok")
        decisions = table.select(["sample_id", "shard", "key", "label"])
        decisions = decisions.append_column("status", pa.array(status.tolist(), pa.string()))
        for name, values in {
            "anomaly_score": decide.anomaly_scores(made.score, inputs.trusted),
            "p_value": made.p_value,
        }.items():
            decisions = decisions.append_column(name, scored.nullable(values))
        decisions = decisions.append_column("flagged", pa.array(is_flagged))
        decisions = decisions.append_column("reason", pa.array(reason.tolist(), pa.string()))
        for name, values in signals.items():
            decisions = decisions.append_column(name, scored.nullable(values))
        everything = np.full(total, np.nan, np.float32)
        everything[rows] = made.score
        _save_array(run / DECISION_SCORES, everything)
        write_table(run / DECISIONS, decisions)
        run.manifest["decision"] = {
            **asdict(config),
            "threshold": made.threshold,
            "flagged": int(made.flagged.sum()),
            "spared_by_cap": made.spared_by_cap,
            "trusted_flagged_ratio": made.trusted_flagged_ratio,
        }


class _Scatter:
    """Puts values of the scored rows into columns over all corpus rows; trusted rows fall away."""

    def __init__(self, rows: npt.NDArray[np.intp], corpus_rows: int) -> None:
        self._corpus = rows < corpus_rows
        self._rows = rows[self._corpus]
        self.covered = np.zeros(corpus_rows, bool)
        self.covered[self._rows] = True

    def __call__(self, values: npt.NDArray[Any], fill: Any) -> npt.NDArray[Any]:
        column = np.full(len(self.covered), fill, values.dtype)
        column[self._rows] = values[self._corpus]
        return column

    def nullable(self, values: npt.NDArray[np.float32]) -> pa.Array:
        return pa.array(self(values, 0), pa.float32(), mask=~self.covered)


def _write(run: RunDir, corpus: list[Source], progress: Progress) -> None:
    if run.is_done("shards"):
        return
    with run.stage("shards"):
        table = pq.read_table(run / INDEX)
        flagged = pq.read_table(run / DECISIONS, columns=["flagged"])["flagged"].to_numpy(
            zero_copy_only=False
        )
        records = write_shards(
            corpus,
            table,
            flagged,
            run.path,
            scratch=_scratch(run),
            workers=cores(),
            progress=progress,
            digests={record["name"]: record["sha256"] for record in run.manifest["shards"]},
        )
        run.manifest["outputs"] = {"shards": records}


def _report(run: RunDir) -> Report:
    if run.is_done("report"):
        report = build_report(run)
    else:
        with run.stage("report"):
            report = build_report(run)
    shutil.rmtree(_scratch(run))
    return report


def _finished_config(run: RunDir) -> ScanConfig:
    if not run.is_done("train"):
        raise InputError(
            f"{run.path}: the scan has not finished training; run the same sanitize scan command again"
        )
    return ScanConfig.from_dict(run.manifest["config"])


def _decided_differently(run: RunDir, config: DecisionConfig) -> bool:
    """Whether `sanitize filter` was used on this run after the scan, be it that it was killed half-way."""
    made = run.manifest.get("decision", {})
    scored_by = run.manifest["stages"].get("scores", {}).get("method", config.method)
    wanted = asdict(config)
    return scored_by != config.method or any(made.get(name, wanted[name]) != wanted[name] for name in wanted)


def _check_same_shards(run: RunDir, sources: list[Source], with_trusted: bool = True) -> None:
    """The shards of a run that goes on must be the ones it was begun with, as far as the storage tells."""
    if not run.is_done("index"):
        return
    names = {source.name for source in sources}
    stored = {r["name"]: r for r in run.manifest["shards"] if with_trusted or not r["trusted"]}
    changed = sorted(stored.keys() ^ names)
    for source in sources:
        size, mtime_ns = fingerprint(source)
        record = stored.get(source.name)
        if record and ((size and record["bytes"] != size) or record["mtime_ns"] != mtime_ns):
            changed.append(source.name)
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise RunFolderError(
            f"{run.path} belongs to other shards: {', '.join(changed[:5])}{more} changed, appeared or went "
            "since it was begun; give another --out"
        )


def _scratch(run: RunDir) -> Path:
    path = run / ".scratch"
    with disk_errors(run.path):
        path.mkdir(exist_ok=True)
    return path


def _save_array(path: Path, values: npt.NDArray[np.float32]) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomic(path, buffer.getvalue())


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "webdataset", "numpy", "pyarrow", "pillow", "scikit-learn")
    found = {"sanitize": sanitize.__version__, "python": platform.python_version()}
    for name in (*names, "faiss-gpu", "faiss-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
