"""The sections of the page that show samples: suspected attacks, what else is suspicious, the trusted set."""

from __future__ import annotations

from sanitize.reporting.facts import Facts, is_very_clear
from sanitize.reporting.text import number_of, percent, rounded, show, show_long
from sanitize.reporting.thumbnails import TRUSTED_SHOWN, Group, LabelGroups, Pictures, Sheet, Strip

LABELS_OPEN = 3
CLASSES_SHOWN = 40
CHANCE = 0.05
"""Where a natural group holds so few trusted samples more often than this, they cannot tell."""

_SIGNALS = {
    "pixels": "It shows in the pixels themselves.",
    "patterns": "It shows in the pattern of the image: faintly the same picture in all of them.",
    "frequencies": "It shows in the frequencies of the image: a fine or coarse pattern that the rest lacks.",
    "contrasts": "It shows in the contrast of pixels with their neighbours: edges at the same places.",
    "activations": "It shows in what the first layers of the proxy respond to.",
}


def suspected_attacks(facts: Facts, pictures: Pictures | None, shown: dict[int, Facts]) -> str:
    """One block for every group of groups.json; nothing where there is none."""
    attacks = facts["suspected_attacks"]
    if not attacks:
        return ""
    sheets: list[Sheet | None] = list(pictures.sheets) if pictures else []
    sheets += [None] * (len(attacks) - len(sheets))
    blocks = "".join(
        _attack_block(number, attack, sheet, shown)
        for number, (attack, sheet) in enumerate(zip(attacks, sheets, strict=True), start=1)
    )
    lead = (
        "Samples of one label that share something, the most distinct group first. Compare the two rows of "
        "pictures: what do the members have that the others lack? The difference between the means of the "
        "two brings out a fixed mark or pattern, even a faint one."
    )
    if pictures is None:
        lead = "No pictures: the pixel cache of this run (pixels/) is gone. report.json lists the members."
    return f'<section><h2>Suspected attacks</h2><p class="lead">{lead}</p>{blocks}</section>'


def _attack_block(number: int | None, attack: Facts, sheet: Sheet | None, shown: dict[int, Facts]) -> str:
    """A group in words and pictures; without a number one that trusted samples are in, which is no attack."""
    label, trusted, of_label = show(attack["label"]), attack["trusted"], attack["trusted_of_label"]
    lacking = (
        f"that {trusted or 'none'} of the {number_of(of_label, 'trusted sample')} of this label "
        f"{'has' if trusted < 2 else 'have'} ({attack['trusted_expected']:.1f} would be expected if it were "
        "natural)"
    )
    caution = ""
    if not of_label:
        lacking = "and there is no trusted sample of that label to compare with"
    elif number is not None and attack["trusted_chance"] > CHANCE:
        caution = (
            f" A natural group of its size would hold as few with a chance of "
            f"{percent(attack['trusted_chance'])}: so few trusted samples cannot tell whether it is natural."
        )
    numbered = "" if number is None else f'<span class="soft">{number}</span>'
    clear = "very clearly" if is_very_clear(attack) else "clearly"
    flagged = "All" if attack["flagged"] == attack["samples"] else f"{attack['flagged']:,}"
    figures, strips = _sheet(sheet, label, shown) if sheet else ("", "")
    return (
        f'<div class="label-block"><h3>{numbered} About {rounded(attack["samples"])} '
        f'samples labelled <em>{label}</em> share something {lacking}</h3><div class="attack">'
        f"<p>{_SIGNALS[attack['signal']]} The group stands {clear} apart (separation "
        f"{attack['separation']:.1f}; two populations begin to part at 2). {flagged} of its "
        f"{attack['samples']:,} samples are flagged; it makes up {percent(attack['share_of_label'])} of the "
        f"label.{caution}</p>{figures}</div>{strips}</div>"
    )


def _sheet(sheet: Sheet, label: str, shown: dict[int, Facts]) -> tuple[str, str]:
    figures = "".join(
        f'<figure><img src="{picture}" alt="{caption}, label {label}" width="112" height="112">'
        f"<figcaption>{caption}</figcaption></figure>"
        for picture, caption in (
            (sheet.difference, "mean difference, stretched"),
            (sheet.detail, "its fine detail"),
        )
        if picture
    )
    listed = _sample_table([(str(n), shown[row]) for n, (row, _) in enumerate(sheet.members, start=1)])
    return f'<div class="two">{figures}</div>', (
        f"<h4>The surest members</h4>{_strip(sheet.members, shown)}"
        f"<h4>Others labelled {label}</h4>{_strip(sheet.others, shown)}"
        '<details><summary>Keys, scores and reasons of these members</summary><div class="scroll">'
        f"{listed}</div></details>"
    )


