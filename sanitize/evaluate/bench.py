"""`sanitize bench`: poison, scan once, and for every method decide, retrain and measure; over several seeds.

    OUT/settings.json                what may not change between runs into the same folder
    OUT/seed-0/poisoned/             of `sanitize poison`       OUT/seed-0/run/   the scan all methods share
    OUT/seed-0/cells/METHOD.json     one measured cell; what is there is not measured again
    OUT/bench.json, bench.md, bench.html

Four controls are always in: no defence, the floor (exactly the poison removed), random removal, and the
corpus without any poison.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

import sanitize
from sanitize import scores
from sanitize.attacks import get
from sanitize.attacks.plant import AttackSpec
from sanitize.attacks.poison import poison
from sanitize.attacks.trigger_file import load_trigger
from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
from sanitize.errors import InputError, RunFolderError, UsageError
from sanitize.evaluate import metrics, tables
from sanitize.evaluate.images import Encoded, decode_all, read_encoded
from sanitize.evaluate.retrain import Recipe, predict, recipe, retrain
from sanitize.pipeline import INDEX, PIXELS, cores, run_scan, score_inputs
from sanitize.progress import Progress, Silent
from sanitize.rundir import RunDir, write_atomic
from sanitize.scores import decide

CONTROLS = ("no defence", "floor", "random removal", "no poison")
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and how it decides; what is not given is as for a scan, but a published share has no cap."""

    name: str
    alpha: float | None = None
    reject: float | None = None
    class_cap: float | None = None
    """1 takes the cap off."""

    def decision(self) -> DecisionConfig:
        cap = self.class_cap
        if cap is None and scores.default_reject(self.name) is None:
            cap = 0.5
        return DecisionConfig.choose(self.name, self.alpha, self.reject, cap, no_class_cap=cap is None)

    def label(self) -> str:
        given = [
            f"{field} {value:g}"
            for field, value in dataclasses.asdict(self).items()
            if isinstance(value, float)
        ]
        return f"{self.name} ({', '.join(given)})" if given else self.name


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A benchmark, as its TOML file says. ``{seed}`` in a path stands for the seed."""

    shards: str
    """Clean training corpus."""
    trusted: str
    """Trusted subset, from the training pool and not in `shards`."""
    test: str
    """Clean test set."""
    attacks: tuple[str, ...]
    """``NAME`` or ``NAME:ratio``, all planted at once."""
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws targets, poisoned samples, triggers, initialisation and order anew."""
    label: str = "cls"
    image_format: str = "png"
    """Of every corpus image after poisoning: ``png`` or ``jpg``."""
    quality: int = 95
    random_reject: float | None = None
    """Share that random removal takes; None: as much as the first method took in that seed."""
    scan: ProxyConfig = dataclasses.field(default_factory=ProxyConfig)
    """The shared scan."""
    resolution: int | None = None
    """Side of all images, of the scan and of retraining; None: as a scan chooses."""
    recipe: str = "auto"
    """Of retraining; see sanitize.evaluate.retrain.RECIPES."""
    epochs: int | None = None
    """Of retraining; None: the recipe's."""

    def __post_init__(self) -> None:
        labels = [method.label() for method in self.methods]
        if not self.methods or not self.attacks or not self.seeds:
            raise UsageError("a benchmark needs attacks, seeds and at least one [[method]]")
        if len(set(labels)) < len(labels):
            raise UsageError(f"two of the methods are the same: {', '.join(labels)}")
        if min(self.seeds) < 0:
            raise UsageError(f"seeds {list(self.seeds)}: expected 0 or more")
        if self.random_reject is not None and not 0 < self.random_reject < 1:
            raise UsageError(f"random_reject {self.random_reject}: expected between 0 and 1")
        for attack in self.attacks:
            AttackSpec.parse(attack)
        for method in self.methods:
            method.decision()


