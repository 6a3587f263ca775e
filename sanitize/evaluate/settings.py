"""A benchmark's TOML file: what is poisoned, scanned, decided and trained."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanitize import scores
from sanitize.attacks.plant import AttackSpec
from sanitize.config import DecisionConfig, ProxyConfig
from sanitize.errors import InputError, UsageError
from sanitize.evaluate.causal_backdoor_defense import train_deconfounded
from sanitize.evaluate.retrain import Model

Facts = dict[str, Any]
TRAININGS: dict[str, Callable[..., Model]] = {"causal-backdoor-defense": train_deconfounded}
"""Defences that remove nothing and train a model of their own, called as `retrain` is."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and how it decides; what is not given is as for a scan, but a published share has no cap."""

    name: str
    alpha: float | None = None
    reject: float | None = None
    class_cap: float | None = None
    """1 takes the cap off."""

    def __post_init__(self) -> None:
        known = sorted([*scores.methods(), *TRAININGS])
        if self.name not in known:
            raise UsageError(f"method {self.name}: expected one of {', '.join(known)}")
        if self.name not in TRAININGS:
            self.decision()
        elif (self.alpha, self.reject, self.class_cap) != (None, None, None):
            raise UsageError(
                f"{self.name} removes nothing, it trains a model of its own: take alpha, reject and "
                "class_cap out of its [[method]]"
            )

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
    """Of every image after poisoning, trusted and test images too: ``png`` or ``jpg``."""
    quality: int = 95
    random_reject: float | None = None
    """Share that random removal takes; None: as much as the first method took that took anything."""
    scan_unpoisoned: bool = True
    """Whether the corpus is also scanned before it is poisoned, to see what methods take from it."""
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
        if self.random_reject is None and all(method.name in TRAININGS for method in self.methods):
            raise UsageError(
                "no method removes anything, so random removal has no share to take: set random_reject = 0.15"
            )
        for attack in self.attacks:
            AttackSpec.parse(attack)


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
