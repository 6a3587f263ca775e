"""List the most suspicious samples of a run, or put single ones back into a shard of their own.

python examples/read_decisions.py run --label 7
python examples/read_decisions.py run --readmit data-000.tar/000123 --out readmitted.tar

Samples are named SHARD/KEY, as they are listed. The shard is written outside the run folder, to be trained on
beside kept/, which belongs to the run. Reads what tarfile reads: .tar and .tar.gz.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq


def suspicious(run: Path) -> list[dict[str, Any]]:
    """Flagged samples that can be used, the most suspicious first."""
    table = pq.read_table(run / "decisions.parquet")
    chosen = table.filter(pc.and_(table["flagged"], pc.equal(table["status"], "ok")))
    return chosen.sort_by([("anomaly_score", "descending")]).to_pylist()


def show(rows: list[dict[str, Any]], label: str | None, count: int) -> None:
    """Print a line a sample; !a keeps what strangers wrote from driving the terminal."""
    wanted = [row for row in rows if label is None or row["label"] == label]
    for row in wanted[:count]:
        name = ascii(f"{row['shard']}/{row['key']}")[1:-1]
        print(f"{row['anomaly_score']:.3f}  {name}  {row['label']!a}  {row['reason']}")
    print(f"{len(wanted):,} suspicious samples" + (f" with label {label!a}" if label else ""))


def readmit(run: Path, rows: list[dict[str, Any]], names: list[str], out: Path) -> int:
    """Copy the members of the named samples from quarantine/ to `out`; returns how many samples."""
    known = {f"{row['shard']}/{row['key']}": row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"{unknown[0]!a} is not a suspicious sample of {run}; list them without --readmit")
    with tarfile.open(out, "w") as target:
        for name in dict.fromkeys(names):
            row = known[name]
            if not copy_sample(run / "quarantine" / row["shard"], row["key"], target):
                sys.exit(f"{name!a} cannot be read from quarantine/")
    return len(set(names))


def copy_sample(shard: Path, key: str, target: tarfile.TarFile) -> int:
    """Copy the first members in a row that have this key; returns how many.

    Only the first: a later sample with the same key is in the quarantine because it is a repetition.
    """
    copied = 0
    with tarfile.open(shard) as source:
        for member in source:
            if member.isfile() and key_of(member.name) == key:
                target.addfile(member, source.extractfile(member))
                copied += 1
            elif copied:
                break
    return copied


def key_of(member: str) -> str:
    """WebDataset's key: everything up to the first dot of the base name."""
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--label", help="list only this label")
    parser.add_argument("--count", type=int, default=20, help="list this many")
    parser.add_argument("--readmit", nargs="+", metavar="SHARD/KEY", help="put these samples back")
    parser.add_argument("--out", type=Path, default=Path("readmitted.tar"))
    arguments = parser.parse_args()
    rows = suspicious(arguments.run)
    if arguments.readmit:
        count = readmit(arguments.run, rows, arguments.readmit, arguments.out)
        print(f"{count:,} samples in {arguments.out}")
    else:
        show(rows, arguments.label, arguments.count)


if __name__ == "__main__":
    main()
