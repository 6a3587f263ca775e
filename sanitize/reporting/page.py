"""The report page: facts in, one self-contained HTML text out.

Keys, labels, reasons and shard names were written by strangers. Whatever is not written in this file goes
through `show`, which escapes it and makes control and direction characters visible.
"""

from __future__ import annotations

import json
import string
from importlib import resources
from typing import Any

from sanitize.reporting.facts import Facts
from sanitize.reporting.page_samples import suspected_attacks, suspicious_samples, trusted_set
from sanitize.reporting.plots import bands_plot, histogram_plot, responsive, swatch
from sanitize.reporting.text import next_steps, number_of, percent, show, show_long
from sanitize.reporting.thumbnails import Pictures

CLASSES_SHOWN = 40
SHARDS_SHOWN = 2000

_MARKS = {
    "groups": "▲ Look closer",
    "excess": "▲ Look closer",
    "shared": "▲ Look closer",
    "labels": "▲ Look closer",
    "fewer": "▲ Check the trusted set",
    "trusted": "▲ Check the trusted set",
    "no-excess": "● Within the budget",
    "nothing": "● Nothing flagged",
    "unknown": "◆ Open",
}


def render(facts: Facts, pictures: Pictures | None, shown: dict[int, Facts]) -> str:
    """The page.

    Args:
        facts: all of report.json.
        pictures: None when the run has no pixel cache any more.
        shown: decision row of every corpus sample in `pictures`.
    """
    here = resources.files("sanitize.reporting")
    template = string.Template((here / "page.html").read_text(encoding="utf-8"))
    versions = facts["versions"]
    program = f"sanitize {show(versions['sanitize'])}" if versions.get("sanitize") else "sanitize"
    trusted = trusted_set(facts, pictures, shown)
    return template.substitute(
        css=(here / "page.css").read_text(encoding="utf-8"),
        title=show("sanitize: " + facts["verdict"]["sentence"]),
        verdict=_verdict(facts),
        notes=_notes(facts),
        counts=_counts(facts),
        attacks=suspected_attacks(facts, pictures, shown),
        suspicious=suspicious_samples(facts, pictures, shown),
        alarm=trusted if facts["trusted_check"]["alarming"] else "",
        trusted="" if facts["trusted_check"]["alarming"] else trusted,
        classes=_classes(facts),
        scores=_scores(facts),
        losses=_losses(facts),
        unusable=_unusable(facts),
        limits=_limits(facts),
        details=_details(facts),
        footer=f"Written by {program} from the run folder alone. The same facts for machines: report.json.",
    )


def _verdict(facts: Facts) -> str:
    verdict = facts["verdict"]
    paragraphs = "".join(f"<p>{show_long(text)}</p>" for text in verdict["details"][:1])
    names = verdict["labels"]
    also, other = ("also ", "Other pictures") if facts["suspected_attacks"] else ("", "Pictures")
    if names:
        shown = ", ".join(f"<strong>{show(name)}</strong>" for name in names[:6])
        more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
        paragraphs += (
            f"<p>What is flagged {also}gathers in {number_of(len(names), 'label')}: {shown}{more}.</p>"
        )
    if verdict["shared_detail"]:
        shared = ", ".join(
            f"{group['samples']:,} labelled <strong>{show(group['label'])}</strong>"
            for group in verdict["shared_detail"][:6]
        )
        paragraphs += f"<p>{other} that share a fixed detail, as a trigger would leave: {shared}.</p>"
    paragraphs += "".join(f"<p>{show_long(text)}</p>" for text in verdict["details"][1:])
    return (
        f'<div class="verdict {verdict["code"]}"><p class="mark">{_MARKS[verdict["code"]]}</p>'
        f"<h1>{show_long(verdict['sentence'])}</h1>{paragraphs}</div>{next_steps(verdict['next'])}"
    )


def _notes(facts: Facts) -> str:
    if not facts["notes"]:
        return ""
    notes = "".join(f'<p class="note">{show(note)}</p>' for note in facts["notes"])
    return f"<section><h2>Notes from the scan</h2>{notes}</section>"


