from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sanitize.config import ProxyConfig
from sanitize.dynamics import proxy
from sanitize.dynamics.proxy import Samples, Setup, build, setup, train
from sanitize.errors import TrainingError, UsageError
from sanitize.progress import Silent

ON_CPU = Setup(proxy="small", device="cpu", dtype="float32", batch=32, threads=1, torch="")


def samples(count: int = 97, side: int = 16, classes: int = 3, unusable: int = 5) -> Samples:
    """Pictures whose mean colour is their class, among rows that must not be touched."""
    rng = np.random.default_rng(0)
    class_id = rng.integers(0, classes, count).astype(np.int32)
    pixels = rng.integers(0, 120, (count, side, side, 3)).astype(np.uint8)
    pixels[np.arange(count), ..., class_id % 3] += 90
    rows = np.sort(rng.permutation(count)[unusable:])
    return Samples(pixels=pixels, class_id=class_id, rows=rows, classes=classes)


class Run:
    def __init__(self, folder: Path, name: str, resolved: Setup = ON_CPU, **config: Any) -> None:
        self.samples = samples(side=32 if resolved.proxy != "small" else 16)
        self.config = ProxyConfig(**{"epochs": 4, **config})
        self.resolved, self.checkpoint = resolved, folder / f"{name}.pt"
        self.losses = np.full((self.config.epochs, len(self.samples.pixels)), np.nan, np.float32)

    def go(self) -> "Run":
        self.epoch_loss, self.accuracy = train(
            self.samples, self.config, self.resolved, self.losses, self.checkpoint, Silent()
        )
        return self


def test_losses_of_the_usable_rows_and_only_those(tmp_path: Path) -> None:
    run = Run(tmp_path, "a", epochs=5).go()
    usable = np.isin(np.arange(97), run.samples.rows)
    assert np.isfinite(run.losses[:, usable]).all()
    assert np.isnan(run.losses[:, ~usable]).all()
    np.testing.assert_allclose(run.epoch_loss, run.losses[:, usable].mean(axis=1), rtol=1e-5)
    assert run.epoch_loss[-1] < run.epoch_loss[0] < 1.5 * np.log(3)
    assert run.accuracy[-1] > 0.6


def test_losses_are_those_of_the_network_that_was_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, "a").go()
    network = build("small", 3, 16)
    network.load_state_dict(torch.load(run.checkpoint, weights_only=True)["model"])
    network.eval()
    chosen = run.samples.pixels[run.samples.rows].astype(np.float64)
    mean, std = chosen.mean(axis=(0, 1, 2)), chosen.std(axis=(0, 1, 2)) + 1e-3
    images = torch.from_numpy((chosen - mean) / std).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(run.samples.class_id[run.samples.rows].astype(np.int64))
    with torch.no_grad():
        logits = network(images).double()
    naive = torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]
    np.testing.assert_allclose(run.losses[-1, run.samples.rows], naive.numpy(), atol=1e-4)


@pytest.mark.parametrize("trajectory", ["eval", "online"])
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, trajectory: str) -> None:
    torch.manual_seed(1)
    first = Run(tmp_path, "a", trajectory=trajectory).go()
    torch.manual_seed(2)  # whatever the caller did with torch before
    second = Run(tmp_path, "b", trajectory=trajectory).go()
    assert first.losses.tobytes() == second.losses.tobytes()
    assert first.epoch_loss == second.epoch_loss
    other = Run(tmp_path, "c", trajectory=trajectory, seed=1).go()
    assert other.losses.tobytes() != first.losses.tobytes()


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Run(tmp_path, "a", epochs=3).go()
    assert torch.equal(torch.rand(3), expected)


class Killed(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int, *, before_checkpoint: bool) -> None:
    real: Callable[[Path, bytes], None] = proxy.write_atomic
    written = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == epochs and before_checkpoint:
            raise Killed
        real(path, data)
        if written == epochs:
            raise Killed

    monkeypatch.setattr(proxy, "write_atomic", write)


@pytest.mark.parametrize("name", ["small", "squeezenet1_1"])
@pytest.mark.parametrize("before_checkpoint", [True, False])
def test_a_run_that_was_killed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before_checkpoint: bool
) -> None:
    """squeezenet1_1 has dropout, whose random numbers must not depend on the interruption either."""
    resolved = Setup(proxy=name, device="cpu", dtype="float32", batch=32, threads=1, torch="")
    whole = Run(tmp_path, "whole", resolved).go()
    halves = Run(tmp_path, "halves", resolved)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, before_checkpoint=before_checkpoint)
        with pytest.raises(Killed):
            halves.go()
    assert np.isnan(halves.losses[-1]).all()
    halves.go()
    assert halves.losses.tobytes() == whole.losses.tobytes()
    assert (halves.epoch_loss, halves.accuracy) == (whole.epoch_loss, whole.accuracy)
    again = Run(tmp_path, "whole", resolved)
    again.losses = whole.losses.copy()
    assert again.go().epoch_loss == whole.epoch_loss  # nothing left to train
    assert again.losses.tobytes() == whole.losses.tobytes()


def test_online_losses_are_those_of_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_evaluation(*_: object) -> None:
        raise AssertionError("online must not evaluate")

    monkeypatch.setattr(proxy, "evaluate", no_evaluation)
    run = Run(tmp_path, "a", trajectory="online").go()
    assert np.isfinite(run.losses[:, run.samples.rows]).all()
    first = run.losses[0, run.samples.rows]
    assert abs(first.mean() - np.log(3)) < 0.6  # before most of the learning


