"""Scan a corpus from Python and act on the verdict.

python examples/scan_in_python.py 'scraped/data-{000..099}.tar' clean/ run
"""

from __future__ import annotations

import sys

import sanitize
from sanitize.errors import SanitizeError
from sanitize.progress import for_stderr


def main(shards: str, trusted: str, out: str) -> int:
    """Scan, print what was found per class, and return an exit code."""
    try:
        report = sanitize.scan(shards, trusted=trusted, out=out, progress=for_stderr())
    except SanitizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.verdict)
    print(f"{report.kept:,} kept, {report.flagged:,} suspicious, {report.unusable:,} unusable")
    for row in report.facts["classes"][:5]:
        mark = "  stands out" if row["stands_out"] else ""
        # A label was written by a stranger: !a keeps control characters off the terminal.
        print(f"  {row['ratio']:6.1%} of {row['label']!a}{mark}")
    print(f"report: {report.path}")
    return 0


# The guard is needed: indexing and decoding may start processes that import this file again.
if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} SHARDS TRUSTED RUN")
    sys.exit(main(*sys.argv[1:]))
