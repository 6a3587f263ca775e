"""The audit report of a run: report.html and report.json, from the run folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sanitize.reporting import facts as facts_of
from sanitize.reporting.page import render
from sanitize.reporting.thumbnails import LabelGroups, pictures_of
from sanitize.reporting.trusted_check import trusted_check
from sanitize.reporting.verdict import judge
from sanitize.rundir import RunDir, disk_errors, write_atomic

HTML, JSON = "report.html", "report.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a scan found; samples = kept + quarantined, and quarantined = flagged + unusable."""

    path: Path
    """report.html; report.json lies beside it."""
    verdict: str
    """One sentence."""
    verdict_code: str
    """``groups`` (suspected attacks), ``excess``, ``shared`` (no excess overall, but pictures with a shared
    mark), ``labels`` (no excess overall, but in some labels), ``no-excess``, ``nothing``, ``fewer`` (than in
    the trusted set) or ``unknown``."""
    samples: int
    """Corpus samples in the index."""
    kept: int
    quarantined: int
    flagged: int
    """Suspicious samples."""
    unusable: int
    """Samples that could not be read or judged."""
    trusted: int
    facts: dict[str, Any] = field(repr=False)
    """All of report.json."""

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: JSON types only, no NaN."""
        return self.facts


def build_report(run: RunDir) -> Report:
    """Write report.html and report.json of a run whose decision has been made.

    Reads manifest.json, index.parquet, decisions.parquet and, where they exist, groups.json,
    decision_scores.npy, trajectories.npy and pixels/; writes each file atomically.

    Raises:
        InputError: index or decisions are missing or disagree.
        DiskFullError: no space left; an earlier report still stands.
    """
    data = facts_of.read_run(run)
    facts = facts_of.collect(data)
    facts["trusted_check"] = facts_of.finite(trusted_check(data, facts["classes"], facts["excess"]))
    pictures = pictures_of(run, data, facts)
    facts["groups"] = pictures and facts_of.finite([_group_facts(label) for label in pictures.groups])
    facts = {"verdict": judge(run, facts), **facts}
    shown = facts_of.take(data, pictures.rows) if pictures else []
    page = render(facts, pictures, {row["sample_id"]: row for row in shown})
    with disk_errors(run.path):
        write_atomic(run / HTML, page.encode("utf-8"))
        write_atomic(
            run / JSON, json.dumps(facts, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii")
        )
    counts, verdict = facts["counts"], facts["verdict"]
    return Report(
        path=run / HTML,
        verdict=verdict["sentence"],
        verdict_code=verdict["code"],
        samples=counts["indexed"],
        kept=counts["kept"],
        quarantined=counts["quarantined"],
        flagged=counts["suspicious"],
        unusable=counts["unusable"],
        trusted=counts["trusted"],
        facts=facts,
    )


def _group_facts(label: LabelGroups) -> dict[str, Any]:
    return {
        "label": label.label,
        "suspicious": label.suspicious,
        "grouped": label.looked_at,
        "groups": [
            {
                "samples": len(group.rows),
                "strength": group.strength,
                "shares_detail": group.shares_detail,
                "sample_ids": group.rows.tolist(),
            }
            for group in label.groups
        ],
    }