def _counts(facts: Facts) -> str:
    counts = facts["counts"]
    parts = [(name, counts[name]) for name in ("kept", "suspicious", "unusable")]
    bar = "".join(f'<span class="fill-{name}" style="flex:{n} 0 0"></span>' for name, n in parts if n)
    label = ", ".join(f"{name} {n:,}" for name, n in parts)
    indexed = max(counts["indexed"], 1)
    sums = "".join(
        f'<div><dt><i class="fill-{name}"></i>{name}</dt><dd>{n:,}<small>{percent(n / indexed)}</small>'
        "</dd></div>"
        for name, n in parts
    )
    return (
        '<section><h2>Every sample is accounted for</h2><p class="lead">Suspicious and unusable samples '
        "are in "
        f'quarantine; nothing was dropped.</p><div class="stack" role="img" aria-label="{label}">{bar}</div>'
        f'<dl class="sums"><div><dt>indexed</dt><dd>{counts["indexed"]:,}<small>corpus samples</small>'
        f"</dd></div>{sums}"
        f"<div><dt>trusted</dt><dd>{counts['trusted']:,}<small>for comparison only</small></dd></div></dl>"
        f'<p class="sum-line">{counts["indexed"]:,} indexed = {counts["kept"]:,} kept + '
        f"{counts['quarantined']:,} "
        f"quarantined; {counts['quarantined']:,} quarantined = {counts['suspicious']:,} suspicious + "
        f"{counts['unusable']:,} unusable.</p>{_reconciled(facts)}</section>"
    )


def _reconciled(facts: Facts) -> str:
    counts = facts["counts"]
    if counts["reconciles"] is None:
        return '<p class="sum-line soft">The shards have not been written yet.</p>'
    if counts["reconciles"]:
        files = sum(not shard["trusted"] for shard in facts["shards"])
        shards = number_of(files, "shard")
        return (
            f'<p class="sum-line soft">The same numbers were read back from what was written ({shards}).</p>'
        )
    return (
        '<p class="note"><strong>The counts do not add up.</strong> The written shards hold '
        f"{counts['written_kept']:,} kept and {counts['written_quarantined']:,} quarantined samples. Do "
        "not train on "
        "them; run the same command again.</p>"
    )


def _classes(facts: Facts) -> str:
    rows = facts["classes"]
    if not rows:
        return ""
    cap, excess = facts["decision"].get("class_cap"), facts["excess"]
    shown = rows[:CLASSES_SHOWN]
    trusted = excess["trusted_ratio"] if excess["known"] else None
    # The cap is far right of most bars; it sets the scale only where something comes near it.
    scale = max([row["ratio"] for row in shown] + [trusted or 0.0, 1e-6]) * 1.08
    if cap is not None and cap < 1.6 * scale:
        scale = max(scale, cap * 1.04)
    key = []
    if trusted is not None:
        key.append(
            f'<span class="key-line"></span> {percent(trusted)} of the trusted samples lie over the threshold'
        )
    if cap is not None:
        at = '<span class="key-line cap"></span>' if cap <= scale else ""
        beyond = "" if cap <= scale else " (beyond the right edge)"
        key.append(f"{at} cap: at most {percent(cap)} of a class is taken out{beyond}")
    body = "".join(_class_row(row, scale, trusted, cap) for row in shown)
    rest = ""
    if len(rows) > len(shown):
        flagged = sum(row["suspicious"] for row in rows[len(shown) :])
        rest = (
            f'<p class="sum-line soft">{number_of(len(rows) - len(shown), "more class")} with lower shares, '
            "together "
            f"{flagged:,} suspicious samples: see report.json.</p>"
        )
    spared = excess.get("spared_by_cap") or 0
    if spared:
        rest += f'<p class="sum-line soft">The cap kept {number_of(spared, "sample")} over the threshold.</p>'
    lead = "How much of each class is suspicious, highest share first."
    return (
        f'<section><h2>Removed per class</h2><p class="lead">{lead}</p><p class="sum-line '
        f'soft">{" · ".join(key)}</p>'
        '<table class="bars"><thead><tr><th>class</th><th>suspicious share</th><th class="num">share</th>'
        f'<th class="num">samples</th></tr></thead><tbody>{body}</tbody></table>{rest}</section>'
    )


