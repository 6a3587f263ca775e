"""Methods that turn loss trajectories into anomaly scores: one file a method.

A method is a module of this package with a function ``score(inputs: ScoreInputs) -> np.ndarray``, (N,)
float32, higher = more suspicious, and, if its source removes a fixed share of the data, that share as the
constant ``DEFAULT_REJECT``. ``SECOND_OPINION = True`` in it says that it asks for the second model's
losses, which cost another training run, ``GROUPS = True`` that it looks for groups. A module may have
``evidence(inputs) -> Evidence`` as well, which then gives the scores together with what they are made of.
Its name on the command line is the module's with dashes for underscores, so adding a method is adding a
file. Trusted samples must be scored as if they were not known to be trusted (left out, or out of fold):
their scores are what a p-value is measured against.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sanitize.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import nn

_HELPERS = {"decide", "knn", "features", "network", "views"}


class Images(Protocol):
    """(N, H, W, 3) uint8: an array, a memmap, or some rows of one that are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)"""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


def _no_images() -> Images:
    raise InputError("this method looks at the images, and none were given; score a run folder of a scan")


def _no_activations() -> npt.NDArray[np.float32]:
    raise InputError("this method looks at activations of the proxy, and none were given; score a run folder")


def _no_second_opinion() -> npt.NDArray[np.float32]:
    raise InputError("this method asks a second model, and none was given; score a run folder of a scan")


def _no_network() -> nn.Module:
    raise InputError("this method asks the proxy itself, and none was given; score a run folder of a scan")


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """What a method may look at: the usable samples only.

    What only some methods need is a function, so that nobody else pays for it.
    """

    trajectories: npt.NDArray[np.float32]
    """(N, E) cross-entropy in nats, kept epochs, finite."""
    class_id: npt.NDArray[np.int32]
    """(N,) given labels, 0 to C-1."""
    trusted: npt.NDArray[np.bool_]
    """(N,) True for trusted samples."""
    seed: int
    gpu: bool = False
    """Whether FAISS and frequency analysis may use the GPU."""
    images: Callable[[], Images] = _no_images
    """Gives (N, H, W, 3) images of the same samples at the proxy's resolution."""
    activations: Callable[[], npt.NDArray[np.float32]] = _no_activations
    """Gives (N, D) inputs of the trained proxy's last layer, in eval mode."""
    second_opinion: Callable[[], npt.NDArray[np.float32]] = _no_second_opinion
    """Gives (N,) cross-entropy in nats under the second model, see dynamics/second_opinion.py."""
    network: Callable[[], nn.Module] = _no_network
    """Gives the trained proxy in eval mode, frozen: (B, 3, H, W) float32 in [0, 1] to (B, C) logits."""

    def __post_init__(self) -> None:
        samples = len(self.trajectories)
        if (
            self.trajectories.ndim != 2
            or self.class_id.shape != (samples,)
            or self.trusted.shape != (samples,)
        ):
            raise ValueError("trajectories (N, E), class_id (N,) and trusted (N,) disagree in shape")
        if not np.isfinite(self.trajectories).all():
            raise ValueError("trajectories hold NaN or infinite losses")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of one label that share something the rest of the label does not have."""

    class_id: int
    signal: str
    """The view it shows in: ``pixels``, ``patterns``, ``frequencies``, ``contrasts`` or ``activations``."""
    rows: npt.NDArray[np.intp]
    """Members, as positions in the inputs, ascending."""
    separation: float
    """Ashman's D: distance of the two means in units of their spread; from 2 on there are two peaks."""
    trusted: int
    """Trusted samples among the members."""
    log_odds: npt.NDArray[np.float32]
    """(len(rows),) of belonging to the group rather than to the rest of the class, in nats."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a method found, and why."""

    score: npt.NDArray[np.float32]
    """(N,) higher = more suspicious."""
    signals: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """(N,) each: what the score is made of, a column of decisions.parquet each."""
    groups: list[Group] | None = None
    """Suspected attacks, crispest first; None: the method looks for none."""
    shared_groups: list[Group] = field(default_factory=list)
    """As crisp, but trusted samples are in them, too: natural, or the trusted set holds the same poison."""


def methods() -> list[str]:
    """Names that ``--method`` takes."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in names if name not in _HELPERS)


def load(method: str) -> ModuleType:
    """The module of a method.

    Raises:
        UsageError: there is no such method.
    """
    if method not in methods():
        raise UsageError(f"--method {method}: expected one of {', '.join(methods())}")
    return importlib.import_module(f"{__name__}.{method.replace('-', '_')}")


def default_reject(method: str) -> float | None:
    """The share of the corpus that a published method removes, its DEFAULT_REJECT; None: alpha decides."""
    share: float | None = getattr(load(method), "DEFAULT_REJECT", None)
    return share


def needs_second_opinion(method: str) -> bool:
    """Whether the method asks for the losses of the second model."""
    return bool(getattr(load(method), "SECOND_OPINION", False))


def searches_groups(method: str) -> bool:
    """Whether the method looks for groups in all views of the images."""
    return bool(getattr(load(method), "GROUPS", False))


def score(method: str, inputs: ScoreInputs) -> npt.NDArray[np.float32]:
    """(N,) float32 anomaly scores by the named method; higher = more suspicious."""
    scores: npt.NDArray[np.float32] = load(method).score(inputs)
    return scores


def evidence(method: str, inputs: ScoreInputs) -> Evidence:
    """The scores of the named method, with signals and groups where it has them."""
    module = load(method)
    if hasattr(module, "evidence"):
        found: Evidence = module.evidence(inputs)
        return found
    return Evidence(score=module.score(inputs))