def test_divergence_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_learning_rate", lambda epoch, epochs: float("nan"))
    with pytest.raises(TrainingError, match=r"epoch 1: the loss of 92 of 92 samples is not finite.*--seed"):
        Run(tmp_path, "a").go()
    assert not (tmp_path / "a.pt").exists()


def break_one_sample(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    """The loss of one sample is NaN in every evaluation, that of the others as it is."""
    real = proxy.evaluate

    def evaluate(*arguments: Any) -> tuple[npt.NDArray[np.float32], float]:
        losses, accuracy = real(*arguments)
        losses[position] = np.nan
        return losses, accuracy

    monkeypatch.setattr(proxy, "evaluate", evaluate)


def test_one_bad_loss_spoils_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path, "whole").go()
    monkeypatch.setattr(proxy, "_refuse_divergence", lambda row, epoch: None)
    break_one_sample(monkeypatch, 3)
    run = Run(tmp_path, "a").go()
    row = run.samples.rows[3]
    assert np.isnan(run.losses[:, row]).all()
    others = run.samples.rows[run.samples.rows != row]
    np.testing.assert_array_equal(run.losses[:, others], whole.losses[:, others])
    np.testing.assert_allclose(run.epoch_loss, whole.losses[:, others].mean(axis=1), rtol=1e-5)


def test_up_to_one_in_a_hundred_bad_losses_is_no_divergence() -> None:
    row = np.ones(250, np.float32)
    row[:2] = np.inf
    proxy._refuse_divergence(row, 0)
    row[2] = np.nan
    with pytest.raises(TrainingError, match="3 of 250"):
        proxy._refuse_divergence(row, 0)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 65, 97])
def test_batches_hold_everything_once_and_none_is_single(count: int) -> None:
    pieces = list(proxy._split(torch.arange(count), 32))
    assert torch.cat(pieces).tolist() == list(range(count))
    assert all(len(piece) > 1 for piece in pieces) or count == 1


def test_setup_resolves_auto() -> None:
    found = setup(ProxyConfig(device="cpu"), 1000)
    assert (found.proxy, found.device, found.batch) == ("small", "cpu", 128)
    assert found.dtype in ("float32", "bfloat16")
    assert setup(ProxyConfig(device="cpu"), 1_200_000).batch == 256
    assert setup(ProxyConfig(proxy="resnet50", device="cpu"), 10).proxy == "resnet50"


def test_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--proxy resnet19: expected auto, small or"):
        setup(ProxyConfig(proxy="resnet19", device="cpu"), 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds no CUDA"):
        setup(ProxyConfig(device="cuda"), 10)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alexnet", "alexnet cannot train on 16 px images"),
        ("vit_b_32", "vit_b_32 cannot train on 16 px"),
        ("googlenet", "googlenet has several outputs"),
    ],
)
def test_a_network_that_does_not_fit_is_named(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        proxy.check_fits(name, 16)


def test_networks_have_a_stem_for_their_images() -> None:
    assert build("resnet18", 3, 32).conv1.stride == (1, 1)  # type: ignore[union-attr]
    assert build("resnet18", 3, 128).conv1.stride == (2, 2)  # type: ignore[union-attr]
    for side in (8, 16, 32, 64):
        network = build("small", 5, side).eval()
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 5)
        assert sum(p.numel() for p in network.parameters()) < 500_000


def test_resnet18_trains(tmp_path: Path) -> None:
    run = Run(
        tmp_path, "a", Setup(proxy="resnet18", device="cpu", dtype="float32", batch=8, threads=1, torch="")
    )
    run.samples = samples(count=16, side=32, unusable=0)
    run.config, run.losses = ProxyConfig(epochs=3), np.full((3, 16), np.nan, np.float32)
    run.go()
    assert np.isfinite(run.losses).all()


def test_a_seconds_estimate_is_positive() -> None:
    assert 0 < proxy.time_one_epoch(samples(), ProxyConfig(), ON_CPU) < 60


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_training_on_cuda(tmp_path: Path, name: str) -> None:
    config = ProxyConfig(proxy=name, device="cuda", epochs=5)
    run = Run(tmp_path, "a", setup(config, 97), proxy=name, device="cuda", epochs=5).go()
    assert np.isfinite(run.losses[:, run.samples.rows]).all()
    on_cpu = Run(
        tmp_path,
        "b",
        Setup(proxy=name, device="cpu", dtype="float32", batch=128, threads=1, torch=""),
        epochs=5,
    ).go()
    # bfloat16 against float32: the first epoch is alike, after it the paths part (ResNet-18 on an H100: by
    # 2 % and by up to 40 %)
    np.testing.assert_allclose(run.epoch_loss[0], on_cpu.epoch_loss[0], rtol=0.1)
    assert run.epoch_loss[-1] < 0.6 * run.epoch_loss[0]
    assert on_cpu.epoch_loss[-1] < 0.6 * on_cpu.epoch_loss[0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pixels_that_do_not_fit_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProxyConfig(proxy="small", device="cuda")
    monkeypatch.setattr(proxy, "_fits", lambda pixels: False)
    run = Run(tmp_path, "a", setup(config, 97), device="cuda").go()
    assert np.isfinite(run.losses[:, run.samples.rows]).all()