def _class_row(row: Facts, scale: float, trusted: float | None, cap: float | None) -> str:
    marks = f'<b style="width:{100 * row["ratio"] / scale:.2f}%"></b>' if row["suspicious"] else ""
    if trusted is not None:
        marks += f'<i style="left:{100 * trusted / scale:.2f}%"></i>'
    if cap is not None and cap <= scale:
        marks += f'<u style="left:{100 * cap / scale:.2f}%"></u>'
    tags = []
    if row["stands_out"]:
        tags.append('<span class="tag look">▲ stands out</span>')
        if row["trusted_over"] is not None and row["trusted"]:
            tags.append(f'<span class="tag">trusted: {row["trusted_over"]} of {row["trusted"]} over</span>')
    if not row["trusted"]:
        tags.append('<span class="tag">no trusted samples: judged blind</span>')
    if not row["usable"]:
        tags.append('<span class="tag">only in the trusted set</span>')
    kind = ' class="stands"' if row["stands_out"] else ""
    return (
        f'<tr{kind}><th scope="row">{show(row["label"])}{"".join("<br>" + tag for tag in tags)}</th>'
        f'<td class="track-cell"><div class="track">{marks}</div></td><td '
        f'class="num">{percent(row["ratio"])}</td>'
        f'<td class="num soft">{row["suspicious"]:,} of {row["usable"]:,}</td></tr>'
    )


def _scores(facts: Facts) -> str:
    histogram = facts["histogram"]
    if histogram is None:
        return ""
    legend = f"<li>{swatch('kept-bar')} corpus, under the threshold</li>"
    legend += f"<li>{swatch('suspicious-bar')} corpus, over it</li>"
    caption = "Each set adds up to 100 %; the outermost bins hold the tails."
    if histogram["trusted"]:
        legend += f"<li>{swatch('trusted')} trusted</li>"
        caption += (
            f" The trusted line rests on {histogram['trusted_samples']:,} samples, so small steps mean "
            "nothing. Bars that rise above the line to the right of the threshold are what clean data "
            "does not explain."
        )
    return (
        '<section><h2>Scores: corpus against trusted</h2><figure class="plot">'
        f'<ul class="legend">{legend}</ul>{responsive(histogram_plot, histogram)}'
        f"<figcaption>{caption}</figcaption></figure></section>"
    )


def _losses(facts: Facts) -> str:
    bands = facts["bands"]
    if bands is None or not any(bands.get(name) for name in ("trusted", "kept", "suspicious")):
        return ""
    names = [name for name in ("trusted", "kept", "suspicious") if bands.get(name)]
    legend = "".join(f"<li>{swatch(name)} {name}</li>" for name in names)
    drawn = ", ".join(f"{bands[name]['drawn']:,} {name}" for name in names)
    left_out = ""
    if bands["left_out"]:
        epochs = ", ".join(str(epoch + 1) for epoch in bands["left_out"])
        left_out = f" Epoch {epochs} is left out of the scores: the mean loss jumped there."
    return (
        f'<section><h2>How the samples were learned</h2><figure class="plot"><ul class="legend">{legend}</ul>'
        f"{responsive(bands_plot, bands)}<figcaption>Cross-entropy in nats on a log scale: the line is "
        "the median, the "
        "band or the dotted lines hold the middle 80 %. Where trusted and kept differ, the trusted set is "
        "not like "
        f"the corpus. A wide suspicious band mixes samples learned too early and too late.{left_out} "
        f"Drawn from {drawn} samples.</figcaption></figure></section>"
    )


def _unusable(facts: Facts) -> str:
    problems = [shard for shard in facts["shards"] if shard["problems"]]
    head = "<section><h2>Unusable samples and shard problems</h2>"
    if not facts["unusable"] and not problems:
        none = "None: every sample could be read, and every byte of every shard was accounted for."
        return f'{head}<p class="lead">{none}</p></section>'
    parts = [head]
    if facts["unusable"]:
        body = "".join(
            f'<tr><td><strong>{show(row["sentence"] or row["status"])}</strong><br><span class="mono soft">'
            f'{show(row["status"])}</span></td><td class="num">{row["count"]:,}</td><td class="mono">'
            + "<br>".join(f"{show(example['shard'])} · {show(example['key'])}" for example in row["examples"])
            + "</td></tr>"
            for row in facts["unusable"]
        )
        parts.append(
            '<p class="lead">These could not be judged, so they are in quarantine as well.</p>'
            '<table class="stack-table wrongs"><thead><tr><th>what is wrong</th><th class="num">samples</th>'
            f"<th>first examples</th></tr></thead><tbody>{body}</tbody></table>"
        )
    if problems:
        body = "".join(
            f'<tr><td class="mono">{show(shard["name"])}</td>'
            f"<td>{'<br>'.join(map(show, shard['problems'][:20]))}</td></tr>"
            for shard in problems[:200]
        )
        parts.append(
            '<h3 style="margin-top:1.5rem">Shards with problems</h3><table class="stack-table"><thead><tr>'
            "<th>shard</th>"
            f"<th>problem</th></tr></thead><tbody>{body}</tbody></table>"
        )
    return "".join(parts) + "</section>"


