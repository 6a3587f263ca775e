import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import webdataset
from builders import shard
from conftest import EPOCHS, RESOLUTION, SAMPLES, SETTINGS, TRUSTED, Outcome, Shards, make_shards, run_cli
from PIL import Image

import sanitize
from sanitize import pipeline
from sanitize.attacks.plant import AttackSpec, plant
from sanitize.corpus.index import SCHEMA, STATUS
from sanitize.corpus.pixels import decode
from sanitize.errors import InputError, UsageError
from sanitize.rundir import RunDir

BOTH = SAMPLES + TRUSTED


@pytest.fixture(scope="module")
def decisions(finished: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(finished / "decisions.parquet").to_pydict()
    return found


def keys_of(folder: Path) -> list[str]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]


def test_the_run_folder_holds_what_the_design_says(finished: Path) -> None:
    index = pq.read_table(finished / "index.parquet")
    assert index.schema.equals(SCHEMA)
    assert index.num_rows == BOTH
    losses = np.load(finished / "trajectories.npy", mmap_mode="r")
    assert losses.shape == (EPOCHS, BOTH)
    assert losses.dtype == np.float32
    assert np.isfinite(losses).all()
    assert np.load(finished / "pixels" / "pixels.npy").shape == (BOTH, RESOLUTION, RESOLUTION, 3)
    table = pq.read_table(finished / "decisions.parquet")
    wanted = ["sample_id", "shard", "key", "label", "status", "anomaly_score", "p_value", "flagged", "reason"]
    assert table.column_names[:9] == wanted
    assert len(table.column_names) > 9  # a column a signal
    assert table.num_rows == SAMPLES
    left = {p.name for p in finished.iterdir()}
    assert not {name for name in left if name.endswith(".tmp")}
    assert ".scratch" not in left
    assert {"report.html", "report.json", "manifest.json", "kept", "quarantine"} <= left


def test_the_manifest_can_be_defended(finished: Path, shards: Shards) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"]["proxy"]["seed"] == 0
    assert manifest["config"]["decision"]["reject"] == 0.1
    assert {"sanitize", "python", "torch", "numpy"} <= manifest["versions"].keys()
    assert manifest["class_names"] == ["0", "1", "2"]
    assert list(manifest["stages"]) == ["index", "pixels", "train", "scores", "decision", "shards", "report"]
    assert [s["name"] for s in manifest["shards"]] == [
        "data-000.tar",
        "data-001.tar",
        "trusted/data-000.tar",
    ]
    for record in manifest["shards"]:
        assert record["bytes"] == os.stat(record["url"]).st_size
        assert len(record["sha256"]) == 64
    training = manifest["training"]
    assert len(training["epoch_loss"]) == EPOCHS
    assert training["kept_epochs"] == list(range(EPOCHS))
    assert (training["proxy"], training["device"], training["resolution"]) == ("small", "cpu", RESOLUTION)


def test_kept_and_quarantined_are_the_indexed(
    finished: Path, shards: Shards, decisions: dict[str, list[Any]]
) -> None:
    everything = keys_of(shards.corpus)
    flagged = {key for key, yes in zip(decisions["key"], decisions["flagged"], strict=True) if yes}
    assert keys_of(finished / "kept") == [key for key in everything if key not in flagged]
    assert keys_of(finished / "quarantine") == [key for key in everything if key in flagged]
    assert len(flagged) == round(0.1 * SAMPLES)


def test_decisions_make_sense(decisions: dict[str, list[Any]]) -> None:
    assert decisions["sample_id"] == list(range(SAMPLES))
    for flagged, reason, status in zip(
        decisions["flagged"], decisions["reason"], decisions["status"], strict=True
    ):
        assert status == "ok"
        assert (reason is not None) == flagged
    scores, p_values = np.array(decisions["anomaly_score"]), np.array(decisions["p_value"])
    assert (scores >= 0).all()
    assert scores.max() == 1
    assert (p_values > 0).all()
    assert (p_values <= 1).all()
    flagged = np.array(decisions["flagged"])
    assert scores[flagged].min() > scores[~flagged].max()


