"""The report's check of the trusted set: what is planted in it is found, and a good one is not accused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import CLASSES, HOSTILE, make_run
from report_page import read_back

from sanitize.reporting.build import build_report
from sanitize.reporting.trusted_check import _shares
from sanitize.rundir import RunDir, write_table

N, M = 1500, 150


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with make_run(tmp_path / "run", samples=N, trusted=M, unusable=0) as made:
        yield made


def change_index(run: RunDir, column: str, values: dict[int, Any]) -> None:
    table = pq.read_table(run / "index.parquet")
    changed = table[column].to_pylist()
    for row, value in values.items():
        changed[row] = value
    place = table.column_names.index(column)
    array = pa.array(changed, table.schema.field(column).type)
    write_table(run / "index.parquet", table.set_column(place, column, array))


def rows_of(run: RunDir, class_id: int, trusted: bool) -> list[int]:
    found = np.flatnonzero(pq.read_table(run / "index.parquet")["class_id"].to_numpy() == class_id)
    return [int(row) for row in found if (row >= N) == trusted]


def copy_image(run: RunDir, source: int, target: int) -> None:
    change_index(run, "image_sha256", {target: f"{source:064x}"})


def suspects(facts: dict[str, Any]) -> dict[int, str]:
    return {row["sample_id"]: "; ".join(row["reasons"]) for row in facts["trusted_check"]["suspects"]}


def test_good_trusted_set_is_not_accused(run: RunDir) -> None:
    _, facts, page, html = read_back(build_report(run))
    check = facts["trusted_check"]
    assert check["judgement"] == "Nothing speaks against it."
    assert not check["alarming"]
    assert check["samples"] == M
    assert {line["level"] for line in check["checks"].values()} == {"fine"}
    assert html.index("<h2>The trusted set</h2>") > html.index("<h2>Removed per class</h2>")
    assert "Nothing speaks against it." in page.text
    assert not any("trusted" in step["text"] for step in facts["verdict"]["next"])


def test_coverage_names_classes_without_and_with_few(run: RunDir) -> None:
    dogs, frogs = rows_of(run, 5, trusted=True), rows_of(run, 6, trusted=True)
    others = rows_of(run, 7, trusted=True)[:5] + rows_of(run, 9, trusted=True)[:5]
    change_index(run, "class_id", dict.fromkeys([*dogs, *frogs[3:], *others], 1))
    _, facts, page, _ = read_back(build_report(run))
    coverage = facts["trusted_check"]["checks"]["coverage"]
    assert (coverage["level"], coverage["without"], coverage["few"]) == ("gap", ["dog"], ["frog"])
    assert coverage["text"].startswith("No trusted sample: 1 of 10 classes (dog). Fewer than 10")
    assert coverage["text"] in page.text
    shares = facts["trusted_check"]["checks"]["shares"]
    assert set(shares["apart"]) == {"automobile", "dog"}
    assert len(shares["classes"]) == len(CLASSES)
    assert sum(row["trusted_share"] for row in shares["classes"]) == pytest.approx(1)
    assert sum(row["corpus_share"] for row in shares["classes"]) == pytest.approx(1)
    assert "falls short in 2 respects" in facts["trusted_check"]["judgement"]
    assert not facts["trusted_check"]["alarming"]


def test_shares_are_corrected_for_the_number_of_classes() -> None:
    """7 of 1,000 against a share of 0.1 %: surely more than twice as common as one class, not among 1,000."""
    few = [{"label": "a", "trusted": 7, "usable": 1}, {"label": "b", "trusted": 993, "usable": 999}]
    many = [few[0], *({"label": str(i), "trusted": 1, "usable": 1} for i in range(999))]
    assert _shares(few)["apart"] == ["a"]
    assert _shares(many)["apart"] == []


def test_copy_in_the_corpus_with_the_same_label_is_no_alarm(run: RunDir) -> None:
    copy_image(run, rows_of(run, 2, trusted=True)[0], rows_of(run, 2, trusted=False)[0])
    facts = read_back(build_report(run))[1]
    copies = facts["trusted_check"]["checks"]["corpus_copies"]
    assert (copies["level"], copies["samples"], copies["other_label"]) == ("gap", 1, 0)
    assert suspects(facts) == {}


def test_copy_in_the_corpus_under_another_label_is_an_alarm(run: RunDir) -> None:
    bird = rows_of(run, 2, trusted=True)[0]
    cats = rows_of(run, 3, trusted=False)[:2]
    for cat in cats:
        copy_image(run, bird, cat)
    _, facts, page, html = read_back(build_report(run))
    copies = facts["trusted_check"]["checks"]["corpus_copies"]
    assert (copies["level"], copies["samples"], copies["other_label"]) == ("alarm", 2, 2)
    assert facts["trusted_check"]["alarming"]
    assert "Check the trusted set first" in facts["verdict"]["next"][0]["text"]
    assert html.index("<h2>The trusted set</h2>") < html.index("<h2>Every sample is accounted for</h2>")
    assert f"cat (train-{cats[0] // 1000:06d}.tar, {cats[0]:08d}) and 1 more" in suspects(facts)[bird]
    row = html.split("Trusted samples to look at")[1].split("</tr>")[1]
    assert "data:image/png;base64," in row
    assert f"{bird:08d}" in row
    assert copies["text"] in page.text


def test_unusable_corpus_copies_do_not_count(run: RunDir) -> None:
    bird, cat = rows_of(run, 2, trusted=True)[0], rows_of(run, 3, trusted=False)[0]
    copy_image(run, bird, cat)
    table = pq.read_table(run / "decisions.parquet")
    status = ["cut" if row == cat else code for row, code in enumerate(table["status"].to_pylist())]
    place = table.column_names.index("status")
    write_table(run / "decisions.parquet", table.set_column(place, "status", pa.array(status)))
    assert read_back(build_report(run))[1]["trusted_check"]["checks"]["corpus_copies"]["samples"] == 0


def test_copies_inside_the_trusted_set(run: RunDir) -> None:
    first, second = rows_of(run, 2, trusted=True)[:2]
    copy_image(run, first, second)
    own = read_back(build_report(run))[1]["trusted_check"]["checks"]["own_copies"]
    assert (own["level"], own["pictures"], own["other_label"]) == ("gap", 1, 0)
    copy_image(run, first, rows_of(run, 7, trusted=True)[0])
    facts = read_back(build_report(run))[1]
    own = facts["trusted_check"]["checks"]["own_copies"]
    assert (own["level"], own["pictures"], own["other_label"]) == ("alarm", 1, 1)
    assert set(suspects(facts)) == {first, second, rows_of(run, 7, trusted=True)[0]}


@pytest.mark.parametrize(
    ("members", "level", "words"),
    [
        (1, "gap", "1 trusted sample belongs to a suspected attack."),
        (3, "alarm", "3 trusted samples belong to a suspected attack."),
    ],
)
def test_members_of_a_suspected_attack_are_an_alarm_from_three_on(
    tmp_path: Path, members: int, level: str, words: str
) -> None:
    with make_run(tmp_path / "run", samples=N, trusted=M, attacks=True) as run:
        ships = rows_of(run, 8, trusted=True)[:members]
        groups = json.loads((run / "groups.json").read_text())
        groups[0]["rows"] += ships
        groups[0]["trusted"] = members
        (run / "groups.json").write_text(json.dumps(groups))
        _, facts, page, _ = read_back(build_report(run))
    assert facts["trusted_check"]["checks"]["suspected_attacks"]["level"] == level
    assert facts["trusted_check"]["alarming"] == (level == "alarm")
    assert all("belongs to suspected attack 1" in suspects(facts)[ship] for ship in ships)
    assert words in page.text
    assert not set(ships) & set(facts["suspected_attacks"][0]["sample_ids"])


@pytest.mark.parametrize(("separation", "level"), [(4.0, "gap"), (5.5, "alarm")])
def test_a_group_that_trusted_samples_are_in_may_be_their_poison(
    tmp_path: Path, separation: float, level: str
) -> None:
    with make_run(tmp_path / "run", samples=N, trusted=M, unusable=0, planted=0.0, seed=3) as run:
        ships = rows_of(run, 8, trusted=True)[:2]
        group = {
            "class_id": 8,
            "label": "ship",
            "signal": "pixels",
            "separation": separation,
            "trusted": 2,
            "rows": rows_of(run, 8, trusted=False)[:110] + ships,
            "suspected": False,
        }
        (run / "groups.json").write_text(json.dumps([group]))
        report, facts, page, _ = read_back(build_report(run))
    assert facts["suspected_attacks"] == []
    assert facts["trusted_check"]["checks"]["shared_groups"]["level"] == level
    assert facts["trusted_check"]["alarming"] == (level == "alarm")
    assert (report.verdict_code == "trusted") == (level == "alarm")
    assert set(suspects(facts)) >= set(ships)
    assert all("apart from the rest of ship" in suspects(facts)[ship] for ship in ships)
    assert "labelled ship, with 2 trusted samples" in page.text
    assert "share something that 2 of the" in page.text
    (shown,) = facts["shared_groups"]
    assert (shown["label"], shown["samples"], shown["trusted"]) == ("ship", 110, 2)


@pytest.mark.parametrize(("high", "level"), [(1, "fine"), (8, "alarm")])
def test_high_scores_are_an_alarm_beyond_chance(run: RunDir, high: int, level: str) -> None:
    scores = np.load(run / "decision_scores.npy")
    scores[N:] = np.minimum(scores[N:], 0)
    scores[N : N + high] = 99
    np.save(run / "decision_scores.npy", scores)
    facts = read_back(build_report(run))[1]
    check = facts["trusted_check"]["checks"]["scores"]
    assert (check["level"], check["samples"]) == (level, high)
    assert check["expected"] == pytest.approx(0.005 * M)
    assert set(suspects(facts)) == set(range(N, N + high))


def test_trusted_set_that_looks_stranger_is_an_alarm(run: RunDir) -> None:
    run.manifest["decision"]["trusted_flagged_ratio"] = 0.5
    facts = read_back(build_report(run))[1]
    assert facts["trusted_check"]["alarming"]
    assert "look stranger than the corpus" in facts["trusted_check"]["judgement"]


def test_without_pixels_scores_and_usable_trusted_samples(run: RunDir) -> None:
    bird, cat = rows_of(run, 2, trusted=True)[0], rows_of(run, 3, trusted=False)[0]
    copy_image(run, bird, cat)
    shutil.rmtree(run / "pixels")
    (run / "decision_scores.npy").unlink()
    _, facts, page, _ = read_back(build_report(run))
    assert "scores" not in facts["trusted_check"]["checks"]
    assert f"{bird:08d}" in page.text
    change_index(run, "status", dict.fromkeys(range(N, N + M), "undecodable"))
    facts = read_back(build_report(run))[1]
    assert facts["trusted_check"]["judgement"].endswith("No trusted sample could be used.")
    assert facts["trusted_check"]["samples"] == 0


def test_hostile_keys_and_labels_are_inert(run: RunDir) -> None:
    bird, cat = rows_of(run, 2, trusted=True)[0], rows_of(run, 3, trusted=False)[0]
    copy_image(run, bird, cat)
    change_index(run, "key", {bird: HOSTILE})
    change_index(run, "label", {bird: HOSTILE})
    table = pq.read_table(run / "decisions.parquet")
    for name in ("key", "label", "shard"):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array([HOSTILE] * N))
    write_table(run / "decisions.parquet", table)
    run.manifest["class_names"] = [HOSTILE] * len(CLASSES)
    change_index(run, "class_id", dict.fromkeys(rows_of(run, 5, trusted=True), 1))
    _, facts, page, html = read_back(build_report(run))
    assert facts["trusted_check"]["suspects"][0]["key"] == HOSTILE
    assert "script" not in page.tags
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_whole_set_under_a_page_of_suspects(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", samples=300, trusted=60, unusable=0) as run:
        change_index(run, "image_sha256", dict.fromkeys(range(300, 360), "0" * 63 + "x"))
        _, facts, page, html = read_back(build_report(run))
    assert len(facts["trusted_check"]["suspects"]) == 60
    assert "36 more: see report.json" in page.text
    assert len(html) < 3_000_000
