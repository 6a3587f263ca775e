"""`sanitize bench`: poison, scan once, and for every method decide, retrain and measure; over several seeds.

    OUT/settings.json                what may not change between runs into the same folder
    OUT/seed-0/poisoned/             of `sanitize poison`       OUT/seed-0/run/   the scan all methods share
    OUT/seed-0/cells/METHOD.json     one measured cell; what is there is not measured again
    OUT/seed-0/unpoisoned/run/       the scan of the corpus before it was poisoned
    OUT/seed-0/unpoisoned/cells/METHOD.json    what the method takes of that, for nothing
    OUT/bench.json, bench.md, bench.html

Four controls are always in: no defence, the floor (exactly the poison removed), random removal, and a model
of the corpus without any poison.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

import sanitize
from sanitize.attacks.plant import AttackSpec
from sanitize.attacks.poison import poison
from sanitize.attacks.trigger_file import load_trigger
from sanitize.config import CorpusConfig
from sanitize.errors import RunFolderError
from sanitize.evaluate import metrics, tables
from sanitize.evaluate.images import Encoded, decode_all, read_encoded, rewrite_images
from sanitize.evaluate.retrain import Model, Recipe, predict, recipe, retrain
from sanitize.evaluate.scanned import Scanned, flagged_by, scan_once
from sanitize.evaluate.settings import TRAININGS, BenchConfig, Method, load_config
from sanitize.pipeline import cores
from sanitize.progress import Progress, Silent
from sanitize.rundir import write_atomic

CONTROLS = ("no defence", "floor", "random removal", "no poison")
Facts = dict[str, Any]


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
    """What may be added later changes no cell; anything else would make cells that cannot be compared."""
    fixed = dataclasses.asdict(config)
    for name in ("methods", "seeds", "scan_unpoisoned"):
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
        "cells": cells,
        "summary": tables.summarise(cells, [*CONTROLS, *names], _attack_names(config)),
    }


def _attack_names(config: BenchConfig) -> list[str]:
    return [AttackSpec.parse(attack).name for attack in config.attacks]


class _Seed:
    """All cells of one seed; holds what they share in memory."""

    def __init__(
        self, config: BenchConfig, seed: int, folder: Path, chosen: Recipe, progress: Progress
    ) -> None:
        self.config, self.seed, self.folder, self.chosen = config, seed, folder, chosen
        self.progress = progress
        self.jpeg_quality = config.quality if config.image_format == "jpg" else None
        self._stamped: dict[tuple[str, float], tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = {}

    def measure(self) -> list[Facts]:
        """The cells of this seed, measured or as they were found."""
        methods = {method.label(): method for method in self.config.methods}
        jobs: dict[str, Callable[[], Facts]] = {
            "no defence": self._undefended,
            "floor": self._floor,
            **{name: partial(self._method, method) for name, method in methods.items()},
            "random removal": self._random,
            "no poison": self._unpoisoned,
        }
        cells = {name: self._once("cells", name, job) for name, job in jobs.items()}
        if self.config.scan_unpoisoned:
            for name, method in methods.items():
                found = self._once("unpoisoned/cells", name, partial(self._removed_from_clean, method))
                cells[name] |= found
        return list(cells.values())

    def _once(self, kind: str, name: str, job: Callable[[], Facts]) -> Facts:
        """What the file of that kind and name says, which is written by the job if it is not there."""
        path = self.folder / kind / f"{_slug(name)}.json"
        if not path.is_file():
            self.progress.note(
                f"seed {self.seed}: {name}" + (", nothing poisoned" if kind != "cells" else "")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            cell = {"seed": self.seed, "name": name, **job()}
            write_atomic(path, json.dumps(cell, indent=1).encode())
        found: Facts = json.loads(path.read_text())
        return found

    def _path(self, text: str) -> str:
        return text.replace("{seed}", str(self.seed))

    @cached_property
    def poisoned(self) -> Path:
        """The folder of the poisoned corpus, its truth and its triggers."""
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
        return made

    @cached_property
    def corpus(self) -> Scanned:
        """The poisoned corpus."""
        truth = pq.read_table(self.poisoned / "truth.parquet").to_pylist()
        attack = {(row["shard"], row["key"]): row["attack"] for row in truth}
        return self._scan(str(self.poisoned / "shards"), self.folder / "run", attack)

    @cached_property
    def clean(self) -> Scanned:
        """The corpus before it was poisoned."""
        shards = self._encoded_alike(self.config.shards, "unpoisoned/shards")
        return self._scan(shards, self.folder / "unpoisoned/run", None)

    def _scan(self, shards: str, run: Path, attack: dict[tuple[str, str], str | None] | None) -> Scanned:
        corpus = CorpusConfig(
            shards=shards,
            trusted=self._encoded_alike(self.config.trusted, "trusted"),
            label=self.config.label,
            resolution=self.config.resolution,
        )
        proxy = dataclasses.replace(self.config.scan, seed=self.seed)
        return scan_once(corpus, proxy, run, self.progress, attack)

    def _encoded_alike(self, shards: str, name: str) -> str:
        """A copy of clean shards that is coded, and so also decoded and reduced, like the poisoned corpus."""
        copy = self.folder / name
        if not copy.is_dir():
            rewrite_images(self._path(shards), copy, self.config.image_format, self.config.quality)
        return str(copy)

    def _undefended(self) -> Facts:
        return self._judge(np.zeros(len(self.corpus.rows), bool), 0.0)

    def _floor(self) -> Facts:
        return self._judge(np.array([name is not None for name in self.corpus.attack], bool), 0.0)

    def _method(self, method: Method) -> Facts:
        if method.name in TRAININGS:
            nothing = np.zeros(len(self.corpus.rows), bool)
            return self._judge(nothing, 0.0, TRAININGS[method.name]) | {"recall": {}}
        flagged, facts = flagged_by(method.decision(), self.corpus, self.seed, self.progress)
        return self._judge(flagged, facts["score_s"] + self.corpus.scan_s) | facts

    def _removed_from_clean(self, method: Method) -> Facts:
        """What a method takes of a corpus without poison, all of it for nothing."""
        if method.name in TRAININGS:
            return {"clean_removed_ratio": 0.0, "clean_worst_class_lost": 0.0}
        flagged, _ = flagged_by(method.decision(), self.clean, self.seed, self.progress)
        found = metrics.removal(flagged, self.clean.attack, self.clean.class_id)
        return {
            "clean_removed_ratio": found["removed_ratio"],
            "clean_worst_class_lost": found["worst_class_lost"],
        }

    def _random(self) -> Facts:
        share = self.config.random_reject
        if share is None:
            share = next((taken for taken in self._shares_taken() if taken), 0.0)
        rng = np.random.default_rng([self.seed, 3])
        flagged = np.zeros(len(self.corpus.rows), bool)
        flagged[rng.permutation(len(flagged))[: round(share * len(flagged))]] = True
        return self._judge(flagged, 0.0)

    def _shares_taken(self) -> list[float]:
        """By each method from the poisoned corpus."""
        paths = [self.folder / "cells" / f"{_slug(method.label())}.json" for method in self.config.methods]
        return [float(json.loads(path.read_text())["removed_ratio"]) for path in paths]

    def _judge(
        self, flagged: npt.NDArray[np.bool_], defence_s: float, train: Callable[..., Model] | None = None
    ) -> Facts:
        """Train on what is not flagged, and measure."""
        kept = self.corpus.rows[~flagged]
        found = metrics.removal(flagged, self.corpus.attack, self.corpus.class_id)
        images = self.corpus.pixels[kept]
        return (
            found
            | self._trained(images, self.corpus.class_id[~flagged], train)
            | {"defence_s": round(defence_s, 2), "kept": len(kept)}
        )

    def _unpoisoned(self) -> Facts:
        """A model of the corpus before it was poisoned."""
        side = self.corpus.pixels.shape[1]
        clean = self._read(self._path(self.config.shards))
        images, class_id = decode_all(clean, side, jpeg_quality=self.jpeg_quality)
        return {
            "removed_ratio": 0.0,
            "recall": {},
            "clean_lost": 0.0,
            "worst_class_lost": 0.0,
            **self._trained(images, class_id),
            "defence_s": 0.0,
            "kept": len(images),
        }

    def _trained(
        self,
        images: npt.NDArray[np.uint8],
        class_id: npt.NDArray[Any],
        train: Callable[..., Model] | None = None,
    ) -> Facts:
        model = (train or retrain)(
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
        for record in json.loads((self.poisoned / "poison.json").read_text())["attacks"]:
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
            side = self.corpus.pixels.shape[1]
            trigger = load_trigger(self.poisoned, attack).trigger if attack else None
            self._stamped[attack, strength] = decode_all(
                self.test, side, attack, trigger, strength, self.seed, self.jpeg_quality
            )
        return self._stamped[attack, strength]

    @cached_property
    def test(self) -> Encoded:
        return self._read(self._path(self.config.test))

    def _read(self, shards: str) -> Encoded:
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self.folder) as scratch:
            return read_encoded(shards, self.config.label, self.corpus.class_names, Path(scratch))


def _slug(name: str) -> str:
    """A file name; the control of random removal must not meet the method of that name."""
    if name == "random removal":
        return "random-removal-control"
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
