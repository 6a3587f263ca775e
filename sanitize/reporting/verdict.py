"""The verdict on the facts of a run: one sentence, what it rests on, and what to do next."""

from __future__ import annotations

import shlex

from sanitize.config import least_alpha
from sanitize.reporting.facts import Facts
from sanitize.reporting.text import listed, number_of, percent, rounded, shorten, visible
from sanitize.rundir import RunDir


def judge(run: RunDir, facts: Facts) -> Facts:
    """The verdict on all other facts: code, sentence, details, labels, next steps."""
    attacked = {attack["label"] for attack in facts["suspected_attacks"]}
    labels = [row["label"] for row in facts["classes"] if row["stands_out"] and row["label"] not in attacked]
    shared = _sharing(facts)
    code, sentence = _sentence(facts, len(labels), len(shared))
    return {
        "code": code,
        "sentence": sentence,
        "details": _details(code, facts["excess"]),
        "labels": labels,
        "shared_detail": shared,
        "next": _next_steps(code, run, facts, bool(labels or shared)),
    }


def _sharing(facts: Facts) -> list[Facts]:
    """Flagged pictures that share a detail, where the method did not look for groups itself.

    Where it did, its groups are the better test, and hard pictures of one label, which resemble each other,
    would only raise a false alarm.
    """
    if facts["stages"].get("scores", {}).get("groups_sought"):
        return []
    return [
        {"label": label["label"], "samples": group["samples"]}
        for label in facts["groups"] or []
        for group in label["groups"]
        if group["shares_detail"]
    ]


def _sentence(facts: Facts, standing_out: int, shared: int) -> tuple[str, str]:
    counts, excess, attacks = facts["counts"], facts["excess"], facts["suspected_attacks"]
    if not counts["usable"]:
        return "unknown", "No sample of this corpus could be used, so nothing was judged."
    if attacks and excess["known"] and excess["high"] >= 0:
        return "groups", _attacks_sentence(attacks)
    on_trusted = facts["trusted_check"]["checks"].get("shared_groups", {}).get("level") == "alarm"
    if on_trusted and not shared and not (excess["known"] and (excess["low"] > 0 or excess["high"] < 0)):
        return "trusted", (
            "Samples stand apart from the rest of their label as in an attack, and trusted samples are among "
            "them: check the trusted set first."
        )
    if not excess["over_threshold"]:
        return "nothing", "Nothing looks suspicious. This does not prove the corpus clean."
    if excess["known"] and excess["low"] > 0:
        return "excess", "More is flagged than clean data explains."
    if shared:
        groups = "One group" if shared == 1 else f"{shared:,} groups"
        return "shared", f"{groups} of flagged pictures share{'s' * (shared == 1)} a mark that looks planted."
    if not excess["known"]:
        return "unknown", (
            f"{counts['suspicious']:,} samples are flagged; how many of them are poison is open, "
            "because this run holds no trusted samples to compare with."
        )
    if excess["high"] < 0:
        return "fewer", "The trusted samples look stranger than the corpus: check the trusted set first."
    if standing_out:
        labels = "one label stands" if standing_out == 1 else f"{standing_out:,} labels stand"
        return "labels", f"Overall, no more is flagged than clean data would explain, but {labels} out."
    return (
        "no-excess",
        "No more is flagged than clean data would explain. This does not prove the corpus clean.",
    )


def _attacks_sentence(attacks: list[Facts]) -> str:
    named = [
        f"{rounded(attack['samples'])} labelled {shorten(visible(attack['label']), 40)}" for attack in attacks
    ]
    groups = f"{len(attacks):,} groups of samples stand apart from the rest of their label"
    if len(attacks) == 1:
        groups = "One group of samples stands apart from the rest of its label"
    return f"{groups}: about {listed(named)}."


def _details(code: str, excess: Facts) -> list[str]:
    details = []
    if code == "groups":
        details.append(
            "The members of such a group share something. Where a label has enough trusted samples, what is "
            "natural in it shows in some of them as well; a planted trigger does not, nor does a watermark "
            "or one picture copied many times. Every block below says how many trusted samples have it, and "
            "how many would if it were natural."
        )
    if excess["known"]:
        details.append(
            f"{percent(excess['corpus_ratio'])} of the usable corpus lies over the threshold, against "
            f"{percent(excess['trusted_ratio'])} of {excess['trusted_scored']:,} trusted samples. "
            "As there are only that many, the true share for clean data may lie anywhere from "
            f"{percent(excess['trusted_low'])} to {percent(excess['trusted_high'])} (95 % interval)."
        )
    if code == "excess" or (code == "groups" and excess["low"] > 0):
        details.append(
            f"That leaves about {excess['samples']:,} samples more than clean data explains "
            f"(between {max(0, excess['samples_low']):,} and {excess['samples_high']:,}). The rest of what "
            "is flagged is the price agreed on in advance: clean samples given up."
        )
    elif code in ("shared", "labels") and excess["known"]:
        details.append(
            "The share alone is no more than clean data could show, but an attack aims at one label and "
            "drowns in the whole. A label can also stand out because it is hard to learn: the pictures below "
            "decide."
        )
    elif code == "no-excess":
        details.append(
            "Most of what is flagged is then the price agreed on in advance. A small attack, or one whose "
            "samples are learned like clean ones, can still be in what was kept."
        )
    return details