def load_config(path: Path) -> BenchConfig:
    """Read a benchmark's TOML file.

    Raises:
        InputError: there is no such file, or it is not TOML.
        UsageError: an unknown or missing setting, or a value that makes no sense.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the TOML file of a benchmark") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    try:
        scan = dict(found.pop("scan", {}))
        training = dict(found.pop("retrain", {}))
        methods = tuple(Method(**_floats(method)) for method in found.pop("method", []))
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
        }
        return BenchConfig(
            **given,
            methods=methods,
            resolution=scan.pop("resolution", None),
            scan=ProxyConfig(**scan),
            **training,
        )
    except TypeError as error:
        message = re.sub(r"^\w+\.__init__\(\) ", "", str(error))
        raise UsageError(f"{path}: {message}; see docs/bench.md for the settings") from None


def _floats(given: Facts) -> Facts:
    return {name: float(value) if isinstance(value, int) else value for name, value in given.items()}


def bench(config_path: Path, out: Path, progress: Progress | None = None) -> Facts:
    """Run a benchmark into `out`, or go on with one that was interrupted or got more methods or seeds.

    Args:
        config_path: TOML, see BenchConfig.
        out: a folder of its own.

    Returns:
        What is in bench.json: settings, machine, cells, and the table over the seeds.

    Raises:
        SanitizeError: see errors.py; measured cells stand.
    """
    progress = progress or Silent()
    config = load_config(config_path)
    chosen = recipe(config.recipe, config.epochs)
    _claim(config, out)
    cells: list[Facts] = []
    for seed in config.seeds:
        cells += _Seed(config, seed, out / f"seed-{seed}", chosen, progress).measure()
        result = _result(config, chosen, cells)
        for name, text in {
            "bench.json": json.dumps(result, indent=1),
            "bench.md": tables.markdown(result),
            "bench.html": tables.page(result),
        }.items():
            write_atomic(out / name, text.encode())
    return result


def _claim(config: BenchConfig, out: Path) -> None:
    """Methods and seeds may be added later; anything else would make cells that cannot be compared."""
    fixed = dataclasses.asdict(config)
    for name in ("methods", "seeds"):
        fixed.pop(name)
    fixed = json.loads(json.dumps(fixed))
    stored = out / "settings.json"
    if stored.is_file():
        before = json.loads(stored.read_text())
        changed = [name for name in fixed if before.get(name) != fixed[name]]
        if changed:
            raise RunFolderError(
                f"{out} holds a benchmark with another {', '.join(changed)}; give another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty and holds no benchmark; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(stored, json.dumps(fixed, indent=1).encode())


def _result(config: BenchConfig, chosen: Recipe, cells: list[Facts]) -> Facts:
    import torch

    cuda = torch.cuda.is_available()
    names = [*(method.label() for method in config.methods)]
    return {
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
        "recipe": dataclasses.asdict(chosen),
        "machine": {
            "cores": cores(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "processor": platform.machine(),
            "sanitize": sanitize.__version__,
            "torch": torch.__version__,
        },
        "headline_strength": {name: get(name).test_strengths[-1] for name in _attack_names(config)},
        "cells": cells,
        "summary": tables.summarise(cells, [*CONTROLS, *names], _attack_names(config)),
    }


def _attack_names(config: BenchConfig) -> list[str]:
    return [AttackSpec.parse(attack).name for attack in config.attacks]


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """The usable corpus samples of the scan."""

    rows: npt.NDArray[np.intp]
    class_id: npt.NDArray[np.int32]
    attack: npt.NDArray[np.object_]
    class_names: list[str]
    pixels: npt.NDArray[np.uint8]
    """(N, R, R, 3) of all index rows."""
    scan_s: float


class _Seed:
    """All cells of one seed; holds what they share in memory."""

    def __init__(
        self, config: BenchConfig, seed: int, folder: Path, chosen: Recipe, progress: Progress
    ) -> None:
        self.config, self.seed, self.folder, self.chosen = config, seed, folder, chosen
        self.progress = progress
        self._test: Encoded | None = None
        self._stamped: dict[tuple[str, float], tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = {}

    def measure(self) -> list[Facts]:
        """The cells of this seed, measured or as they were found."""
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        jobs: dict[str, Callable[[], Facts]] = {"no defence": self._undefended, "floor": self._floor}
        for method in self.config.methods:
            jobs[method.label()] = lambda method=method: self._method(method)  # type: ignore[misc]
        jobs["random removal"] = self._random
        jobs["no poison"] = self._unpoisoned
        paths = {name: self.folder / "cells" / f"{_slug(name)}.json" for name in jobs}
        if not all(path.is_file() for path in paths.values()):
            self.summary = self._poison()
            self.corpus = self._scan()
        for name, path in paths.items():
            if not path.is_file():
                self.progress.note(f"seed {self.seed}: {name}")
                cell = {"seed": self.seed, "name": name, **jobs[name]()}
                write_atomic(path, json.dumps(cell, indent=1).encode())
        return [json.loads(path.read_text()) for path in paths.values()]

    def _path(self, text: str) -> str:
        return text.replace("{seed}", str(self.seed))

    def _poison(self) -> Facts:
        made = self.folder / "poisoned"
        if not (made / "poison.json").is_file():
            shutil.rmtree(made, ignore_errors=True)
            poison(
                self._path(self.config.shards),
                attacks=self.config.attacks,
                out=made,
                seed=self.seed,
                label=self.config.label,
                image_format=self.config.image_format,
                quality=self.config.quality,
                workers=cores(),
                device=self.config.scan.device,
                progress=self.progress,
            )
        summary: Facts = json.loads((made / "poison.json").read_text())
        return summary

    def _scan(self) -> _Corpus:
        """One scan, whose decision flags nothing: every method decides on its trajectories."""
        run = self.folder / "run"
        config = ScanConfig(
            corpus=CorpusConfig(
                shards=str(self.folder / "poisoned" / "shards"),
                trusted=self._path(self.config.trusted),
                label=self.config.label,
                resolution=self.config.resolution,
            ),
            proxy=dataclasses.replace(self.config.scan, seed=self.seed),
            decision=DecisionConfig(method="random-removal", alpha=None, reject=1e-9),
        )
        run_scan(config, run, self.progress)
        table = pq.read_table(run / INDEX)
        usable = pc.and_(pc.equal(table["status"], "ok"), pc.invert(table["trusted"]))
        rows = np.flatnonzero(usable.to_numpy(zero_copy_only=False))
        truth = pq.read_table(self.folder / "poisoned" / "truth.parquet").to_pylist()
        attack = {(row["shard"], row["key"]): row["attack"] for row in truth}
        names = [
            attack[row["shard"], row["key"]] for row in table.select(["shard", "key"]).take(rows).to_pylist()
        ]
        manifest = json.loads((run / "manifest.json").read_text())
        return _Corpus(
            rows=rows,
            class_id=table["class_id"].to_numpy()[rows],
            attack=np.array([*names, None], object)[:-1],
            class_names=manifest["class_names"],
            pixels=np.load(run / PIXELS, mmap_mode="r"),
            scan_s=sum(manifest["stages"][stage]["seconds"] for stage in ("index", "pixels", "train")),
        )

    def _undefended(self) -> Facts:
        return self._judge(np.zeros(len(self.corpus.rows), bool), 0.0)

    def _floor(self) -> Facts:
        return self._judge(np.array([name is not None for name in self.corpus.attack], bool), 0.0)

    def _method(self, method: Method) -> Facts:
        flagged, seconds, facts = self._flagged(method.decision())
        return self._judge(flagged, seconds + self.corpus.scan_s) | facts

    def _random(self) -> Facts:
        share = self.config.random_reject
        if share is None:
            first = self.folder / "cells" / f"{_slug(self.config.methods[0].label())}.json"
            share = float(json.loads(first.read_text())["removed_ratio"])
        rng = np.random.default_rng([self.seed, 3])
        flagged = np.zeros(len(self.corpus.rows), bool)
        flagged[rng.permutation(len(flagged))[: round(share * len(flagged))]] = True
        return self._judge(flagged, 0.0)

    def _flagged(self, decision: DecisionConfig) -> tuple[npt.NDArray[np.bool_], float, Facts]:
        """What a method flags of the corpus rows, and the seconds it took."""
        with RunDir.open(self.folder / "run") as run:
            began = time.monotonic()
            inputs, rows, total = score_inputs(run, self.seed)
            raw = scores.score(decision.method, inputs)
            made = decide.decide(raw, inputs.class_id, inputs.trusted, decision)
            seconds = time.monotonic() - began
        everywhere = np.zeros(total, bool)
        everywhere[rows] = made.flagged
        facts = {
            "decision": dataclasses.asdict(decision),
            "auroc": _aurocs(raw, rows, self.corpus),
            "score_s": round(seconds, 2),
        }
        return everywhere[self.corpus.rows], seconds, facts

    def _judge(self, flagged: npt.NDArray[np.bool_], defence_s: float) -> Facts:
        """Train on what is not flagged, and measure."""
        kept = self.corpus.rows[~flagged]
        found = metrics.removal(flagged, self.corpus.attack, self.corpus.class_id)
        images = self.corpus.pixels[kept]
        return (
            found
            | self._trained(images, self.corpus.class_id[~flagged])
            | {"defence_s": round(defence_s, 2), "kept": len(kept)}
        )

    def _unpoisoned(self) -> Facts:
        """A model of the corpus before it was poisoned."""
        side = self.corpus.pixels.shape[1]
        clean = self._read(self._path(self.config.shards))
        images, class_id = decode_all(clean, side)
        return {
            "removed_ratio": 0.0,
            "recall": {},
            "clean_lost": 0.0,
            "worst_class_lost": 0.0,
            **self._trained(images, class_id),
            "defence_s": 0.0,
            "kept": len(images),
        }

    def _trained(self, images: npt.NDArray[np.uint8], class_id: npt.NDArray[Any]) -> Facts:
        model = retrain(
            images,
            class_id,
            len(self.corpus.class_names),
            self.chosen,
            seed=self.seed,
            device=self.config.scan.device,
            progress=self.progress,
        )
        pixels, true_class = self._test_images("", 0.0)
        asr: dict[str, dict[str, float]] = {}
        for record in self.summary["attacks"]:
            target = self.corpus.class_names.index(record["target_label"])
            asr[record["name"]] = {}
            for strength in record["test_strengths"]:
                stamped, true = self._test_images(record["name"], strength)
                asr[record["name"]][f"{strength:g}"] = metrics.attack_success_rate(
                    predict(model, stamped), true, target
                )
        return {
            "clean_accuracy": metrics.clean_accuracy(predict(model, pixels), true_class),
            "asr": asr,
            "retrain_s": round(model.seconds, 2),
        }

    def _test_images(
        self, attack: str, strength: float
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The test set with a trigger on it; "" for the clean one."""
        if (attack, strength) not in self._stamped:
            self._test = self._test or self._read(self._path(self.config.test))
            side = self.corpus.pixels.shape[1]
            if attack:
                trigger = load_trigger(self.folder / "poisoned", attack).trigger
                made = decode_all(self._test, side, attack, trigger, strength, self.seed)
            else:
                made = decode_all(self._test, side)
            self._stamped[attack, strength] = made
        return self._stamped[attack, strength]

    def _read(self, shards: str) -> Encoded:
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self.folder) as scratch:
            return read_encoded(shards, self.config.label, self.corpus.class_names, Path(scratch))


def _aurocs(raw: npt.NDArray[np.float32], rows: npt.NDArray[np.intp], corpus: _Corpus) -> dict[str, float]:
    """Per attack, the chance that its sample scores higher than a clean one."""
    from scipy.stats import rankdata

    scored = np.isin(corpus.rows, rows)
    values = np.full(int(corpus.rows.max()) + 1, np.nan, np.float32)
    inside = rows < len(values)
    values[rows[inside]] = raw[inside]
    mine, attack = values[corpus.rows[scored]], corpus.attack[scored]
    clean = mine[np.array([name is None for name in attack], bool)]
    found = {}
    for name in sorted({name for name in attack if name is not None}):
        poison = mine[attack == name]
        ranks = rankdata(np.concatenate([poison, clean]))[: len(poison)]
        above = ranks.sum() - len(poison) * (len(poison) + 1) / 2
        found[name] = float(above / (len(poison) * len(clean)))
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
