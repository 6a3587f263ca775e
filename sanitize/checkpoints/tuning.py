"""The loop that every repair shares: tune on trusted images, judge on held-out ones, stay within Δ."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.trusted import TrustedImages, logits_of, to_pixels
from sanitize.config import _require
from sanitize.dynamics.proxy import seeded
from sanitize.errors import RunFolderError, TrainingError
from sanitize.progress import Progress
from sanitize.rundir import disk_errors, write_atomic

MOMENTUM = 0.9
"""With Nesterov's look-ahead, for every method; the paper names plain SGD, its reference code has this."""
MISTAKEN = 0.02
"""Held-out accuracy that unlearning the wrong trigger loses more than the right one; 125 images measure the
difference to about 2 points."""
SAVE_EVERY = 4
"""Measurements between two saved states of a run that can be resumed."""

VIEWS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""Moves in pixels, down and to the right, at which a held-out image is judged: one image, five answers."""

Loss = Callable[[Classifier, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(model in training, (B, 3, R, R) pixels in [0, 1], (B,) int64 labels, step) -> scalar."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast; shared by all methods."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    batch: int = 128
    measure_every: int = 50
    """Steps between two measurements of the held-out accuracy."""
    decay: bool = False
    """Whether the rate falls to 0 along a cosine. Such a run is made to its end, wherever accuracy is on the
    way: much of what it loses comes back as the rate falls."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps {self.steps}: expected 1 or more")
        _require(self.learning_rate > 0, f"learning rate {self.learning_rate}: expected above 0")
        _require(self.weight_decay >= 0, f"weight decay {self.weight_decay}: expected 0 or more")
        _require(self.batch >= 2, f"batch {self.batch}: expected 2 or more")
        _require(self.measure_every >= 1, f"measure_every {self.measure_every}: expected 1 or more")


class Change(NamedTuple):
    """Accuracy on the held-out images, and what a repair did to it, image by image."""

    accuracy: float
    """Mean over the views of all images, of the model that is judged."""
    change: float
    """That less the original's, a fraction."""
    standard_error: float
    """Of the change: its spread between images over the root of their number, and at least that of one
    changed image, since a few images that did not change do not say that none would."""

    def within(self, max_accuracy_loss: float) -> bool:
        """Whether a model is kept: its loss is at most Δ plus one standard error, and at most 2Δ.

        Without the second bound 50 images would let a loss of 8 points pass for one of 2 (it was one of 17).
        """
        allowed = max_accuracy_loss + min(self.standard_error, max_accuracy_loss)
        return -self.change <= allowed + 1e-9

    def confidence(self, max_accuracy_loss: float) -> float:
        """Chance that the true loss is at most Δ, were the error normal; 0 to 1."""
        return NormalDist().cdf((max_accuracy_loss + self.change) / self.standard_error)


class Started(NamedTuple):
    """What a method hands to the loop."""

    model: Classifier
    """The copy that is tuned."""
    loss: Loss
    state: Sequence[torch.Tensor] = ()
    """Tensors that the loss changes in place from step to step."""
    facts: Mapping[str, Any] = MappingProxyType({})
    """For the JSON file: what the method found beforehand."""
    found: Sequence[Sequence[Any]] = ()
    """Of that, what an interrupted run has to find again, in plain values."""
    otherwise: Callable[[], Started] | None = None
    """Begins another way, to be tuned as well and taken where it spoils less by `MISTAKEN`; its own other way
    is tuned where what was taken lost that much, and taken where it spoils less (`repair.best_way`)."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What the loop hands back."""

    model: Classifier
    """The last measured model within Δ; as it was before the repair where none was."""
    step: int | None
    """Its step; None where no model was within Δ."""
    history: list[dict[str, Any]]
    """One entry a measurement: step, loss in nats (mean since the last, None at first), held_out_accuracy,
    its change and the standard error of that, and whether that is within Δ."""
    stopped: str
    """``accuracy``: fell clearly by more than Δ; ``steps``: all were made."""

    @property
    def change(self) -> float:
        """Of held-out accuracy, of the model that is kept, or of the last one where none is."""
        kept = next((entry for entry in self.history if entry["step"] == self.step), self.history[-1])
        return float(kept["accuracy_change"])


