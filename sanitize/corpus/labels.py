"""Label text of a sample, and class numbers for label texts."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping

MAX_LABEL_CHARACTERS = 200
MAX_MEMBER_BYTES = 1 << 20
"""A label member larger than this is not read."""
_NUMBER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_FORBIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories that break a line or a terminal."""


class BadLabelError(ValueError):
    """A label that is there but cannot be used."""


def label_extension(spec: str) -> str:
    """The member extension that `spec` reads: ``cls``, ``txt`` or ``json``."""
    return spec.split(":", 1)[0]


def read_label(spec: str, members: Mapping[str, bytes]) -> str | None:
    """The label text of one sample.

    Args:
        spec: ``cls``, ``txt`` or ``json:path.to.field`` (dots descend, whole numbers index lists).
        members: bytes by lower-case extension.

    Returns:
        One line of 1 to 200 characters; whole numbers in their plain form ("07" is "7"); None when the
        member or the field is missing.

    Raises:
        BadLabelError: not UTF-8, not one line, empty, too long, control characters, or no scalar.
    """
    data = members.get(label_extension(spec))
    if data is None:
        return None
    if len(data) > MAX_MEMBER_BYTES:
        raise BadLabelError(f"label member of {len(data):,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadLabelError("not valid UTF-8") from None
    if spec.startswith("json:"):
        found = _json_field(text, spec.removeprefix("json:"))
        return None if found is None else _clean(found)
    return _clean(text)


def _json_field(text: str, path: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadLabelError("not valid JSON") from None
    for step in path.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isascii() and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadLabelError("neither text nor a number")
    if isinstance(value, float):
        if not value.is_integer():
            raise BadLabelError("a number with a fraction names no class")
        value = int(value)
    try:
        return str(value)
    except ValueError:
        raise BadLabelError("a number of thousands of digits") from None


def _clean(text: str) -> str:
    text = text.strip()
    if not 1 <= len(text) <= MAX_LABEL_CHARACTERS:
        raise BadLabelError("empty" if not text else f"{len(text)} characters")
    if not (text.isascii() and text.isprintable()) and any(
        unicodedata.category(character) in _FORBIDDEN for character in text
    ):
        raise BadLabelError("more than one line, or control characters")
    return str(int(text)) if _NUMBER.fullmatch(text) else text


def class_names(labels: Iterable[str]) -> list[str]:
    """Distinct label texts in class order: whole numbers by value, then the others by code point."""
    distinct = set(labels)
    numbers = sorted((label for label in distinct if _NUMBER.fullmatch(label)), key=int)
    return numbers + sorted(distinct.difference(numbers))
