"""What a scan cannot promise, in plain words."""

from __future__ import annotations

from typing import Any


def limits(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Title and text of every limit that applies to this run."""
    decision, training = manifest.get("decision") or {}, manifest.get("training") or {}
    trusted = "The trusted set has to be clean and drawn like the corpus: same source, codecs and labelling. "
    found = [
        ("What a small picture hides", _resolution(manifest, training)),
        (_budget_title(decision), _budget(decision)),
        (
            "Everything rests on the trusted set",
            trusted
            + "Poison in it teaches the scan that poison is normal, and a trusted set from elsewhere makes "
            "honest samples look strange.",
        ),
        (
            "Attacks with honest labels are hard",
            "Poison that keeps its true label (clean-label attacks) contradicts nothing the model has "
            "learned. It is found only if its samples share something crisp enough to make a group; expect "
            "to miss more of it than of poison with a wrong label.",
        ),
        (
            "Very small attacks",
            "A few dozen samples in a large corpus do not move any share on this page. That no excess is "
            "visible says little about them.",
        ),
        (
            "An attacker who knows this method",
            "Poison can be made to be learned at the pace of clean data. The scan raises the price of an "
            "attack; it does not make one impossible.",
        ),
        (
            "Suspicious is not guilty",
            "Wrong labels, rare views and near-duplicates are learned unusually too. A flagged sample is a "
            "reason to look, not a proof.",
        ),
    ]
    cap = decision.get("class_cap")
    if cap is not None:
        found.insert(
            3,
            (
                "The cap per class",
                f"At most {100 * cap:g} % of a class is taken out, so that no class disappears. In a class "
                "that is mostly poison, the rest of the poison is therefore kept.",
            ),
        )
    return [{"title": title, "text": text} for title, text in found]


def _resolution(manifest: dict[str, Any], training: dict[str, Any]) -> str:
    side = training.get("resolution")
    looked = f"The proxy saw every picture at {side} × {side} pixels. " if side else ""
    pixels = (manifest.get("stages") or {}).get("pixels") or {}
    original = pixels.get("median_side")
    if side and original and original > side:
        looked = (
            f"The proxy saw every picture at {side} × {side} pixels; half of the originals have a side of "
            f"{original:g} pixels or more. "
        )
    if side and original == side:
        looked = f"The proxy saw the pictures at their own size, {side} × {side} pixels for most. "
    return looked + (
        "A mark finer than that fades or vanishes when a picture is scaled down: a model trained at full "
        "size can learn a trigger that this scan never saw. A higher --resolution sees more and takes longer."
    )


def _budget_title(decision: dict[str, Any]) -> str:
    return "What α promises" if decision.get("alpha") is not None else "What --reject promises"


def _budget(decision: dict[str, Any]) -> str:
    alpha, reject = decision.get("alpha"), decision.get("reject")
    if alpha is not None:
        return (
            f"α = {alpha:g} is a budget: at most {100 * alpha:g} % of the clean samples are given up, in "
            "nine scans of ten, if the trusted samples are as good as drawn at random from the clean corpus. "
            "The fewer they are, the more of the budget is left unspent to be that sure. Harmless groups "
            "that are taken for attacks come on top. It is not a detection rate: it says nothing about how "
            "much of the poison is found."
        )
    amount = f"{100 * reject:g} % of the corpus" if reject is not None else "A fixed share of the corpus"
    return (
        f"{amount} is flagged, whatever is in it: also when nothing is poisoned. The share says nothing "
        "about how much poison there is or how much of it was found."
    )