@dataclass(frozen=True, kw_only=True)
class Task:
    """A repair in hand: the images, how far accuracy may fall, and where an interrupted run goes on."""

    work: TrustedImages
    held_out: TrustedImages
    max_accuracy_loss: float
    seed: int
    state: Path | None = None
    """File that the loop's state is kept in; None: nowhere."""


def tune(original: Classifier, started: Started, schedule: Schedule, task: Task, progress: Progress) -> Tuned:
    """Tune until the steps are made or held-out accuracy has clearly fallen by more than Δ.

    Whether a model is within Δ says `Change.within`, of its loss on the held-out images, image by image over
    `VIEWS`.

    The same seed gives the same model on a CPU, interrupted or not: batches, flips and dropout of a step
    depend on the seed and its number alone. A method that starts below Δ (pruning) may climb back first.

    Args:
        original: the model before the repair; its held-out accuracy is what Δ is counted from.
        started: the model to tune, which is changed, and the loss.
        task: `state` is read if it is there.

    Raises:
        TrainingError: the loss is not finite.
        RunFolderError: `state` is of a run whose method found something else beforehand.
    """
    run = _Run(started, schedule, correctness(original, task.held_out), task)
    if task.state is not None and task.state.exists():
        run.restore(task.state)
    else:
        run.measure(None)
    stopped = "steps"
    with progress.stage("repair", schedule.steps - run.step, "steps") as advance:
        while run.step < schedule.steps:
            if run.fallen() and not schedule.decay:
                stopped = "accuracy"
                break
            block = min(schedule.measure_every, schedule.steps - run.step)
            mean_loss = run.advance(task, block)
            run.measure(mean_loss)
            if task.state is not None and (run.step // schedule.measure_every) % SAVE_EVERY == 0:
                run.save(task.state)
            advance(block)
        else:
            stopped = "accuracy" if run.fallen() else "steps"
    model = started.model
    model.load_state_dict(run.best if run.best is not None else original.state_dict())
    model.eval().requires_grad_(False)
    return Tuned(model=model, step=run.best_step, history=run.history, stopped=stopped)


def spoils_less(otherwise: Tuned, first: Tuned, by: float) -> bool:
    """Whether to take another way: it kept a model, and the first way none, or one that lost over `by` more.

    To keep the right answer under the trigger itself costs next to no accuracy, under something that images
    of a class have by nature it does. Of ten pairs of a mask and a change this is right in nine, by
    `MISTAKEN` (docs/experiments.md).
    """
    if otherwise.step is None or first.step is None:
        return otherwise.step is not None
    return bool(otherwise.change - first.change > by)


class _Run:
    """State of the loop: model, optimiser, step, history, and the last model within Δ."""

    def __init__(
        self, started: Started, schedule: Schedule, before: npt.NDArray[np.float64], task: Task
    ) -> None:
        self.model, self.loss, self.state = started.model, started.loss, started.state
        self.found = [list(one) for one in started.found]
        self.schedule = schedule
        self.before = before
        self.task = task
        self.optimizer = sgd(self.model, schedule)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.best_step: int | None = None

    def advance(self, task: Task, steps: int) -> float:
        """Make some steps; returns their mean loss."""
        total = torch.zeros((), device=self.model.mean.device)
        for step in range(self.step, self.step + steps):
            total += take_step(
                self.model, self.optimizer, self.loss, task.work, self.schedule, task.seed, step
            )
        self.step += steps
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise TrainingError(f"the loss was not finite before step {self.step}; take another --method")
        return mean

    def measure(self, mean_loss: float | None) -> None:
        found = changed(self.before, correctness(self.model, self.task.held_out))
        within = found.within(self.task.max_accuracy_loss)
        self.history.append(
            {
                "step": self.step,
                "loss": mean_loss,
                "held_out_accuracy": found.accuracy,
                "accuracy_change": found.change,
                "accuracy_change_se": found.standard_error,
                "within": within,
            }
        )
        if within and self.step > 0:
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best_step = self.step

    def fallen(self) -> bool:
        """Whether the last model is not within Δ and an earlier one was."""
        return any(entry["within"] for entry in self.history) and not self.history[-1]["within"]

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        kept = {name: getattr(self, name) for name in ("step", "history", "best", "best_step")}
        torch.save(
            {
                **kept,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": list(self.state),
                "found": self.found,
            },
            buffer,
        )
        with disk_errors(path.parent):
            write_atomic(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.model.mean.device, weights_only=True)
        if state["found"] != self.found:
            raise RunFolderError(
                f"{path}: what the interrupted run found beforehand is not found again; delete "
                f"{path.parent} to begin anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, saved in zip(self.state, state["state"], strict=True):
            mine.copy_(saved)
        for name in ("step", "history", "best", "best_step"):
            setattr(self, name, state[name])


def sgd(model: Classifier, schedule: Schedule) -> torch.optim.Optimizer:
    """Over the parameters that ask for gradients."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        schedule.learning_rate,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=schedule.weight_decay,
    )


def take_step(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    work: TrustedImages,
    schedule: Schedule,
    seed: int,
    step: int,
) -> torch.Tensor:
    """One step in training mode; what is random in it depends on the seed and its number alone."""
    device = model.mean.device
    rows = batch_rows(len(work), schedule.batch, seed, step)
    labels = torch.from_numpy(work.class_id[rows]).to(device)
    if schedule.decay:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
    with seeded(device, seed + step):
        model.train()
        found = loss(model, to_pixels(work.pixels[rows], device), labels, step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(found)
        optimizer.step()
    return found.detach()


def tune_freely(
    model: Classifier, work: TrustedImages, schedule: Schedule, loss: Loss, seed: int, progress: Progress
) -> None:
    """Make all steps of a schedule on a model, whatever becomes of it; it is left in eval mode."""
    optimizer = sgd(model, schedule)
    with progress.stage("prepare", schedule.steps, "steps") as advance:
        for step in range(schedule.steps):
            take_step(model, optimizer, loss, work, schedule, seed, step)
            advance(1)
    model.eval()


def batch_rows(samples: int, batch: int, seed: int, step: int) -> npt.NDArray[np.intp]:
    """(B,) rows of a step: every pass is a new order, cut into batches of equal size, at most `batch`."""
    batches = -(-samples // batch)
    epoch, position = divmod(step, batches)
    order = np.random.default_rng([seed, 23, epoch]).permutation(samples)
    return np.array_split(order, batches)[position]


def predict(classifier: Classifier, images: TrustedImages) -> npt.NDArray[np.int64]:
    """(N,) the classes that a network gives, in eval mode."""
    called: npt.NDArray[np.int64] = logits_of(classifier, images).argmax(axis=1)
    return called


def correctness(classifier: Classifier, images: TrustedImages) -> npt.NDArray[np.float64]:
    """(N,) share of the `VIEWS` of each image whose class a network gives, in eval mode."""
    right = [
        predict(classifier, TrustedImages(pixels=view, class_id=images.class_id)) == images.class_id
        for view in _views(images.pixels)
    ]
    share: npt.NDArray[np.float64] = np.mean(right, axis=0, dtype=np.float64)
    return share


def changed(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> Change:
    """The change of accuracy from two models' (N,) correctness on the same images, N at least 2."""
    change = after - before
    error = max(float(change.std(ddof=1) / math.sqrt(len(change))), 1 / len(change))
    return Change(float(after.mean()), float(change.mean()), error)


def _views(pixels: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """(N, R, R, 3) images as they are and moved by a pixel each way, the edge repeated."""
    side = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    for y, x in VIEWS:
        yield padded[:, 1 + y : 1 + y + side, 1 + x : 1 + x + side]


def accuracy(classifier: Classifier, images: TrustedImages) -> float:
    """Share of images whose class a network gives, in eval mode."""
    return float((predict(classifier, images) == images.class_id).mean())


def cross_entropy(model: Classifier, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
    """Fine-tuning's loss, in nats."""
    return functional.cross_entropy(model(pixels), labels)
