import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.corpus.labels import BadLabelError, class_names, read_label


@pytest.mark.parametrize(
    ("spec", "data", "expected"),
    [
        ("cls", b"7", "7"),
        ("cls", b" 07\n", "7"),
        ("cls", b"\xef\xbb\xbf7\r\n", "7"),
        ("json:label", b'\xef\xbb\xbf{"label": "dog"}', "dog"),
        ("cls", b"-3", "-3"),
        ("cls", b"tabby cat", "tabby cat"),
        ("txt", "größe\r\n".encode(), "größe"),
        ("json:label", b'{"label": "dog"}', "dog"),
        ("json:a.b.1", b'{"a": {"b": [3, 4]}}', "4"),
        ("json:label", b'{"label": 5.0}', "5"),
        ("json:label", b'{"label": "007"}', "7"),
        ("json:label", b'{"other": 1}', None),
        ("json:label", b'{"label": null}', None),
        ("json:a.9", b'{"a": [1]}', None),
        ("json:a.b", b'{"a": 1}', None),
    ],
)
def test_reads_label(spec: str, data: bytes, expected: str | None) -> None:
    assert read_label(spec, {spec.split(":")[0]: data}) == expected


def test_missing_member_is_none() -> None:
    assert read_label("cls", {"txt": b"1"}) is None


@pytest.mark.parametrize(
    ("spec", "data"),
    [
        ("cls", b""),
        ("cls", b" \n"),
        ("cls", b"\xff\xfe"),
        ("cls", b"two\nlines"),
        ("cls", b"\x1b[31mred"),
        ("cls", "a\u2028b".encode()),
        ("cls", b"x" * 201),
        ("cls", b"1" * (1 << 21)),
        ("json:label", b"{"),
        ("json:label", b"[" * 100_000),
        ("json:label", b'{"label": true}'),
        ("json:label", b'{"label": [1]}'),
        ("json:label", b'{"label": 0.5}'),
        ("json:label", b'{"label": NaN}'),
        ("json:label", b'{"label": 1e400}'),
        ("json:label", b'{"label": ' + b"9" * 5000 + b"}"),
        ("json:label", b'{"label": "\\ud800"}'),
    ],
)
def test_refuses_label(spec: str, data: bytes) -> None:
    with pytest.raises(BadLabelError):
        read_label(spec, {spec.split(":")[0]: data})


@given(st.binary(max_size=300))
def test_any_bytes_are_one_clean_line_or_refused(data: bytes) -> None:
    try:
        label = read_label("cls", {"cls": data})
    except BadLabelError:
        return
    assert label is not None
    assert 1 <= len(label) <= 200
    assert label == label.strip()
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in label)
    assert read_label("cls", {"cls": label.encode()}) == label


@given(st.text(max_size=50))
def test_json_and_text_agree(text: str) -> None:
    def outcome(spec: str, data: bytes) -> str | None:
        try:
            return read_label(spec, {spec.split(":")[0]: data})
        except BadLabelError:
            return "refused"

    if text.encode("utf-8", "replace").decode() == text:
        assert outcome("txt", text.encode()) == outcome("json:x.y", json.dumps({"x": {"y": text}}).encode())


def test_class_order_is_numbers_by_value_then_text() -> None:
    assert class_names(["b", "10", "9", "a", "-1", "9"]) == ["-1", "9", "10", "a", "b"]