def _strip(strip: Strip, shown: dict[int, Facts], captions: bool = False) -> str:
    items = []
    for n, (row, picture) in enumerate(strip, start=1):
        key = show(shown[row]["key"])
        caption = f"<small>{n} · {_score(shown[row]['anomaly_score'])}</small>" if captions else ""
        items.append(
            f'<li><img src="{picture}" alt="{key}" title="{key}" width="68" height="68">{caption}</li>'
        )
    return f'<ol class="strip">{"".join(items)}</ol>'


def suspicious_samples(facts: Facts, pictures: Pictures | None, shown: dict[int, Facts]) -> str:
    """What is flagged and in no suspected attack, as pictures; everything as a list when they are gone."""
    other = bool(facts["suspected_attacks"]) and pictures is not None
    head = f"<section><h2>{'Other suspicious samples' if other else 'The most suspicious samples'}</h2>"
    if not facts["counts"]["suspicious"]:
        return f'{head}<p class="lead">No sample is suspicious, so there is nothing to show.</p></section>'
    if pictures is None:
        lead = (
            '<p class="lead">No pictures: the pixel cache of this run (pixels/) is gone. The samples are '
            "listed without them; the originals are in quarantine/.</p>"
        )
        rows = [(str(i + 1), row) for i, row in enumerate(facts["top_suspicious"])]
        return f'{head}{lead}<div class="scroll">{_sample_table(rows)}</div>{_reasons(facts)}</section>'
    if not pictures.groups:
        lead = '<p class="lead">None: everything that is flagged belongs to a suspected attack.</p>'
        return f"{head}{lead}{_reasons(facts)}</section>"
    lead = (
        '<p class="lead">Grouped by label, and inside a label by likeness in picture and learning. Look at '
        "the shared detail: it shows what a group has in common beyond kept samples of its label. Chance "
        "leaves it an uneven grey of up to about 5 standard errors; a sharp mark or a regular pattern is "
        "what a planted trigger looks like.</p>"
    )
    blocks = [_label_block(label, shown) for label in pictures.groups]
    page = "".join(blocks[:LABELS_OPEN])
    if len(blocks) > LABELS_OPEN:
        page += (
            f"<details><summary>{number_of(len(blocks) - LABELS_OPEN, 'more label')}</summary>"
            f"{''.join(blocks[LABELS_OPEN:])}</details>"
        )
    return f"{head}{lead}{page}{_reasons(facts)}</section>"


def _label_block(label: LabelGroups, shown: dict[int, Facts]) -> str:
    looked = (
        ""
        if label.looked_at == label.suspicious
        else f" The {label.looked_at:,} highest scores are grouped here."
    )
    groups = "".join(_group_block(i, group, label, shown) for i, group in enumerate(label.groups))
    return (
        f'<div class="label-block"><h3>{show(label.label)}</h3><p class="soft">{label.suspicious:,} of '
        f"{label.usable:,} samples with this label ({percent(label.suspicious / max(label.usable, 1))})."
        f"{looked}</p>{groups}</div>"
    )


def _group_block(i: int, group: Group, label: LabelGroups, shown: dict[int, Facts]) -> str:
    of = f"Group {i + 1} of {len(label.groups)}: " if len(label.groups) > 1 else ""
    name = show(label.label)
    detail, call = "", ""
    if group.detail is not None and group.strength is not None:
        detail = (
            f'<figure><img src="{group.detail}" alt="Shared detail of this group, label {name}" width="112" '
            f'height="112"><figcaption>shared detail: {group.strength:.0f} standard errors</figcaption>'
            "</figure>"
        )
    if group.shares_detail:
        call = (
            '<p class="call">▲ These pictures share a fixed detail that kept samples of this label lack: '
            "a trigger, a watermark, or copies of one picture.</p>"
        )
    listed = _sample_table([(str(n), shown[row]) for n, (row, _) in enumerate(group.shown, start=1)])
    return (
        f'<div class="group"><p><strong>{of}{number_of(len(group.rows), "sample")}</strong> '
        f'<span class="soft">(the first {len(group.shown)} shown, most suspicious first: number · score)'
        f'</span></p>{call}<div class="evidence"><div class="two">'
        f'<figure><img src="{group.mean}" alt="Mean picture of this group, label {name}" width="112" '
        f'height="112"><figcaption>mean of the group</figcaption></figure>{detail}</div>'
        f"{_strip(group.shown, shown, captions=True)}</div>"
        f'<details><summary>Keys, scores and reasons</summary><div class="scroll">{listed}</div></details>'
        "</div>"
    )


