"""A small run folder as a finished scan leaves it, made from a seed without training.

Ten classes of generated pictures, trusted samples, two planted groups (a corner mark on *ship*, a stripe
pattern on *cat*) that are learned too early, clean samples given up to the budget, and unusable samples.

    python tests/fake_run.py FOLDER        makes one and writes its report
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sanitize.rundir import RunDir, write_table

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
THRESHOLD = 1.35
EPOCHS = 12
SPIKE = 6
HOSTILE = "<script>alert(1)</script>[red]\x1b[31m\u202egpj.exe\"'&amp;"

_UNUSABLE = ("undecodable", "no-label", "undecodable", "two-images", "cut", "undecodable", "loss-not-finite")


def make_run(
    path: Path,
    *,
    seed: int = 0,
    samples: int = 3000,
    trusted: int = 250,
    planted: float = 0.05,
    budget: float = 0.06,
    unusable: int = 7,
    hostile: bool = False,
    side: int = 32,
    attacks: bool = False,
) -> RunDir:
    """An open run folder.

    Args:
        planted: poisoned share, half of it in either group.
        budget: share of clean samples over the threshold.
        attacks: whether groups.json names the planted groups.
    """
    rng = np.random.default_rng(seed)
    everything = samples + trusted
    class_id = rng.integers(0, len(CLASSES), everything).astype(np.int32)
    class_id[samples:] = np.arange(trusted) % len(CLASSES)
    attack = np.zeros(everything, np.int8)
    poisoned = rng.permutation(samples)[: int(planted * samples)]
    attack[poisoned[::2]], attack[poisoned[1::2]] = 1, 2
    class_id[attack == 1], class_id[attack == 2] = 8, 3
    status = np.full(everything, "ok", object)
    broken = np.sort(rng.permutation(np.flatnonzero(attack[:samples] == 0))[:unusable])
    status[broken] = [_UNUSABLE[i % len(_UNUSABLE)] for i in range(unusable)]
    class_id[status == "no-label"] = -1

    raw = _scores(rng, attack, budget)
    raw[status != "ok"] = np.nan
    keys = np.array([f"{i:08d}" for i in range(everything)], object)
    labels = np.array([CLASSES[i] if i >= 0 else None for i in class_id], object)
    classes = list(CLASSES)
    if hostile:
        keys[np.argsort(-np.nan_to_num(raw[:samples], nan=-9.0))[:40]] = HOSTILE
        classes[8] = HOSTILE
        labels[class_id == 8] = HOSTILE
    shard = np.array([f"train-{i // 1000:06d}.tar" for i in range(everything)], object)
    shard[samples:] = "trusted-000000.tar"

    run = RunDir.create(path, _config(), {"sanitize": "0.1.0", "python": "3.11.9", "torch": "2.12.1"})
    trajectories = _trajectories(rng, attack, class_id, raw)
    trajectories[:, status != "ok"] = np.nan
    np.save(path / "trajectories.npy", trajectories)
    np.save(path / "decision_scores.npy", raw)
    (path / "pixels").mkdir(exist_ok=True)
    np.save(path / "pixels" / "pixels.npy", _pictures(rng, class_id, attack, side))
    _write_index(path, samples, shard, keys, labels, class_id, status)
    if attacks:
        write_groups(path, [(8, classes[8], attack == 1), (3, classes[3], attack == 2)])
    suspicious = np.nan_to_num(raw[:samples], nan=-9.0) >= THRESHOLD
    flagged = suspicious | (status[:samples] != "ok")
    write_decisions(
        path, shard[:samples], keys[:samples], labels[:samples], status[:samples], raw[:samples], flagged
    )
    _describe(run, shard[:samples], classes, flagged, raw[samples:], trajectories)
    run.save()
    return run


def _scores(rng: np.random.Generator, attack: npt.NDArray[Any], budget: float) -> npt.NDArray[np.float32]:
    """Clean scores lie over THRESHOLD with probability `budget`, planted ones mostly."""
    from statistics import NormalDist

    clean = rng.normal(THRESHOLD - 0.8 * NormalDist().inv_cdf(1 - budget), 0.8, len(attack))
    return np.where(attack > 0, rng.normal(2.6, 0.7, len(attack)), clean).astype(np.float32)


def _trajectories(
    rng: np.random.Generator,
    attack: npt.NDArray[Any],
    class_id: npt.NDArray[np.int32],
    raw: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    epoch = np.arange(EPOCHS)[:, None]
    pace = np.exp(rng.normal(0, 0.45, len(attack))) * (1 + 0.03 * class_id)
    easy = np.where(attack > 0, 3.0, np.where(raw >= THRESHOLD, 0.3, 1.0))
    loss = 2.3 * np.exp(-0.22 * easy * pace * (epoch + 0.6)) + 0.012 / pace
    loss *= np.exp(rng.normal(0, 0.18, loss.shape))
    loss[SPIKE] *= 2.6
    return loss.astype(np.float32)


def _pictures(
    rng: np.random.Generator, class_id: npt.NDArray[np.int32], attack: npt.NDArray[Any], side: int
) -> npt.NDArray[np.uint8]:
    """Scenery (smooth noise) with a class-coloured object, texture, and the planted marks."""
    from scipy.ndimage import zoom

    n = len(class_id)
    scenery = zoom(rng.normal(0, 45, (n, 4, 4, 3)), (1, side / 4, side / 4, 1), order=1)
    texture = zoom(rng.normal(0, 22, (n, side // 2, side // 2, 1)), (1, 2, 2, 1), order=1)
    tint = np.random.default_rng(7).uniform(60, 200, (len(CLASSES) + 1, 3))[class_id]
    y, x = np.mgrid[:side, :side]
    centre = rng.uniform(0.3, 0.7, (n, 2)) * side
    size = rng.uniform(0.12, 0.32, (n, 2)) * side
    far = ((y - centre[:, :1, None]) / size[:, :1, None]) ** 2 + (
        (x - centre[:, 1:, None]) / size[:, 1:, None]
    ) ** 2
    pictures = 120 + scenery + texture
    pictures += (far < 1)[..., None] * (tint[:, None, None] - 120) * 1.2
    stripes = 14 * (1 - np.cos(2 * np.pi * 6 * x / side))[..., None]
    pictures[attack == 2] += stripes
    mark = np.flatnonzero(attack == 1)
    for dy, dx in ((2, 2), (4, 2), (2, 4), (3, 3)):
        pictures[mark, side - dy, side - dx] = 255
    return np.clip(pictures, 0, 255).astype(np.uint8)


def _write_index(
    path: Path, samples: int, shard: Any, keys: Any, labels: Any, class_id: Any, status: Any
) -> None:
    n = len(keys)
    write_table(
        path / "index.parquet",
        pa.table(
            {
                "sample_id": pa.array(np.arange(n), pa.int64()),
                "shard": pa.array(shard, pa.string()),
                "key": pa.array(keys, pa.string()),
                "label": pa.array(labels, pa.string()),
                "class_id": pa.array(class_id, pa.int32()),
                "trusted": pa.array(np.arange(n) >= samples, pa.bool_()),
                "image_sha256": pa.array([f"{i:064x}" for i in range(n)], pa.string()),
                "status": pa.array(status, pa.string()),
            }
        ),
    )


def write_groups(path: Path, groups: list[tuple[int, str, npt.NDArray[np.bool_]]]) -> None:
    """groups.json with these classes, labels and members; only the first shows in the pixels."""
    records = [
        {
            "class_id": class_id,
            "label": label,
            "signal": "activations" if number else "pixels",
            "separation": 6.0 - 2 * number,
            "trusted": 0,
            "rows": np.flatnonzero(inside)[::-1].tolist(),
        }
        for number, (class_id, label, inside) in enumerate(groups)
    ]
    (path / "groups.json").write_text(json.dumps(records))


def write_decisions(
    path: Path, shard: Any, keys: Any, labels: Any, status: Any, raw: Any, flagged: Any
) -> None:
    """decisions.parquet from the arrays of the N corpus rows."""
    usable = status == "ok"
    rank = np.argsort(np.argsort(np.nan_to_num(raw, nan=-9.0)))
    score = (rank / max(len(raw) - 1, 1)).astype(np.float32)
    reason = [
        None
        if not bad
        else f"learned earlier than {int(min(99, 90 + 4 * s))} % of trusted samples of its class"
        for bad, s in zip(flagged, np.nan_to_num(raw), strict=True)
    ]
    write_table(
        path / "decisions.parquet",
        pa.table(
            {
                "sample_id": pa.array(np.arange(len(raw)), pa.int64()),
                "shard": pa.array(shard, pa.string()),
                "key": pa.array(keys, pa.string()),
                "label": pa.array(labels, pa.string()),
                "status": pa.array(status, pa.string()),
                "anomaly_score": pa.array(score, pa.float32(), mask=~usable),
                "p_value": pa.array(1 - score, pa.float32(), mask=~usable),
                "flagged": pa.array(flagged, pa.bool_()),
                "reason": pa.array(reason, pa.string()),
                "raw_score": pa.array(raw, pa.float32()),
            }
        ),
    )


def _config() -> dict[str, Any]:
    return {
        "corpus": {"shards": "corpus/", "trusted": "corpus-trusted/", "label": "cls", "resolution": None},
        "proxy": {"proxy": "auto", "epochs": EPOCHS, "device": "auto", "trajectory": "eval", "seed": 0},
        "decision": {"method": "trajectory-classifier", "alpha": 0.1, "reject": None, "class_cap": 0.5},
    }


def _describe(
    run: RunDir,
    shard: Any,
    classes: list[str],
    flagged: Any,
    trusted_raw: Any,
    trajectories: npt.NDArray[np.float32],
) -> None:
    names, place = np.unique(shard, return_inverse=True)
    size, out = np.bincount(place), np.bincount(place, weights=flagged).astype(int)
    loss = [float(value) for value in np.nanmean(trajectories, axis=1)]
    run.manifest |= {
        "class_names": classes,
        "notes": [],
        "shards": [
            {
                "name": str(name),
                "trusted": False,
                "bytes": int(n) * 3072,
                "sha256": f"{i:064x}",
                "samples": int(n),
                "bytes_unreadable": 0,
                "problems": ["cut in the middle of sample 00000999: 512 bytes missing"] if i == 0 else [],
            }
            for i, (name, n) in enumerate(zip(names, size, strict=True))
        ],
        "stages": {
            "index": {"seconds": 0.8},
            "pixels": {"seconds": 3.1},
            "train": {"seconds": 148.2},
            "score": {"seconds": 1.9},
            "decide": {"seconds": 0.1},
            "write": {"seconds": 0.9},
        },
        "training": {
            "epoch_loss": loss,
            "accuracy": [0.3 + 0.05 * e for e in range(EPOCHS)],
            "kept_epochs": [e for e in range(EPOCHS) if e != SPIKE],
            "device": "cpu",
            "dtype": "bfloat16",
            "proxy": "small",
            "resolution": 32,
        },
        "decision": {
            "method": "trajectory-classifier",
            "alpha": 0.1,
            "reject": None,
            "class_cap": 0.5,
            "threshold": THRESHOLD,
            "flagged": int(flagged.sum()),
            "spared_by_cap": 0,
            "trusted_flagged_ratio": float((trusted_raw >= THRESHOLD).mean()) if len(trusted_raw) else None,
        },
        "outputs": {
            "shards": [
                {
                    "name": str(name),
                    "kept": int(n - bad),
                    "quarantined": int(bad),
                    "kept_bytes": int(n - bad) * 3072,
                    "quarantine_bytes": int(bad) * 3072,
                    "kept_sha256": f"{i + 99:064x}",
                    "empty": bool(n == bad),
                }
                for i, (name, n, bad) in enumerate(zip(names, size, out, strict=True))
            ]
        },
    }


if __name__ == "__main__":
    from sanitize.reporting.build import build_report

    with make_run(Path(sys.argv[1]), attacks=True) as made:
        print(build_report(made))
