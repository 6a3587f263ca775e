"""What a scan can be told. One frozen dataclass a stage; checks happen when it is made."""

from __future__ import annotations

import dataclasses
import importlib
import math
from dataclasses import dataclass, field
from typing import Any

from sanitize.errors import UsageError

MIN_TRUSTED = 50
"""Fewest usable trusted samples: the k of BaDLoss, and more than the default alpha needs (32)."""
MIN_CLASS_TRUSTED = 10
"""Fewer trusted samples of a class than this, and a reason compares with all trusted samples."""

DEFAULT_ALPHA = 0.07
"""With 250 trusted samples that costs 5 % of the clean ones on average."""
CONFIDENCE = 0.9
"""Share of trusted sets with which a scan loses at most alpha of the clean samples."""
DEFAULT_CLASS_CAP = 0.5


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    shards: str
    """Corpus: folder, glob, brace list, ``::``-joined, ``@list.txt`` or fsspec URL."""
    trusted: str
    """Trusted clean subset, in the same form."""
    label: str = "cls"
    """Where the label is: ``cls``, ``txt`` or ``json:path.to.field``."""
    resolution: int | None = None
    """Side of the square proxy image in pixels; None chooses 32 for small images and 64 above."""
    allow_pipe: bool = False
    """Whether ``pipe:COMMAND`` shards may run their command."""

    def __post_init__(self) -> None:
        json_path = self.label.removeprefix("json:") if self.label.startswith("json:") else None
        _require(
            self.label in ("cls", "txt") or bool(json_path),
            f"--label {self.label}: expected cls, txt or json:path.to.field",
        )
        _require(
            self.resolution is None or 8 <= self.resolution <= 1024,
            f"--resolution {self.resolution}: expected 8 to 1024 pixels",
        )


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    proxy: str = "auto"
    """``small``, or a torchvision constructor such as ``resnet18``; auto: resnet18 on CUDA, else small."""
    epochs: int = 20
    """Epochs of proxy training; one row of trajectories each."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    trajectory: str = "eval"
    """``eval``: losses measured after each epoch; ``online``: the training-time losses."""
    seed: int = 0
    """Seed of initialisation, sample order and the score's random choices."""

    def __post_init__(self) -> None:
        _require(3 <= self.epochs <= 1000, f"--epochs {self.epochs}: expected 3 to 1000")
        _require(
            self.device in ("auto", "cpu", "cuda"), f"--device {self.device}: expected auto, cpu or cuda"
        )
        _require(
            self.trajectory in ("eval", "online"), f"--trajectory {self.trajectory}: expected eval or online"
        )
        _require(0 <= self.seed < 2**31, f"--seed {self.seed}: expected 0 to {2**31 - 1}")


def least_alpha(trusted: int) -> float:
    """The smallest alpha that so many trusted samples can tell, rounded up to a thousandth; 1 if none can."""
    unseen = math.exp(math.log(1 - CONFIDENCE) / trusted) if trusted else 0.0
    return math.ceil(1000 * (1 - unseen)) / 1000


@dataclass(frozen=True, kw_only=True)
class DecisionConfig:
    method: str = "combined"
    """A module of ``sanitize.scores``, with dashes."""
    alpha: float | None = DEFAULT_ALPHA
    """Conformal level: the largest share of clean samples that may be lost, kept with a confidence of
    `CONFIDENCE`. None when reject is set."""
    reject: float | None = None
    """Share of the corpus to flag, most suspicious first, instead of alpha."""
    class_cap: float | None = DEFAULT_CLASS_CAP
    """Largest share of one class that may be flagged; None takes the cap off."""

    def __post_init__(self) -> None:
        _require(
            (self.alpha is None) != (self.reject is None),
            "--alpha and --reject exclude each other: give one of the two",
        )
        _require(self.alpha is None or 0 < self.alpha < 1, f"--alpha {self.alpha}: expected between 0 and 1")
        _require(
            self.reject is None or 0 < self.reject < 1, f"--reject {self.reject}: expected between 0 and 1"
        )
        _require(
            self.class_cap is None or 0 < self.class_cap <= 1,
            f"--class-cap {self.class_cap}: expected above 0 and up to 1",
        )

    @classmethod
    def choose(
        cls,
        method: str,
        alpha: float | None,
        reject: float | None,
        class_cap: float | None,
        no_class_cap: bool = False,
        default_cap: float | None = DEFAULT_CLASS_CAP,
    ) -> DecisionConfig:
        """With neither alpha nor reject given: the share a published method removes, else alpha 0.07."""
        _require(
            class_cap is None or not no_class_cap,
            "--class-cap and --no-class-cap exclude each other: give one of the two",
        )
        if class_cap is None and not no_class_cap:
            class_cap = default_cap
        if alpha is None and reject is None:
            # Settings stand below the methods; only this default is the method's to say.
            reject = importlib.import_module("sanitize.scores").default_reject(method)
            alpha = DEFAULT_ALPHA if reject is None else None
        return cls(method=method, alpha=alpha, reject=reject, class_cap=class_cap)


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    corpus: CorpusConfig
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    decision: DecisionConfig = field(default_factory=DecisionConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as stored in manifest.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ScanConfig:
        """Inverse of to_dict; an unknown field is an error."""
        try:
            return cls(
                corpus=CorpusConfig(**stored["corpus"]),
                proxy=ProxyConfig(**stored["proxy"]),
                decision=DecisionConfig(**stored["decision"]),
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"manifest.json holds settings this version does not know: {error}") from error