def _next_steps(code: str, run: RunDir, facts: Facts, where_known: bool) -> list[Facts]:
    counts, attacks = facts["counts"], facts["suspected_attacks"]
    missed = sum(attack["samples"] - attack["flagged"] for attack in attacks)
    steps = []
    if code == "fewer":
        steps.append(
            "Find out where the trusted samples come from: same source, same cameras and codecs, same "
            "labelling rules? If not, the threshold means nothing; scan again with a better trusted set."
        )
    elif facts["trusted_check"]["alarming"]:
        steps.append("Check the trusted set first, see below: everything on this page is measured by it.")
    if counts["reconciles"] is False:
        steps.append("Do not train yet: the counts of the written shards do not add up (see below).")
    if attacks:
        steps.append("Look at the suspected attacks below: what do the members have that the others lack?")
    to_look_at = code in ("excess", "shared", "labels")
    if to_look_at or (code == "groups" and facts["groups"]) or (code == "trusted" and where_known):
        where = " Start with the labels named above." if where_known else ""
        steps.append(f"Look at the groups of suspicious samples below: do they share a mark?{where}")
    if counts["unusable"]:
        steps.append(f"See why {counts['unusable']:,} samples could not be used; broken input is not clean.")
    texts = [{"text": step} for step in steps]
    train = "rain on the shards in kept/, not on the original ones."
    if missed:
        return [*texts, _decide_larger(run, facts, missed), {"text": f"After that, t{train}"}]
    return [*texts, {"text": f"T{train}"}, _decide_again(run, facts)]


def _decide_larger(run: RunDir, facts: Facts, missed: int) -> Facts:
    """The step for members that were kept: a larger class cap or budget, whichever spared them."""
    decision = facts["decision"]
    capped = sum(attack["spared_by_cap"] for attack in facts["suspected_attacks"])
    option = "reject" if decision.get("reject") is not None else "alpha"
    budget, cap = decision.get(option) or 0.1, decision.get("class_cap")
    spared_by = []
    if capped and cap is not None:
        cap = min(2 * cap, 1)
        spared_by.append("the cap per class")
    if missed > capped:
        budget = min(2 * budget, (1 + budget) / 2)
        spared_by.append(f"the budget (--{option})")
    return {
        "text": f"{number_of(missed, 'member')} of the suspected attacks stayed in kept/: "
        f"{listed(spared_by)} spared {'it' if missed == 1 else 'them'}. Decide again with a larger one. It "
        "trains nothing and writes the shards anew; everything taken out is in quarantine/, byte for byte.",
        "command": f"{_filter(run, decision)} --{option} {budget:g} {_cap_option(cap)}",
    }


def _decide_again(run: RunDir, facts: Facts) -> Facts:
    decision = facts["decision"]
    option = "reject" if decision.get("reject") is not None else "alpha"
    budget = max((decision.get(option) or 0.1) / 2, 0.01)
    if option == "alpha":
        budget = max(budget, least_alpha(facts["counts"]["trusted"]))
    command = f"{_filter(run, decision)} --{option} {budget:g}"
    if decision.get("class_cap") != _scanned(run).get("class_cap"):
        command += f" {_cap_option(decision.get('class_cap'))}"
    return {
        "text": "Too much or too little taken out? Decide again: it trains nothing and writes the shards "
        "anew. Everything taken out is in quarantine/, byte for byte.",
        "command": command,
    }


def _cap_option(cap: float | None) -> str:
    return "--no-class-cap" if cap is None else f"--class-cap {cap:g}"


def _filter(run: RunDir, decision: Facts) -> str:
    """The command for another decision by the same method, which goes without saying if it is the scan's."""
    command = f"sanitize filter {shlex.quote(str(run.path))}"
    method = decision.get("method")
    if method not in (None, _scanned(run).get("method")):
        command += f" --method {method}"
    if any(str(shard.get("url")).startswith("pipe:") for shard in run.manifest.get("shards") or []):
        command += " --allow-pipe"
    return command


def _scanned(run: RunDir) -> Facts:
    """The decision that the scan was told to make."""
    found: Facts = (run.manifest.get("config") or {}).get("decision") or {}
    return found
