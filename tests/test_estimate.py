import dataclasses
import json
from pathlib import Path

import pytest
from builders import member, sample, shard, tar
from conftest import CLASSES, SAMPLES, TRUSTED, Shards, make_shards, run_cli, scan_arguments

from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
from sanitize.errors import InputError, UsageError
from sanitize.estimate import _size, estimate, in_words
from sanitize.progress import Silent


def config(shards: Shards, **proxy: object) -> ScanConfig:
    return ScanConfig(
        corpus=CorpusConfig(shards=str(shards.corpus), trusted=str(shards.trusted), resolution=16),
        proxy=ProxyConfig(**{"epochs": 4, "device": "cpu", **proxy}),  # type: ignore[arg-type]
    )


def test_what_a_scan_will_cost(shards: Shards) -> None:
    guess = estimate(config(shards), Silent())
    assert {name: guess[name] for name in ("samples", "unusable", "trusted", "classes", "shards")} == {
        "samples": SAMPLES,
        "unusable": 0,
        "trusted": TRUSTED,
        "classes": CLASSES,
        "shards": 2,
    }
    assert guess["bytes"] == sum(path.stat().st_size for path in shards.corpus.iterdir())
    pixels = (SAMPLES + TRUSTED) * 16 * 16 * 3
    assert guess["disk_bytes"] > guess["bytes"] + pixels
    assert guess["memory_bytes"] > 100_000_000
    assert 0 < guess["time_s"] < 120
    assert (guess["proxy"], guess["device"], guess["resolution"]) == ("small", "cpu", 16)
    assert guess["dtype"] in ("float32", "bfloat16")
    json.dumps(guess)


def test_more_epochs_cost_more(shards: Shards) -> None:
    few, many = (estimate(config(shards, epochs=epochs), Silent()) for epochs in (3, 900))
    assert many["time_s"] > few["time_s"]
    assert many["disk_bytes"] - few["disk_bytes"] == 897 * 4 * (SAMPLES + TRUSTED)


def test_the_search_for_groups_counts(shards: Shards) -> None:
    searched = config(shards)
    plain = dataclasses.replace(searched, decision=DecisionConfig(method="mahalanobis"))
    more = estimate(searched, Silent())["memory_bytes"] - estimate(plain, Silent())["memory_bytes"]
    assert more % (5 * 12_288) == 0
    assert SAMPLES / CLASSES <= more / (5 * 12_288) <= SAMPLES


def test_the_disk_estimate_covers_what_a_run_takes(shards: Shards, finished: Path) -> None:
    taken = sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())
    assert taken < estimate(config(shards), Silent())["disk_bytes"]


def test_unusable_counts_the_corpus_only(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, samples=60)
    shard(shards.corpus / "z.tar", [member("x.png", b""), sample("y", "0", seed=9)])
    (shards.trusted / "z.tar").write_bytes(tar(member("x.png", b"")))
    guess = estimate(config(shards), Silent())
    assert (guess["samples"], guess["unusable"]) == (62, 1)
    assert any("1 trusted samples cannot be used" in note for note in guess["notes"])


def test_in_words(shards: Shards) -> None:
    guess = estimate(config(shards), Silent()) | {"time_s": 50.0, "notes": ["mind the gap"]}
    lines = in_words(guess).splitlines()
    assert lines[0] == "samples   300 in 2 shards, 0 unusable"
    assert lines[-2:] == ["time      about 50 s", "note: mind the gap"]
    assert "time      about 10 min" in in_words(guess | {"time_s": 601.0})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (5e6, "5 MB"), (3e12, "3.0 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert _size(count) == text


def test_dry_run_leaves_nothing(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    plain = run_cli(*scan_arguments(shards, tmp_path / "run"), "--dry-run")
    assert plain.code == 0
    assert plain.out.startswith("samples   300 in 2 shards")
    found = run_cli(*scan_arguments(shards, tmp_path / "run"), "--dry-run", "--json")
    assert json.loads(found.out)["samples"] == 300
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def test_dry_run_refuses_what_the_scan_would(shards: Shards, tmp_path: Path) -> None:
    for change, error in (
        ({"method": "nothing"}, UsageError),
        ({"proxy": "resnet19"}, UsageError),
        ({"label": "txt"}, InputError),
    ):
        arguments = scan_arguments(shards, tmp_path / "run", **change)
        outcome = run_cli(*arguments, "--dry-run")
        assert outcome.code == error.exit_code
        assert outcome.err.splitlines()[-1].startswith("error: ")
        assert outcome.out == ""
