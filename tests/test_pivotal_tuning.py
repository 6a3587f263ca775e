"""The loss of Pivotal Tuning against naive loops, and that its pull holds the weights."""

from __future__ import annotations

import pytest
import torch
from small_models import images, trained
from torch.nn import functional

from sanitize.checkpoints.pivotal_tuning import LARGE, Settings, mean_squared_distance, slol, start
from sanitize.checkpoints.tuning import Schedule, Task, tune
from sanitize.progress import Silent


def naive_slol(frozen: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Algorithm 3, line by line."""
    classes = sorted(set(labels.tolist()))
    old = {c: frozen[labels == c].mean(dim=0) for c in classes}
    new = {c: features[labels == c].mean(dim=0) for c in classes}
    total = 0.0
    for i in classes:
        for j in classes:
            if i < j:
                total += float(functional.cosine_similarity(old[i] - old[j], new[i] - new[j], dim=0))
                total += float(functional.cosine_similarity(new[i], new[j], dim=0))
    return total


def test_slol_is_algorithm_3() -> None:
    generator = torch.Generator().manual_seed(0)
    frozen, features = torch.randn(2, 40, 8, generator=generator)
    labels = torch.randint(0, 7, (40,), generator=generator) * 3
    assert float(slol(frozen, features, labels)) == pytest.approx(
        naive_slol(frozen, features, labels), abs=1e-4
    )


def test_slol_of_the_pivot_itself_and_of_one_class() -> None:
    orthogonal = torch.eye(3).repeat(2, 1)
    labels = torch.arange(3).repeat(2)
    assert float(slol(orthogonal, orthogonal, labels)) == pytest.approx(3.0)  # three pairs, not turned
    assert float(slol(orthogonal, orthogonal, torch.zeros(6, dtype=torch.int64))) == 0.0


def test_distance_is_the_mean_over_all_parameters() -> None:
    one = trained(0)
    other = one.clone()
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    count = sum(parameter.numel() for parameter in one.parameters())
    moved = next(other.parameters()).numel()
    assert float(mean_squared_distance(one, other).detach()) == pytest.approx(0.25 * moved / count, rel=1e-5)


def test_the_pull_holds_the_weights_and_slol_turns_the_features() -> None:
    pivot, work = trained(0), images(80, 5)

    def after(latent_weight: float, parameter_weight: float) -> tuple[float, float]:
        settings = Settings(
            schedule=Schedule(steps=40, learning_rate=0.01),
            latent_weight=latent_weight,
            parameter_weight=parameter_weight,
        )
        task = Task(work=work, held_out=work, max_accuracy_loss=1.0, seed=0)
        tuned = tune(pivot, start(pivot, work, settings, 0, Silent()), settings.schedule, task, Silent())
        pixels = torch.from_numpy(work.pixels).permute(0, 3, 1, 2) / 255
        old, new = pivot.embed(pixels)[1], tuned.model.embed(pixels)[1]
        turned = float(slol(old, new, torch.from_numpy(work.class_id)))
        return float(mean_squared_distance(pivot, tuned.model).detach()), turned

    held, _ = after(0.5, 2_000.0)
    free, turned = after(0.5, 0.0)
    _, straight = after(0.0, 0.0)
    assert held < free / 2
    assert turned < straight - 0.8  # 5.9 and 7.0 on two cores


def test_many_classes_weigh_no_more_than_ten() -> None:
    torch.manual_seed(0)
    frozen, tuned, labels = torch.rand(60, 8), torch.rand(60, 8), torch.arange(60)
    whole = slol(frozen, tuned, labels)
    assert slol(frozen, tuned, labels, 45).item() == pytest.approx(
        whole.item() * 45 / (60 * 59 / 2), rel=1e-4
    )
    few = slice(0, 10)
    assert slol(frozen[few], tuned[few], labels[few], 45) == slol(frozen[few], tuned[few], labels[few])
    assert Settings().latent_pairs == 45
    assert LARGE.latent_pairs is None, "as published"