def test_pixels_are_the_images(finished: Path, shards: Shards) -> None:
    index = pq.read_table(finished / "index.parquet").to_pylist()
    pixels = np.load(finished / "pixels" / "pixels.npy", mmap_mode="r")
    shard = (shards.corpus / "data-001.tar").read_bytes()
    for row in (SAMPLES // 2, SAMPLES - 1):
        start = index[row]["image_offset"]
        image = shard[start : start + index[row]["image_size"]]
        np.testing.assert_array_equal(pixels[row], decode(image, RESOLUTION))


def test_losses_belong_to_their_sample(finished: Path) -> None:
    """The stored network, asked about stored pixels of single rows, gives the stored loss."""
    import torch

    from sanitize.dynamics.proxy import build

    network = build("small", 3, RESOLUTION)
    network.load_state_dict(torch.load(finished / "proxy.pt", weights_only=True)["model"])
    network.eval()
    pixels = np.load(finished / "pixels" / "pixels.npy").astype(np.float64)
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2)) + 1e-3
    class_id = pq.read_table(finished / "index.parquet")["class_id"].to_numpy().astype(np.int64)
    images = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            network(images), torch.from_numpy(class_id), reduction="none"
        )
    stored = np.load(finished / "trajectories.npy")[-1]
    dtype = json.loads((finished / "manifest.json").read_text())["training"]["dtype"]
    tolerance = 1e-4 if dtype == "float32" else 0.08
    np.testing.assert_allclose(stored, expected.numpy(), rtol=tolerance, atol=tolerance)


