"""The documentation says what the program does: commands, options, files, links, status codes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from builders import sample, tar

from sanitize.cli import app
from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig
from sanitize.corpus.index import SCHEMA, STATUS
from sanitize.errors import SanitizeError
from sanitize.scores import methods

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PROSE = [*PAGES, *EXAMPLES, ROOT / "mkdocs.yml"]
HOSTS = {
    "arxiv.org",
    "filesystem-spec.readthedocs.io",
    "github.com",
    "keepachangelog.com",
    "semver.org",
}
"""Where a link may lead: papers, standards and source code, never a host that files are installed from."""
_FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`(sanitize [a-z][^`\n]*)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def subcommands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def calls(line: str) -> Iterator[list[str]]:
    """The words of every `sanitize ...` in a shell line, up to a pipe or another command, but "$@"."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if words[:1] == ["sanitize"]:
                yield [one for one in words if one != "$@"]
            words = []
        else:
            words.append(word)


def shell_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def documented_calls() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in _FENCE.findall(page.read_text(encoding="utf-8")):
            found += [(page.name, call) for line in shell_lines(block) for call in calls(line)]
    for script in EXAMPLES:
        if script.suffix == ".sh":
            lines = shell_lines(script.read_text(encoding="utf-8"))
            found += [(script.name, call) for line in lines for call in calls(line)]
    return found


def test_cli_page_is_what_the_program_says() -> None:
    written = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    fresh = load(ROOT / "docs/gen_cli.py").reference()
    assert written == fresh, "run: python docs/gen_cli.py"


def test_every_command_and_option_is_on_the_cli_page() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert {"scan", "filter", "report", "demo"} <= subcommands().keys()
    for name, command in subcommands().items():
        section = page.split(f"## sanitize {name}\n")[1].split("\n## ")[0]
        missing = {option for option in options(command) if option not in section}
        assert not missing, name


def test_there_are_calls_to_check() -> None:
    assert list(calls("x && sanitize scan 'a-{0..9}.tar' --json > out.json; sanitize report r | cat")) == [
        ["sanitize", "scan", "a-{0..9}.tar", "--json"],
        ["sanitize", "report", "r"],
    ]
    assert {page for page, _ in documented_calls()} >= {
        "README.md",
        "quickstart.md",
        "howto.md",
        "pipeline.sh",
    }


@pytest.mark.parametrize(("page", "call"), documented_calls(), ids=lambda value: str(value)[:60])
def test_documented_call_parses(page: str, call: list[str]) -> None:
    if call[1:] == ["--help"]:
        return
    command = subcommands()[call[1]]
    given = command.make_context(call[1], call[2:]).params
    if call[1] in ("scan", "filter"):
        cap = None if given["no_class_cap"] else given["class_cap"]
        method = given["method"] or "combined"
        DecisionConfig.choose(method, given["alpha"], given["reject"], cap)
        assert method in methods()
    if call[1] == "scan":
        CorpusConfig(shards=given["shards"], trusted=given["trusted"], label=given["label"])
        ProxyConfig(**{name: given[name] for name in ("proxy", "epochs", "device", "trajectory", "seed")})


@pytest.mark.parametrize("path", names([*PAGES, *EXAMPLES]))
def test_mentioned_options_exist(path: str) -> None:
    for mention in _INLINE.findall((ROOT / path).read_text(encoding="utf-8")):
        words = mention.split()
        assert words[1] in subcommands(), mention
        unknown = {w for w in words[2:] if w.startswith("--")} - options(subcommands()[words[1]])
        assert not unknown, mention


