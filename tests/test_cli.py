import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, Outcome, Shards, make_shards, run_cli, scan_arguments

import sanitize
from sanitize import cli, pipeline
from sanitize.config import ScanConfig
from sanitize.errors import SanitizeError

COMMANDS = ["scan", "filter", "report", "demo"]


def test_without_arguments_help() -> None:
    outcome = run_cli()
    printed = outcome.out + outcome.err
    for command in COMMANDS:
        assert command in printed
    assert "Usage" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    outcome = run_cli(command, "--help")
    assert outcome.code == 0
    for name in inspect.signature(getattr(cli, command)).parameters:
        shown = {"as_json": "json"}.get(name, name).replace("_", "-")
        assert f"--{shown}" in outcome.out or f"  {name} <" in outcome.out, name


def test_the_api_has_the_names_and_defaults_of_the_commands(shards: Shards) -> None:
    for command in ("scan", "filter", "report"):
        options = inspect.signature(getattr(cli, command)).parameters
        arguments = inspect.signature(getattr(sanitize, command)).parameters
        for name, argument in arguments.items():
            if name == "progress":
                continue
            assert name in options
            if (
                argument.default is not argument.empty
                and options[name].default is not inspect.Parameter.empty
            ):
                assert str(argument.default) == str(options[name].default), name


def test_defaults_agree_with_the_configuration(monkeypatch: pytest.MonkeyPatch, shards: Shards) -> None:
    seen: list[ScanConfig] = []

    def remember(config: ScanConfig, *_: Any) -> None:
        seen.append(config)
        raise SanitizeError("that will do")

    monkeypatch.setattr(pipeline, "run_scan", remember)
    assert run_cli("scan", shards.corpus, "--trusted", shards.trusted).code == 1
    with pytest.raises(SanitizeError):
        sanitize.scan(shards.corpus, trusted=shards.trusted)
    from sanitize.config import CorpusConfig

    plain = ScanConfig(corpus=CorpusConfig(shards=str(shards.corpus), trusted=str(shards.trusted)))
    assert seen == [plain, plain]


def test_json_is_one_object_and_nothing_else(scan: Any, tmp_path: Path) -> None:
    outcome: Outcome = scan(json=True)
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    facts = json.loads(outcome.out)
    assert facts["counts"]["indexed"] == SAMPLES
    assert facts == json.loads((tmp_path / "run" / "report.json").read_text())
    for command in ("report", "filter"):
        again = run_cli(command, tmp_path / "run", "--json")
        assert (again.code, json.loads(again.out)["counts"]["indexed"]) == (0, SAMPLES)


def test_the_summary_reconciles(run_copy: Path) -> None:
    outcome = run_cli("report", run_copy)
    assert outcome.code == 0
    assert outcome.err == ""
    words = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines() if line.startswith("  ")}
    assert int(words["indexed"]) == SAMPLES
    assert int(words["kept"]) + int(words["quarantined"]) == SAMPLES
    assert int(words["suspicious"]) + int(words["unusable"]) == int(words["quarantined"])
    assert outcome.out.rstrip().endswith(f"Report: {run_copy / 'report.html'}")
    assert (run_copy / "kept").is_dir()
    assert str(run_copy / "quarantine") in outcome.out


def test_progress_is_plain_lines_where_there_is_no_terminal(scan: Any) -> None:
    outcome: Outcome = scan()
    assert [line.split(":")[0] for line in outcome.err.splitlines()] == ["index", "decode", "train", "write"]
    assert "\x1b" not in outcome.err + outcome.out
    assert "index" not in outcome.out.split("indexed")[0]


def test_fail_on(run_copy: Path) -> None:
    assert run_cli("filter", run_copy, "--reject", 0.1, "--fail-on", 0.1).code == 0
    outcome = run_cli("filter", run_copy, "--reject", 0.1, "--fail-on", 0.05, "--json")
    assert outcome.code == 5
    assert json.loads(outcome.out)["counts"]["suspicious"] == 30
    assert "30 of 300 samples are flagged, over --fail-on 0.05; see " in outcome.err
    assert run_cli("filter", run_copy, "--fail-on", 1.5).code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan"],
        ["scan", "x"],
        ["scan", "x", "--trusted", "y", "--epochs", "many"],
        ["scan", "x", "--trusted", "y", "--nonsense"],
        ["nonsense"],
        ["filter"],
        ["scan", "x", "--trusted", "y", "--epochs", "1"],
        ["scan", "x", "--trusted", "y", "--alpha", "0.1", "--reject", "0.1"],
        ["scan", "x", "--trusted", "y", "--device", "tpu"],
        ["scan", "x", "--trusted", "y", "--label", "class"],
        ["scan", "x", "--trusted", "y", "--method", "magic"],
        ["scan", "x", "--trusted", "y", "--fail-on", "2"],
        ["scan", "pipe:cat x.tar", "--trusted", "y"],
    ],
)
def test_usage_errors(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_input_errors(tmp_path: Path, shards: Shards) -> None:
    for arguments in (
        ["scan", tmp_path / "none", "--trusted", shards.trusted, "--out", tmp_path / "run"],
        ["report", tmp_path],
        ["filter", tmp_path / "none"],
    ):
        outcome = run_cli(*arguments)
        assert (outcome.code, outcome.err.startswith("error: ")) == (3, True)


def test_an_out_folder_with_something_else_in_it(shards: Shards, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    outcome = run_cli(*scan_arguments(shards, tmp_path))
    assert (outcome.code, "holds thesis.tex" in outcome.err) == (4, True)
    outcome = run_cli(*scan_arguments(shards, tmp_path / "thesis.tex"))
    assert (outcome.code, "is a file" in outcome.err) == (2, True)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, shards: Shards, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_scan", interrupt)
    outcome = run_cli(*scan_arguments(shards, tmp_path / "run"))
    assert (outcome.code, outcome.err) == (130, "interrupted: the same command goes on from here\n")


def test_no_error_text_reaches_the_terminal_raw(monkeypatch: pytest.MonkeyPatch, shards: Shards) -> None:
    def fail(*_: Any) -> None:
        raise SanitizeError("key \x1b[2J\x07 [red]x[/] \u202e\udcff\nsecond line")

    monkeypatch.setattr(pipeline, "run_scan", fail)
    outcome = run_cli("scan", shards.corpus, "--trusted", shards.trusted)
    assert outcome.err == "error: key \\x1b[2J\\x07 [red]x[/] \\u202e\\udcff\nsecond line\n"


@pytest.mark.slow
def test_the_command_as_a_process(tmp_path: Path) -> None:
    """Only here does what the worker processes and libraries print by themselves count, too."""
    own = make_shards(tmp_path, samples=90)
    command = [sys.executable, "-c", "from sanitize.cli import main; main()"]
    done = subprocess.run(
        [*command, *scan_arguments(own, tmp_path / "run", json=True)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["indexed"] == 90
    lines = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert lines == ["index", "decode", "train", "write"]
