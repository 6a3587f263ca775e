"""One scan of a corpus, and what each method would remove from it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sanitize import scores
from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
from sanitize.pipeline import INDEX, PIXELS, run_scan, score_inputs, second_opinion
from sanitize.progress import Progress
from sanitize.rundir import RunDir
from sanitize.scores import decide

Facts = dict[str, Any]
NO_DECISION = DecisionConfig(method="random-removal", alpha=None, reject=1e-9)
"""Flags nothing: every method decides on the trajectories of the scan."""


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """The usable samples of a scanned corpus, without the trusted ones."""

    run: Path
    """Its run folder."""
    rows: npt.NDArray[np.intp]
    """(N,) of the index."""
    class_id: npt.NDArray[np.int32]
    """(N,) given labels."""
    attack: npt.NDArray[np.object_]
    """(N,) name of the attack a sample carries, None for a clean one."""
    class_names: list[str]
    pixels: npt.NDArray[np.uint8]
    """(M, R, R, 3) of all index rows."""
    scan_s: float


def scan_once(
    corpus: CorpusConfig,
    proxy: ProxyConfig,
    run: Path,
    progress: Progress,
    truth: Mapping[tuple[str, str], str | None] | None = None,
) -> Scanned:
    """Scan a corpus into the folder `run`, or take up the scan that is there.

    Args:
        truth: attack of every sample, by shard and key; None: nothing is poisoned.
    """
    run_scan(ScanConfig(corpus=corpus, proxy=proxy, decision=NO_DECISION), run, progress)
    table = pq.read_table(run / INDEX)
    usable = pc.and_(pc.equal(table["status"], "ok"), pc.invert(table["trusted"]))
    rows = np.flatnonzero(usable.to_numpy(zero_copy_only=False))
    attack = np.full(len(rows), None, object)
    if truth is not None:
        samples = table.select(["shard", "key"]).take(rows).to_pylist()
        attack[:] = [truth[sample["shard"], sample["key"]] for sample in samples]
    manifest = json.loads((run / "manifest.json").read_text())
    return Scanned(
        run=run,
        rows=rows,
        class_id=table["class_id"].to_numpy()[rows],
        attack=attack,
        class_names=manifest["class_names"],
        pixels=np.load(run / PIXELS, mmap_mode="r"),
        scan_s=sum(manifest["stages"][stage]["seconds"] for stage in ("index", "pixels", "train")),
    )


def flagged_by(
    decision: DecisionConfig, scanned: Scanned, seed: int, progress: Progress
) -> tuple[npt.NDArray[np.bool_], Facts]:
    """(N,) what a method flags, and how: its decision, its AUROC for each attack, its seconds.

    The seconds of a second model count for each method that asks for it, though it is trained once.
    """
    with RunDir.open(scanned.run) as run:
        second_opinion(run, decision.method, seed, progress)
        asked = scores.needs_second_opinion(decision.method)
        second_s = run.manifest["stages"]["second-opinion"]["seconds"] if asked else 0.0
        began = time.monotonic()
        inputs, rows, total = score_inputs(run, seed)
        raw = scores.score(decision.method, inputs)
        made = decide.decide(raw, inputs.class_id, inputs.trusted, decision)
        seconds = time.monotonic() - began
    everywhere = np.zeros(total, bool)
    everywhere[rows] = made.flagged
    facts = {
        "decision": dataclasses.asdict(decision),
        "auroc": _aurocs(raw, rows, scanned),
        "score_s": round(seconds + second_s, 2),
    }
    return everywhere[scanned.rows], facts


def _aurocs(raw: npt.NDArray[np.float32], rows: npt.NDArray[np.intp], scanned: Scanned) -> dict[str, float]:
    """Per attack, the chance that its sample scores higher than a clean one."""
    from scipy.stats import rankdata

    scored = np.isin(scanned.rows, rows)
    values = np.full(int(scanned.rows.max()) + 1, np.nan, np.float32)
    inside = rows < len(values)
    values[rows[inside]] = raw[inside]
    mine, attack = values[scanned.rows[scored]], scanned.attack[scored]
    clean = mine[np.array([name is None for name in attack], bool)]
    found = {}
    for name in sorted({name for name in attack if name is not None}):
        poison = mine[attack == name]
        ranks = rankdata(np.concatenate([poison, clean]))[: len(poison)]
        above = ranks.sum() - len(poison) * (len(poison) + 1) / 2
        found[name] = float(above / (len(poison) * len(clean)))
    return found