def test_the_tree_of_files_is_the_package() -> None:
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    lines = re.findall(r"^  (\S+\.\w+)(?:  +(\S.*))?$", text, re.M)
    package = ROOT / "sanitize"
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix in (".py", ".html", ".css", ".typed")
    }
    listed = [name for name, _ in lines]
    assert len(listed) == len(set(listed))
    assert set(listed) == files
    silent = {name for name, said in lines if not said and not name.endswith("/__init__.py")}
    assert not silent


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as the site makes them, and explicit ones."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set(re.findall(r"\{ #(\S+) \}", text)) | set(re.findall(r"^::: (\S+)", text, re.M))
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


@pytest.mark.parametrize("path", names(PAGES))
def test_links_lead_somewhere(path: str) -> None:
    page = ROOT / path
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_navigation_is_the_docs_folder() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = {f"docs/{name}" for name in re.findall(r"(\S+\.md)$", navigation, re.M)}
    assert listed == set(names(DOCS))


@pytest.mark.parametrize("path", ["README.md", "docs/reference/cli.md"])
def test_exit_codes_are_documented(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert listed == {error.exit_code for error in [SanitizeError, *SanitizeError.__subclasses__()]} | {
        0,
        130,
    }


def test_status_codes_and_index_columns_are_documented() -> None:
    page = (ROOT / "docs/reference/run-folder.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", page, re.M))
    assert {code: rows.get(code) for code in STATUS} == STATUS
    index = page.split("## index.parquet")[1].split("\n## ")[0]
    assert set(SCHEMA.names) <= set(re.findall(r"`(\w+)`", index))


@pytest.mark.parametrize("path", names(PROSE))
def test_links_leave_only_to_known_hosts(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://([\w.-]+)", text))
    hosts |= set(re.findall(r"\b(?:[\w-]+\.)+(?:org|com|net|io|dev|cloud)\b", text))
    assert hosts <= HOSTS


@pytest.mark.parametrize("path", names(EXAMPLES))
def test_example_compiles(path: str) -> None:
    file = ROOT / path
    if file.suffix == ".py":
        text = file.read_text(encoding="utf-8")
        compile(text, path, "exec")
        assert '\nif __name__ == "__main__":\n' in text
    else:
        subprocess.run(["bash", "-n", file], check=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two suspicious samples, a repetition of one of them, and a kept sample."""
    run = tmp_path / "run"
    (run / "quarantine").mkdir(parents=True)
    pieces = [sample("a/1", seed=1), sample("a/2", seed=2), sample("a/1", seed=3)]
    (run / "quarantine/s.tar").write_bytes(tar(*pieces))
    rows = [("a/1", "ok", 0.9, True), ("a/2", "ok", 1.0, True), ("a/3", "ok", 0.1, False)]
    rows.append(("a/1", "repeated-key", None, True))
    columns = zip(*rows, strict=True)
    table = pa.table(dict(zip(("key", "status", "anomaly_score", "flagged"), columns, strict=True)))
    for name, value in {"shard": "s.tar", "label": "0", "reason": "learned earlier"}.items():
        table = table.append_column(name, pa.array([value] * len(rows)))
    pq.write_table(table, run / "decisions.parquet")
    return run


def example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples/read_decisions.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_read_decisions_lists_and_readmits(run: Path, tmp_path: Path) -> None:
    listed = example(run).stdout.splitlines()
    assert [line.split()[1] for line in listed[:2]] == ["s.tar/a/2", "s.tar/a/1"]
    assert listed[-1] == "2 suspicious samples"
    out = tmp_path / "back.tar"
    assert example(run, "--readmit", "s.tar/a/1", "--out", out).returncode == 0
    with tarfile.open(out) as back, tarfile.open(run / "quarantine/s.tar") as source:
        assert back.getnames() == ["a/1.jpg", "a/1.cls"]
        first = [source.extractfile(member) for member in source.getmembers()[:2]]
        again = [back.extractfile(member) for member in back.getmembers()]
        assert [f.read() for f in again if f] == [f.read() for f in first if f]


def test_read_decisions_refuses_what_is_not_suspicious(run: Path, tmp_path: Path) -> None:
    refused = example(run, "--readmit", "s.tar/a/3", "--out", tmp_path / "back.tar")
    assert refused.returncode == 1
    assert "not a suspicious sample" in refused.stderr
    assert not (tmp_path / "back.tar").exists()


def test_pipeline_stops_or_trains(tmp_path: Path) -> None:
    """The script with a stand-in for `sanitize`: code 5 stops it, code 0 leads to training on kept/."""
    stand_in = tmp_path / "bin/sanitize"
    stand_in.parent.mkdir()
    run = tmp_path / "run"
    (run / "kept").mkdir(parents=True)
    (run / "kept/b.tar.gz").touch()
    (run / "kept/a.tar").touch()
    script = [ROOT / "examples/pipeline.sh", "shards", "clean", run, "cat"]
    for code in (5, 0):
        stand_in.write_text(f"#!/bin/sh\nexit {code}\n")
        stand_in.chmod(0o755)
        path = f"{stand_in.parent}:/usr/bin:/bin"
        done = subprocess.run(script, capture_output=True, text=True, env={"PATH": path}, check=False)
        assert done.returncode == code
        kept = [str((run / "kept" / name).resolve()) for name in ("a.tar", "b.tar.gz")]
        assert done.stdout.split() == ([] if code else kept)


@pytest.mark.parametrize("repairs", [0, 2])
@pytest.mark.parametrize("finds", [0, 3, 5])
def test_before_deploying_repairs_what_is_backdoored_alone(tmp_path: Path, finds: int, repairs: int) -> None:
    """The script with a stand-in for `sanitize` that says what it was asked and finds what it is told to."""
    stand_in = tmp_path / "bin/sanitize"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@"\ntest "$1" = repair && exit {repairs}\nexit {finds}\n')
    stand_in.chmod(0o755)
    script = [ROOT / "examples/before_deploying.sh", "far/model.pt", "clean", "out/", "--arch", "a:b"]
    path = f"{stand_in.parent}:/usr/bin:/bin"
    done = subprocess.run(script, capture_output=True, text=True, env={"PATH": path}, check=False)
    assert done.returncode == finds
    asked = [
        "inspect far/model.pt --trusted clean --out out --fail-on backdoor --arch a:b",
        "repair far/model.pt --trusted clean --out out/repaired-model.pt --arch a:b",
    ]
    assert done.stdout.splitlines() == (asked if finds == 5 else asked[:1])
    assert ("do not deploy far/model.pt" in done.stderr) == (finds == 5)
    assert ("the repair failed" in done.stderr) == (finds == 5 and repairs != 0)
