"""A report as a test reads it: the facts, and the page with every tag closed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run

from sanitize.reporting.build import Report, build_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags, attributes and whether every tag that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def report_of(path: Path, **options: Any) -> tuple[Report, dict[str, Any], Page, str]:
    with make_run(path, **options) as run:
        report = build_report(run)
    return read_back(report)


def read_back(report: Report) -> tuple[Report, dict[str, Any], Page, str]:
    html = report.path.read_text(encoding="utf-8")
    facts = json.loads(report.path.with_name("report.json").read_text(), parse_constant=pytest.fail)
    page = Page(html)
    assert page.open == [], "every element is closed"
    return report, facts, page, html
