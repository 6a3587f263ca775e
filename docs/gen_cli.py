"""Write docs/reference/cli.md from the --help of every command: `python docs/gen_cli.py`."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from sanitize.cli import app

PAGE = Path(__file__).parent / "reference" / "cli.md"
WIDTH = 100

HEAD = """\
# Command line

<!-- Written by docs/gen_cli.py from the program's own help. Do not edit by hand. -->

Results go to stdout, progress and messages to stderr; where stderr is no terminal, progress is plain
lines. With `--json` stdout holds exactly one JSON object. The settings of a scan have the same names and
defaults in the [Python API](api.md).

| exit code | meaning |
|---|---|
| 0 | finished, whatever was found |
| 1 | something unexpected: the disk is full, the proxy diverged, a written shard does not read back |
| 2 | an option or argument that makes no sense |
| 3 | input that cannot be read or used |
| 4 | the run folder belongs to other settings, other shards or another running process |
| 5 | `--fail-on`: too much was flagged, or the model did not pass; all is written nevertheless |
| 130 | interrupted; the same command goes on |
"""


def commands() -> list[str]:
    """Names of all commands, in the order of the help."""
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def help_text(*arguments: str) -> str:
    """What `sanitize ARGUMENTS --help` prints on a terminal of 100 columns."""
    result = CliRunner().invoke(
        app, [*arguments, "--help"], prog_name="sanitize", terminal_width=WIDTH, max_content_width=WIDTH
    )
    if result.exit_code:
        raise SystemExit(f"sanitize {' '.join(arguments)} --help failed:\n{result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def reference() -> str:
    """The whole page."""
    parts = [HEAD, f"## sanitize\n\n```text\n{help_text()}\n```\n"]
    parts += [f"## sanitize {name}\n\n```text\n{help_text(name)}\n```\n" for name in commands()]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