def _score(score: float | None) -> str:
    return "–" if score is None or score != score else f"{score:.3f}"


def _sample_table(rows: list[tuple[str, Facts]]) -> str:
    body = "".join(
        f'<tr><td class="num soft">{number}</td><td class="mono">{show(row["key"])}</td>'
        f'<td>{show(row["label"])}</td><td class="mono soft">{show(row["shard"])}</td>'
        f'<td class="num">{_score(row["anomaly_score"])}</td><td>{show(row.get("reason"))}</td></tr>'
        for number, row in rows
    )
    return (
        '<table class="stack-table"><thead><tr><th>#</th><th>key</th><th>label</th><th>shard</th>'
        f'<th class="num">score</th><th>reason</th></tr></thead><tbody>{body}</tbody></table>'
    )


def _reasons(facts: Facts) -> str:
    if not facts["reasons"]:
        return ""
    body = "".join(
        f'<tr><td>{show(row["reason"])}</td><td class="num">{row["count"]:,}</td></tr>'
        for row in facts["reasons"]
    )
    return (
        "<details><summary>The most frequent reasons</summary><table><thead><tr><th>reason</th>"
        f'<th class="num">samples</th></tr></thead><tbody>{body}</tbody></table></details>'
    )


def trusted_set(facts: Facts, pictures: Pictures | None, shown: dict[int, Facts]) -> str:
    """What was checked about the trusted set, its samples that a check picked out, and groups they are in."""
    check = facts["trusted_check"]
    checks = "".join(
        f'<li class="{level}"><b>{mark}</b> {show_long(line["text"])}</li>'
        for level, mark in (("gap", "△"), ("fine", "✓"))
        for line in check["checks"].values()
        if line["level"] == level
    )
    return (
        f'<section><h2>The trusted set</h2><p class="{"note alarm" if check["alarming"] else "lead"}">'
        f'{show_long(check["judgement"])}</p><ul class="checks">{checks}</ul>'
        f"{_suspects(check['suspects'], pictures)}{_shared_groups(facts, pictures, shown)}"
        f"{_per_class(check['checks'].get('shares'))}</section>"
    )


def _shared_groups(facts: Facts, pictures: Pictures | None, shown: dict[int, Facts]) -> str:
    if not facts["shared_groups"] or pictures is None:
        return ""
    return "".join(
        _attack_block(None, group, sheet, shown)
        for group, sheet in zip(facts["shared_groups"], pictures.shared_sheets, strict=False)
    )


def _suspects(suspects: list[Facts], pictures: Pictures | None) -> str:
    if not suspects:
        return ""
    trusted = pictures.trusted if pictures else {}
    body = ""
    for row in suspects[:TRUSTED_SHOWN]:
        picture, why = trusted.get(row["sample_id"]), "<br>".join(map(show, row["reasons"]))
        image = f'<img src="{picture}" alt="{show(row["key"])}" width="48" height="48">' if picture else ""
        body += (
            f'<tr><td class="thumb">{image}</td><td class="num soft">{row["sample_id"]}</td>'
            f'<td class="key mono">{show(row["key"])}<br><span class="soft">{show(row["shard"])}</span></td>'
            f'<td class="label">{show(row["label"])}</td><td>{why}</td></tr>'
        )
    more = len(suspects) - TRUSTED_SHOWN
    rest = f'<p class="soft">{more:,} more: see report.json.</p>' if more > 0 else ""
    return (
        '<h3>Trusted samples to look at</h3><table class="stack-table suspects"><thead><tr><th></th>'
        '<th class="num">sample_id</th><th>key and shard</th><th>label</th><th>why</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{rest}"
    )


def _per_class(shares: Facts | None) -> str:
    if shares is None:
        return ""
    rows = sorted(shares["classes"], key=lambda row: row["trusted"])
    body = "".join(
        f'<tr><td>{show(row["label"])}</td><td class="num">{row["trusted"]:,}</td>'
        f'<td class="num">{percent(row["trusted_share"])}</td>'
        f'<td class="num">{percent(row["corpus_share"])}</td></tr>'
        for row in rows[:CLASSES_SHOWN]
    )
    more = len(rows) - CLASSES_SHOWN
    rest = f'<p class="soft">{number_of(more, "more class")}: see report.json.</p>' if more > 0 else ""
    return (
        "<details><summary>Trusted samples per class, fewest first</summary><table><thead><tr><th>class</th>"
        '<th class="num">trusted samples</th><th class="num">share</th><th class="num">share of the corpus'
        f"</th></tr></thead><tbody>{body}</tbody></table>{rest}</details>"
    )