def _limits(facts: Facts) -> str:
    items = "".join(
        f"<div><h3>{show_long(item['title'])}</h3><p>{show_long(item['text'])}</p></div>"
        for item in facts["limits"]
    )
    return f'<section><h2>What this scan cannot tell</h2><div class="limits">{items}</div></section>'


def _details(facts: Facts) -> str:
    training = {
        name: value
        for name, value in facts["training"].items()
        if name not in ("epoch_loss", "accuracy", "kept_epochs")
    }
    blocks = [
        ("Settings and seed", _table(_flat(facts["settings"]))),
        ("Decision", _table(_flat(facts["decision"]))),
        ("Proxy training", _table(_flat(training)) + _epochs(facts["training"])),
        ("Time per stage", _timings(facts["stages"])),
        ("Versions", _table(list(facts["versions"].items()))),
        (f"Shards and digests ({len(facts['shards']):,})", _shards(facts["shards"])),
    ]
    body = "".join(
        f'<details><summary>{title}</summary><div class="scroll">{block}</div></details>'
        for title, block in blocks
        if block
    )
    return f'<section class="more"><h2>How this was made</h2>{body}</section>'


def _flat(value: Facts, prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        rows += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return rows


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return show(value)
    return show(f"{value:.6g}" if isinstance(value, float) else json.dumps(value))


def _table(rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{show(name)}</th><td class="mono">{_value(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table class="stack-table"><tbody>{body}</tbody></table>'


def _epochs(training: Facts) -> str:
    losses, accuracy = training.get("epoch_loss") or [], training.get("accuracy") or []
    if not losses:
        return ""
    kept = training.get("kept_epochs")
    body = "".join(
        f'<tr><td class="num">{e + 1}</td><td class="num">{_value(loss)}</td>'
        f'<td class="num">{_share(accuracy[e]) if e < len(accuracy) else "–"}</td>'
        f"<td>{'' if kept is None or e in kept else 'left out'}</td></tr>"
        for e, loss in enumerate(losses)
    )
    return (
        '<table><thead><tr><th class="num">epoch</th><th class="num">mean loss</th><th '
        'class="num">accuracy</th>'
        f"<th></th></tr></thead><tbody>{body}</tbody></table>"
    )


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else percent(ratio)


def _timings(stages: Facts) -> str:
    seconds = {
        name: float(facts.get("seconds") or 0.0) for name, facts in stages.items() if isinstance(facts, dict)
    }
    total = sum(seconds.values())
    if not seconds:
        return ""
    body = "".join(
        f'<tr><th scope="row">{show(name)}</th><td class="num">{s:,.1f} s</td>'
        f'<td class="num soft">{percent(s / total) if total else "–"}</td></tr>'
        for name, s in [*seconds.items(), ("all stages", total)]
    )
    return f"<table><tbody>{body}</tbody></table>"


def _shards(shards: list[Facts]) -> str:
    if not shards:
        return ""
    body = "".join(_shard_row(shard) for shard in shards[:SHARDS_SHOWN])
    rest = ""
    if len(shards) > SHARDS_SHOWN:
        rest = f"<p>{len(shards) - SHARDS_SHOWN:,} more shards: see report.json.</p>"
    return (
        '<table class="stack-table"><thead><tr><th>shard and SHA-256</th><th class="num">bytes</th>'
        '<th class="num">samples</th><th class="num">kept</th><th class="num">quarantined</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{rest}"
    )


def _shard_row(shard: Facts) -> str:
    kept = f'<br><span class="soft">kept: {show(shard["kept_sha256"])}</span>' if shard["kept_sha256"] else ""
    if shard["empty"]:
        kept = '<br><span class="soft">nothing kept, so no shard was written</span>'
    role = ' <span class="soft">(trusted)</span>' if shard["trusted"] else ""
    numbers = "".join(
        f'<td class="num">{"–" if shard[name] is None else format(int(shard[name]), ",") + unit}</td>'
        for name, unit in (("bytes", ""), ("samples", ""), ("kept", ""), ("quarantined", ""))
    )
    return (
        f'<tr><td class="mono">{show(shard["name"])}{role}<br><span '
        f'class="soft">{show(shard["sha256"] or "no digest")}'
        f"</span>{kept}</td>{numbers}</tr>"
    )