def test_the_report_object(finished: Path) -> None:
    report = sanitize.report(finished)
    assert report.path == finished / "report.html"
    assert (report.samples, report.flagged, report.unusable) == (SAMPLES, 30, 0)
    assert report.kept + report.quarantined == report.samples
    assert report.trusted == TRUSTED
    assert json.loads((finished / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_the_default_method_end_to_end(shards: Shards, tmp_path: Path) -> None:
    report = sanitize.scan(
        shards.corpus,
        trusted=shards.trusted,
        out=tmp_path,
        resolution=RESOLUTION,
        epochs=EPOCHS,
        device="cpu",
    )
    decision = json.loads((tmp_path / "manifest.json").read_text())["decision"]
    assert (decision["method"], decision["alpha"], decision["class_cap"]) == (
        sanitize.scan.__kwdefaults__["method"],
        0.07,
        0.5,
    )
    # no poison here: at most 0.07 promised in nine of ten, which with 63 trusted samples is .03 on average
    assert report.flagged / SAMPLES < 0.2
    table = pq.read_table(tmp_path / "decisions.parquet")
    assert {"group_log_odds", "label_conflict", "shortcut"} <= set(table.column_names)
    assert set(table["group_log_odds"].drop_null().to_pylist()) == {-20.0}
    assert json.loads((tmp_path / "groups.json").read_text()) == []
    assert np.isfinite(np.load(tmp_path / "second_opinion.npy")).sum() > SAMPLES

    # a method without a second model leaves it in place; going back does not train it again
    sanitize.filter(tmp_path, method="mahalanobis")
    assert "label_conflict" not in pq.read_table(tmp_path / "decisions.parquet").column_names
    trained = (tmp_path / "second_opinion.pt").stat().st_mtime_ns
    again = sanitize.filter(tmp_path, method="combined")
    assert (again.flagged, again.kept) == (report.flagged, report.kept)
    assert (tmp_path / "second_opinion.pt").stat().st_mtime_ns == trained


def test_a_run_without_pixels_still_goes_back_to_its_own_decision(shards: Shards, tmp_path: Path) -> None:
    def scan() -> Any:
        return sanitize.scan(
            shards.corpus, trusted=shards.trusted, out=tmp_path, **SETTINGS | {"method": "label-conflict"}
        )

    before = scan()
    sanitize.filter(tmp_path, method="label-conflict", reject=0.2, class_cap=0.5)
    for name in ("pixels/pixels.npy", "proxy.pt"):
        (tmp_path / name).unlink()
    assert scan().to_dict()["counts"] == before.to_dict()["counts"]
    with pytest.raises(InputError, match="is gone and this --method looks at it"):
        sanitize.filter(tmp_path, method="class-mixtures")
    sanitize.report(tmp_path)  # the decision that was there still stands
    assert scan().to_dict()["counts"] == before.to_dict()["counts"]


def test_a_group_is_named_in_the_decisions(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sanitize.scores import Evidence, Group, combined

    def evidence(inputs: Any) -> Evidence:
        rows = np.flatnonzero((inputs.class_id == 1) & ~inputs.trusted)[:30]
        odds = np.full(len(inputs.class_id), -20, np.float32)
        odds[rows] = np.linspace(1, 5, 30)
        group = Group(class_id=1, signal="pixels", rows=rows, separation=9.0, trusted=0, log_odds=odds[rows])
        conflict = np.zeros(len(odds), np.float32)
        signals = {"group_log_odds": odds, "label_conflict": conflict, "shortcut": conflict}
        return Evidence(score=odds, signals=signals, groups=[group])

    monkeypatch.setattr(combined, "evidence", evidence)
    monkeypatch.setattr(combined, "SECOND_OPINION", False)
    settings = SETTINGS | {"method": "combined", "reject": 30 / SAMPLES}
    sanitize.scan(shards.corpus, trusted=shards.trusted, out=tmp_path, **settings)
    (group,) = json.loads((tmp_path / "groups.json").read_text())
    table = pq.read_table(tmp_path / "decisions.parquet")
    flagged = table.filter(table["flagged"])
    assert group["label"] == "1"
    assert sorted(group["rows"]) == flagged["sample_id"].to_pylist()
    odds = dict(zip(table["sample_id"].to_pylist(), table["group_log_odds"].to_pylist(), strict=True))
    assert [odds[row] for row in group["rows"]] == sorted(flagged["group_log_odds"].to_pylist(), reverse=True)
    assert set(flagged["reason"].to_pylist()) == {
        "shares something in its pixels with about 29 others of its label"
    }


@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst"])
def test_compressed_shards_end_to_end(tmp_path: Path, ending: str) -> None:
    import gzip

    import zstandard

    own = make_shards(tmp_path, samples=120)
    for path in own.corpus.iterdir():
        pack = gzip.compress if ending == "tar.gz" else zstandard.compress
        path.with_suffix(f".{ending}").write_bytes(pack(path.read_bytes()))
        path.unlink()
    report = sanitize.scan(own.corpus, trusted=own.trusted, out=tmp_path / "run", **SETTINGS)
    assert (report.samples, report.kept) == (120, 108)
    assert sorted(p.name for p in (tmp_path / "run" / "kept").iterdir()) == [
        f"data-000.{ending}",
        f"data-001.{ending}",
    ]


def nan_losses(monkeypatch: pytest.MonkeyPatch, positions: list[int]) -> None:
    from sanitize.dynamics import proxy

    real = proxy.evaluate

    def evaluate(*arguments: Any) -> Any:
        losses, accuracy = real(*arguments)
        losses[positions] = np.nan
        return losses, accuracy

    monkeypatch.setattr(proxy, "evaluate", evaluate)


def test_a_sample_without_a_loss_is_quarantined(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_losses(monkeypatch, [7, SAMPLES + 3])
    report = sanitize.scan(shards.corpus, trusted=shards.trusted, out=tmp_path, **SETTINGS)
    assert (report.unusable, report.samples) == (1, SAMPLES)
    assert report.kept + report.quarantined == SAMPLES
    row = pq.read_table(tmp_path / "decisions.parquet").slice(7, 1).to_pylist()[0]
    assert (row["status"], row["flagged"], row["anomaly_score"]) == ("loss-not-finite", True, None)
    assert row["reason"] == STATUS["loss-not-finite"]
    assert row["key"] in keys_of(tmp_path / "quarantine")
    text = (tmp_path / "manifest.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["training"]["kept_epochs"] == list(range(EPOCHS))


def test_a_proxy_that_diverges_is_an_error(
    scan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nan_losses(monkeypatch, list(range(100)))
    outcome: Outcome = scan()
    assert outcome.code == 1
    assert "epoch 1: the loss of 100 of 363 samples is not finite, the proxy diverged" in outcome.err
    assert "Traceback" not in outcome.err
    assert "train" not in json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]


def test_a_spike_is_left_out_of_the_scores(run_copy: Path) -> None:
    with RunDir.open(run_copy) as run:
        run.manifest["training"]["kept_epochs"] = [0, 1, 3]
        inputs, rows, total = pipeline.score_inputs(run, 0)
    losses = np.load(run_copy / "trajectories.npy")
    np.testing.assert_array_equal(inputs.trajectories, losses[[0, 1, 3]].T)
    assert (len(rows), total) == (BOTH, BOTH)


def test_online_trajectories_differ_and_suffice(shards: Shards, finished: Path, tmp_path: Path) -> None:
    report = sanitize.scan(
        shards.corpus, trusted=shards.trusted, out=tmp_path, trajectory="online", **SETTINGS
    )
    assert report.flagged == 30
    online, measured = np.load(tmp_path / "trajectories.npy"), np.load(finished / "trajectories.npy")
    assert np.isfinite(online).all()
    assert not np.array_equal(online, measured)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nothing"}, "--method nothing: expected one of"),
        ({"proxy": "resnet19"}, "--proxy resnet19: expected"),
        ({"epochs": 2}, "--epochs 2"),
        ({"label": "json:"}, "--label json:"),
        ({"resolution": 4}, "--resolution 4"),
        ({"trajectory": "both"}, "--trajectory both"),
        ({"alpha": 0.1}, "--alpha and --reject exclude each other"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_usage_errors_come_before_any_work(
    shards: Shards, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=message):
        sanitize.scan(shards.corpus, trusted=shards.trusted, out=out, **(SETTINGS | settings))
    assert not out.exists()


def test_a_wrong_label_can_be_corrected_in_the_same_folder(shards: Shards, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="pass --label"):
        sanitize.scan(shards.corpus, trusted=shards.trusted, out=out, label="txt", **SETTINGS)
    assert sanitize.scan(shards.corpus, trusted=shards.trusted, out=out, **SETTINGS).samples == SAMPLES


def test_badloss_needs_more_than_its_neighbours(tmp_path: Path) -> None:
    own = make_shards(tmp_path, samples=60, trusted=50)
    outcome = run_cli(
        "scan", own.corpus, "--trusted", own.trusted, "--out", tmp_path / "run", "--method", "badloss",
        "--epochs", 3, "--resolution", 8,
    )  # fmt: skip
    assert outcome.code == 3
    assert "50 trusted samples can be used and --method badloss needs 51" in outcome.err


def test_badloss_end_to_end(run_copy: Path) -> None:
    report = sanitize.filter(run_copy, method="badloss", no_class_cap=True)
    assert report.flagged == round(0.4 * SAMPLES)
    assert sanitize.filter(run_copy, method="badloss", alpha=0.05).flagged < 0.2 * SAMPLES


def test_a_refused_decision_leaves_the_run_as_it_was(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"take --alpha 0.036 or more"):
        sanitize.filter(run_copy, alpha=0.001)
    monkeypatch.setattr("sanitize.scores.badloss.MIN_TRUSTED", TRUSTED + 1)
    with pytest.raises(InputError, match="needs 64"):
        sanitize.filter(run_copy, method="badloss")
    assert (run_copy / "manifest.json").read_bytes() == before
    sanitize.report(run_copy)


def test_a_new_decision_by_the_same_method_keeps_the_budget(run_copy: Path) -> None:
    assert sanitize.filter(run_copy, no_class_cap=True).flagged == round(0.1 * SAMPLES)
    decision = json.loads((run_copy / "manifest.json").read_text())["decision"]
    assert (decision["alpha"], decision["reject"], decision["class_cap"]) == (None, 0.1, None)
    advised = json.loads((run_copy / "report.json").read_text())["verdict"]["next"][-1]["command"]
    assert advised.endswith("--reject 0.05 --no-class-cap")
    sanitize.filter(run_copy, alpha=0.04)
    advised = json.loads((run_copy / "report.json").read_text())["verdict"]["next"][-1]["command"]
    assert advised.endswith("--alpha 0.036")


@pytest.mark.parametrize("name", ["../../outside.tar", "/outside.tar"])
def test_a_run_folder_that_would_write_elsewhere(run_copy: Path, name: str) -> None:
    text = (run_copy / "manifest.json").read_text()
    (run_copy / "manifest.json").write_text(text.replace('"name": "data-000.tar"', f'"name": "{name}"'))
    with pytest.raises(InputError, match="do not trust it"):
        sanitize.filter(run_copy)


def test_too_large_a_class_for_the_memory_is_refused_before_training(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sanitize.scores.class_mixtures.SAMPLE_BYTES", 10**12)
    with pytest.raises(InputError, match=r"121 samples are labelled '0'.*--method label-conflict"):
        sanitize.scan(
            shards.corpus, trusted=shards.trusted, out=tmp_path, **SETTINGS | {"method": "combined"}
        )
    assert not (tmp_path / "pixels").exists()


def textures(
    labels: npt.NDArray[np.int64], rng: np.random.Generator, side: int = 16
) -> npt.NDArray[np.uint8]:
    """Four classes: gratings at about 0, 45, 90 and 135 degrees; phase, width, contrast and tint vary."""
    count = len(labels)
    y, x = np.mgrid[:side, :side]
    angle = (labels * np.pi / 4 + rng.normal(0, 0.15, count))[:, None, None]
    phase, width = rng.uniform(0, 2 * np.pi, (count, 1, 1)), rng.uniform(0.9, 1.4, (count, 1, 1))
    grating = np.cos(width * (x * np.cos(angle) + y * np.sin(angle)) + phase)[..., None]
    pictures = 128 + rng.uniform(20, 60, (count, 1, 1, 1)) * grating + rng.uniform(-40, 40, (count, 1, 1, 3))
    return (pictures + rng.normal(0, 8, (count, side, side, 3))).clip(0, 255).astype(np.uint8)


def write_textures(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    pieces = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png")
        pieces.append({"__key__": f"{path.stem}{number:05d}", "png": stream.getvalue(), "cls": str(label)})
    shard(path, pieces)


@pytest.mark.slow
def test_planted_patches_are_found(tmp_path: Path) -> None:
    """The default method and budget on 800 textures, 24 of them with a patch and a wrong label.

    Measured at seeds 0 to 3 on a CPU: recall 1.00 each; clean samples lost .050, .045, .070, .077 for the
    promised .05. The bounds leave room for other processors, whose losses differ.
    """
    recalls, lost = [], []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        labels, known = rng.integers(0, 4, 800), np.arange(200) % 4
        planted = plant(textures(labels, rng), labels, [AttackSpec.parse("patch:0.03")], classes=4, seed=seed)
        folder = tmp_path / str(seed)
        write_textures(folder / "corpus" / "c.tar", planted.images, planted.plan.labels)
        write_textures(folder / "trusted" / "t.tar", textures(known, rng), known)
        sanitize.scan(
            folder / "corpus",
            trusted=folder / "trusted",
            out=folder / "run",
            epochs=12,
            device="cpu",
            resolution=16,
            seed=seed,
        )
        flagged = pq.read_table(folder / "run" / "decisions.parquet")["flagged"].to_numpy(
            zero_copy_only=False
        )
        poison = planted.plan.truth >= 0
        recalls.append(flagged[poison].mean())
        lost.append(flagged[~poison].mean())
    assert min(recalls) >= 0.75
    assert np.mean(recalls) >= 0.85
    assert max(lost) <= 0.14
    assert np.mean(lost) <= 0.1
