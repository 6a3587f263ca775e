"""The page of `sanitize inspect`: facts and pictures in, one self-contained HTML text out.

Verdict first, then the evidence, then its limits. Labels and file names were written by strangers and go
through `show`; pictures are encoded anew from pixels.
"""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from sanitize.reporting.text import next_steps, number_of, percent, show, show_long

Facts = dict[str, Any]
Pixels = npt.NDArray[np.uint8]

CLASSES_SHOWN = 40
SHOWN_SIDE = 96
"""Largest side of a picture; larger ones are shrunk."""

NAMES = {
    "universal": "universal change",
    "calibrated": "calibrated trigger inversion",
    "neural-cleanse": "Neural Cleanse",
    "mask-size": "size of the mask",
    "margin": "largest margin",
    "head": "rows of the last layer",
    "alone": "without the references",
    "natural": "natural score",
    "waves": "plane wave",
    "phase": "phase of a wave",
}
MEANING = {
    "universal": "How much more often one small added picture turns held-out images into the class than "
    "one of the same norm does for the median class, in log-odds: 2.2 is 86 % where the median is 40 %.",
    "calibrated": "Share of held-out trusted images that one added picture turns into the class, minus the "
    "same share for a repaired copy of the model.",
    "neural-cleanse": "How much smaller a mask turns trusted images into the class than into the "
    "other classes, in units of their spread.",
    "mask-size": "How many times smaller that mask is than the median one: 1 is half, 2 is a quarter.",
    "margin": "How far the class can be pushed ahead of the others by any input at all, next to the other "
    "classes.",
    "head": "How unusual the class's weights in the last layer are among the classes. No verdict uses it.",
    "waves": "How many more trusted images the model calls the class with a plane wave laid over them than "
    "the reference networks do, in units of their spread, for the wave where it is most. Waves of up to 14 "
    "periods an image are tried.",
    "phase": "How much the class depends on where a faint plane wave begins, for the wave where it is most, "
    "next to the other waves and classes of this network; 7 counts like 0.7. Texture is the same wherever "
    "it begins, unless the network knows places (by a flattened head, or position embeddings).",
    "alone": "The score as it would be if there were no reference networks.",
    "natural": "The mean score of the class in the reference networks, which is taken off the model's.",
}
LIMITS = (
    (
        "A quiet verdict is not a certificate",
        "Triggers that are no fixed picture (warps, reflections, triggers that depend on the image), faint "
        "ones over the whole image, several targets at once, and attackers who know these statistics can "
        "stay below any threshold. What reference networks share with the model counts as natural.",
    ),
    (
        "An alarm is not a proof",
        "Every classifier has pictures that push most images into some class. A class can also stand out "
        "because its training images share a natural mark, or because the network knows where things are.",
    ),
    (
        "Classes are compared with each other",
        "With few classes, or when most classes are targets, nothing stands out. A rebuilt trigger works "
        "like the attacker's; it need not look like it.",
    ),
)
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
"""


@dataclass(frozen=True, kw_only=True)
class TriggerPictures:
    """A rebuilt trigger of a class."""

    class_id: int
    label: str
    """Of the class."""
    statistic: str
    """``universal``, ``calibrated``, ``neural-cleanse``, ``phase`` or ``waves``."""
    trigger: Pixels
    """(R, R, 3) on mid grey."""
    magnified: int
    """How many times stronger it is there than on the images."""
    before: Pixels
    """(N, R, R, 3) trusted images."""
    after: Pixels
    """(N, R, R, 3) the same with the trigger on."""
    called: list[str]
    """(N,) what the model calls the stamped images."""
    success: float
    """Share of held-out images of other classes that it turns."""
    repaired_success: float | None
    """The same for the repaired copy."""


def render(facts: Facts, pictures: list[TriggerPictures]) -> str:
    """The page.

    Args:
        facts: all of report.json.
        pictures: of the classes over the threshold, or of the highest; none where no trigger was rebuilt.
    """
    css = (resources.files("sanitize.reporting") / "page.css").read_text(encoding="utf-8")
    body = "\n".join(
        part
        for part in (
            _pictures(pictures),
            _classes(facts),
            _statistics(facts),
            _notes(facts),
            _limits(),
            _details(facts),
        )
        if part
    )
    return (
        f"{_HEAD}<title>{show('sanitize: ' + facts['verdict']['sentence'])}</title>\n<style>\n{css}</style>\n"
        f'</head>\n<body>\n<header>\n<p class="kicker">sanitize · checkpoint report</p>\n{_verdict(facts)}\n'
        f"</header>\n<main>\n{body}\n</main>\n<footer><p>Written by sanitize "
        f"{show(facts['versions']['sanitize'])}. The same facts for machines: report.json.</p></footer>\n"
        "</body>\n</html>\n"
    )


def _verdict(facts: Facts) -> str:
    verdict = facts["verdict"]
    mark = "▲ Suspicious" if verdict["backdoored"] else "● Nothing stands out"
    return (
        f'<div class="verdict {"groups" if verdict["backdoored"] else "nothing"}"><p class="mark">{mark}</p>'
        f"<h1>{show_long(verdict['sentence'])}</h1>"
        f"<p>Score {verdict['score']:.2f}, threshold {verdict['threshold']:.2f} "
        f"({show(verdict['method'])}). How sure: {show_long(verdict['calibration'])}.</p></div>"
        f"{next_steps(verdict['next'])}"
    )


def _pictures(pictures: list[TriggerPictures]) -> str:
    sections: list[str] = []
    for (_, label), own in itertools.groupby(pictures, key=lambda one: (one.class_id, one.label)):
        highest = "the class with the highest score" if not sections else "over the threshold, too"
        lead = (
            f"What is to turn trusted images of other classes into <strong>{show(label)}</strong>, "
            f"{highest}. Above each other: the image, and the image with the trigger on."
        )
        blocks = "".join(_trigger(picture) for picture in own)
        sections.append(
            f'<section><h2>Rebuilt trigger of {show(label)}</h2><p class="lead">{lead}</p>{blocks}</section>'
        )
    return "".join(sections)


def _trigger(picture: TriggerPictures) -> str:
    pairs = "".join(
        f'<li><img alt="trusted image" src="{png(before)}"><img alt="with the trigger" src="{png(after)}">'
        f"<small>{show(called)}</small></li>"
        for before, after, called in zip(picture.before, picture.after, picture.called, strict=True)
    )
    repaired = (
        ""
        if picture.repaired_success is None
        else f", and of {percent(picture.repaired_success)} for the repaired copy"
    )
    times = f", {picture.magnified} times stronger" if picture.magnified > 1 else ""
    return (
        f'<div class="label-block"><h3>{NAMES[picture.statistic]}</h3><p>It changes the answer for '
        f"{percent(picture.success)} of the held-out images of other classes{repaired}.</p>"
        f'<div class="evidence"><figure><img alt="rebuilt trigger on grey" src="{png(picture.trigger)}">'
        f"<figcaption>the trigger, on grey{times}</figcaption></figure>"
        f'<ul class="strip">{pairs}</ul></div></div>'
    )


def _classes(facts: Facts) -> str:
    rows = [row for row in facts["classes"] if row["score"] is not None]
    rows.sort(key=lambda row: -row["score"])
    shown = rows[:CLASSES_SHOWN]
    threshold = facts["verdict"]["threshold"]
    scale = max([row["score"] for row in shown] + [threshold, 1e-6]) * 1.08
    body = "".join(_class_row(row, scale, threshold) for row in shown)
    left = len(facts["classes"]) - len(shown)
    rest = (
        f'<p class="sum-line soft">{number_of(left, "more class")} with lower scores, or not looked at: see '
        "report.json.</p>"
        if left
        else ""
    )
    return (
        "<section><h2>Every class</h2>"
        '<p class="lead">How suspicious each class is as a target, highest first.</p>'
        '<p class="sum-line soft"><span class="key-line cap"></span> threshold</p>'
        '<table class="bars"><thead><tr><th>class</th><th>score</th><th class="num">score</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{rest}</section>"
    )


def _class_row(row: Facts, scale: float, threshold: float) -> str:
    marks = f'<b style="width:{100 * max(row["score"], 0) / scale:.2f}%"></b>'
    marks += f'<u style="left:{100 * threshold / scale:.2f}%"></u>'
    over = row["score"] > threshold
    tag = '<br><span class="tag look">▲ over the threshold</span>' if over else ""
    return (
        f'<tr{" class=stands" if over else ""}><th scope="row">{show(row["label"])}{tag}</th>'
        f'<td class="track-cell"><div class="track">{marks}</div></td>'
        f'<td class="num">{row["score"]:.2f}</td></tr>'
    )


def _statistics(facts: Facts) -> str:
    body = "".join(
        f"<tr><td><strong>{NAMES[row['statistic']]}</strong><br>{MEANING[row['statistic']]}</td>"
        f'<td class="num">{row["largest"]:.2f}</td><td>{show(row["label"])}</td></tr>'
        for row in facts["statistics"]
    )
    return (
        '<section><h2>What each statistic says</h2><table class="stack-table wrongs"><thead><tr>'
        '<th>statistic</th><th class="num">largest anomaly</th><th>of class</th></tr></thead>'
        f"<tbody>{body}</tbody></table></section>"
    )


def _notes(facts: Facts) -> str:
    if not facts["notes"]:
        return ""
    notes = "".join(f'<p class="note">{show_long(note)}</p>' for note in facts["notes"])
    return f"<section><h2>What weakens this evidence</h2>{notes}</section>"


def _limits() -> str:
    items = "".join(f"<div><h3>{title}</h3><p>{text}</p></div>" for title, text in LIMITS)
    return f'<section><h2>What this cannot tell</h2><div class="limits">{items}</div></section>'


def _details(facts: Facts) -> str:
    blocks = [
        ("Model", facts["model"]),
        ("Settings and seed", facts["settings"]),
        ("Seconds", {name: f"{value:.1f}" for name, value in facts["seconds"].items()}),
        ("Versions", facts["versions"]),
    ]
    body = "".join(
        f'<details><summary>{title}</summary><div class="scroll">{_table(values)}</div></details>'
        for title, values in blocks
    )
    return f'<section class="more"><h2>How this was made</h2>{body}</section>'


def _table(values: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{show(name)}</th><td class="mono">'
        f"{show('–' if value is None else value)}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="stack-table"><tbody>{rows}</tbody></table>'


def png(picture: Pixels) -> str:
    """(R, R, 3) pixels as a PNG data URI, no larger than SHOWN_SIDE."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
