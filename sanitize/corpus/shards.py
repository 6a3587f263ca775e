"""Walk the headers of a tar and group its members into samples; every byte is accounted for.

Shards come from strangers. The walk never trusts a size, never follows a link and never loses a byte:
what it cannot read becomes an entry of its own. Grouping is webdataset's (`tariterators.py`).
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from sanitize.corpus.sources import Buffer
from sanitize.errors import SanitizeError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Largest PAX or GNU long-name header that is read."""
MAX_EXTENSIONS = 8
"""Most extension headers before one member."""

FILE, ODD, DIRECTORY, GLOBAL = "file", "odd", "directory", "global"
END, CORRUPT, CUT, GARBAGE = "end", "corrupt", "cut", "garbage"

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
PICKLE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
"""What webdataset's autodecoding, torch.load or joblib would unpickle. npy and npz refuse pickles."""
_COMPRESSED = frozenset({"gz", "bz2", "xz", "zst"})
RESERVED_EXTENSIONS = frozenset({"__key__", "__url__", "__local_path__", "__bad__"})
"""Extensions that collide with fields webdataset keeps in a sample."""

_REGULAR = (b"0", b"\0", b"7")
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENSION = (b"x", b"X", b"L", b"K")
_PLAIN = re.compile(rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")
"""Size, mtime, checksum and type of an ordinary file, from byte 124 of its header."""
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_PAX_LENGTH = re.compile(rb"([0-9]{1,8}) ([^=\n]+)=")


class Entry(NamedTuple):
    """A stretch of the tar; the entries of a walk follow each other without gaps."""

    kind: str
    name: str
    start: int
    data: int
    """Where the content begins."""
    size: int
    """Bytes of content."""
    end: int
    """First byte after header, content and padding."""


class Sample(NamedTuple):
    """One row of the index, before its label is read."""

    key: str
    start: int
    end: int
    members: dict[str, Entry]
    """By lower-case extension; empty for what is no sample to webdataset."""
    status: str
    """``ok`` or why it is unusable (codes of `sanitize.corpus.index.STATUS`)."""


class Accounting(NamedTuple):
    """Where the bytes of a tar are; the four sum to its size."""

    bytes_samples: int
    bytes_directories: int
    """Directories and PAX global headers."""
    bytes_end: int
    bytes_unreadable: int
    problems: list[str]


class _CorruptError(Exception):
    def __init__(self, resume: int) -> None:
        self.resume = resume


def walk(buffer: Buffer) -> list[Entry]:
    """Every stretch of a plain tar, in order, covering it without gap or overlap.

    What follows an `END` entry is never seen by tarfile or webdataset, which stop at the first zero block.
    Unreadable bytes are one `CORRUPT` entry up to the next block with a valid header, `GARBAGE` after the
    end; `CUT` is what the file's end cut off.
    """
    entries: list[Entry] = []
    append, match_plain, adler32 = entries.append, _PLAIN.match, zlib.adler32
    known_fields: set[bytes] = set()
    total, position, ended = len(buffer), 0, False
    while position < total:
        header = buffer[position : position + BLOCK]
        plain = match_plain(header, 124)
        # The fast path takes only headers for which tarfile would certainly agree: ASCII, octal, no prefix,
        # other numeric fields already seen in a header that tarfile parsed.
        if (
            plain is not None
            and header.isascii()
            and header[345:346] == b"\0"
            and header[100:124] + header[329:345] in known_fields
            # adler32's low half is 1 + the byte sum modulo 65521, and 512 ASCII bytes sum to less than that
            and adler32(header) & 0xFFFF == int(plain[2], 8) - 255 + sum(header[148:156])
        ):
            size = int(plain[1], 8)
            data = position + BLOCK
            end = data + ((size + 511) & -BLOCK)
            if end <= total:
                name = header[:100].split(b"\0", 1)[0].decode("ascii")
                append(Entry(FILE, name, position, data, size, end))
                position = end
                continue
        if not header.strip(b"\0") and (len(header) == BLOCK or ended):
            end = _zero_run_end(buffer, position)
            append(Entry(END, "", position, position, end - position, end))
            ended, position = True, end
            continue
        try:
            entry = _parse(buffer, position, known_fields)
        except _CorruptError as error:
            end = _next_header(buffer, error.resume) or _unpadded_end(buffer, error.resume)
            entry = Entry(CORRUPT, "", position, position, end - position, end)
        if ended and (entry.kind == CORRUPT or (entry.kind == CUT and not entry.name)):
            entry = entry._replace(kind=GARBAGE)
        append(entry)
        position = entry.end
    return entries


def _parse(buffer: Buffer, start: int, known_fields: set[bytes]) -> Entry:
    """The entry at `start`, with its PAX and GNU extension headers: slow, and tarfile does the parsing."""
    total, at = len(buffer), start
    path: str | None = None
    pax_size: int | None = None
    sparse = False
    for _ in range(MAX_EXTENSIONS + 1):
        header = buffer[at : at + BLOCK]
        if len(header) < BLOCK:
            return Entry(CUT, path or "", start, total, 0, total)
        content = at + BLOCK
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError:
            raise _CorruptError(content) from None
        if info.size < 0:
            raise _CorruptError(content)
        if info.type == b"g" or info.type in _EXTENSION:
            end = content + _padded(info.size)
            if info.size > MAX_EXTENSION_BYTES:
                raise _CorruptError(content)
            if end > total:
                return Entry(CUT, path or "", start, total, 0, total)
            raw = buffer[content : content + info.size]
            if info.type == b"g":
                if at != start or _changes_members(_pax_fields(raw, content)):
                    raise _CorruptError(content)
                return Entry(GLOBAL, "", start, content, info.size, end)
            if info.type == b"L":
                long_name = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                path = long_name if path is None else path  # tarfile lets the first header win
            elif info.type != b"K":
                fields = _pax_fields(raw, content)
                path = fields["path"].rstrip("/") if path is None and "path" in fields else path
                if pax_size is None and "size" in fields:
                    if not re.fullmatch("[0-9]{1,18}", fields["size"]):
                        raise _CorruptError(content)
                    pax_size = int(fields["size"])
                sparse = sparse or any(name.startswith("GNU.sparse.") for name in fields)
            at = end
            continue
        return _member(buffer, start, at, info, path, pax_size, sparse, known_fields)
    raise _CorruptError(at)


def _member(
    buffer: Buffer,
    start: int,
    at: int,
    info: tarfile.TarInfo,
    path: str | None,
    pax_size: int | None,
    sparse: bool,
    known_fields: set[bytes],
) -> Entry:
    total, content = len(buffer), at + BLOCK
    name = info.name if path is None else path
    if info.type == b"5":
        return Entry(DIRECTORY, name.rstrip("/"), start, content, 0, content)
    if info.type in _NO_DATA:
        return Entry(ODD, name, start, content, 0, content)
    if info.type == b"S":
        content = _after_sparse_map(buffer, at)
    kind = FILE if info.type in _REGULAR and not sparse else ODD
    size = info.size if pax_size is None else pax_size
    end = content + _padded(size)
    if end > total:
        if _next_header(buffer, content) is not None:  # the file goes on: the size is the lie
            raise _CorruptError(content)
        return Entry(CUT, name, start, content, max(total - content, 0), total)
    if len(known_fields) < 10_000:
        header = buffer[at : at + BLOCK]
        known_fields.add(header[100:124] + header[329:345])
    return Entry(kind, name, start, content, size, end)


def _after_sparse_map(buffer: Buffer, at: int) -> int:
    """First byte of content of an old GNU sparse member, after its extra map blocks."""
    more = buffer[at + 482]
    at += BLOCK
    while more:
        if at + BLOCK > len(buffer):
            break
        more = buffer[at + 504]
        at += BLOCK
    return at


def _pax_fields(raw: bytes, resume: int) -> dict[str, str]:
    """Records of a PAX header; stricter than tarfile, whose versions disagree about malformed ones."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(raw):
        match = _PAX_LENGTH.match(raw, at)
        end = at + int(match[1]) if match else 0
        if match is None or end <= match.end() or end > len(raw) or raw[end - 1 : end] != b"\n":
            raise _CorruptError(resume)
        value = raw[match.end() : end - 1]
        fields[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return fields


def _changes_members(fields: dict[str, str]) -> bool:
    """Whether a global header would rename or resize every member after it: never done in good faith."""
    return any(name in ("path", "size", "linkpath") or name.startswith("GNU.sparse") for name in fields)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) & -BLOCK


def _zero_run_end(buffer: Buffer, position: int) -> int:
    """First block at or after `position` that is not all zero, or the end."""
    total = len(buffer)
    while position < total:
        chunk = buffer[position : position + (1 << 16)]
        rest = chunk.lstrip(b"\0")
        if rest:
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK
        position += len(chunk)
    return total


def _unpadded_end(buffer: Buffer, floor: int) -> int:
    """End of the file without the zero blocks of an end mark, but at least `floor`."""
    total = len(buffer)
    end = total
    while end > floor:
        chunk = buffer[max(floor, end - (1 << 16)) : end]
        rest = chunk.rstrip(b"\0")
        end -= len(chunk) - len(rest)
        if rest:
            break
    end = max(_padded(end), floor)
    return end if total - end >= BLOCK and total % BLOCK == 0 else total


def _next_header(buffer: Buffer, start: int) -> int | None:
    """The first block from `start` on with the ustar magic and a valid checksum."""
    hit = buffer.find(b"ustar", start + 257)
    while hit >= 0:
        block = hit - 257
        if block % BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(buffer[block : block + BLOCK], "utf-8", "surrogateescape")
            except tarfile.TarError:
                pass
            else:
                return block
        hit = buffer.find(b"ustar", hit + 1)
    return None


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension as webdataset splits them, None where it skips the member."""
    if name.startswith("__") and _META.match(name):
        return None
    match = _KEY.match(name)
    return (match[1], match[2].lower()) if match else None


def is_unsafe(name: str) -> bool:
    """Whether extracting a member of this name could write outside its folder."""
    if not (".." in name or name[:1] in ("/", "\\") or "\0" in name or name[1:2] == ":"):
        return False
    drive = len(name) > 2 and name[1] == ":" and name[0].isalpha() and name[2] in "/\\"
    return drive or name[:1] in ("/", "\\") or "\0" in name or ".." in re.split(r"[/\\]", name)


def is_pickle(extension: str) -> bool:
    """Whether a reader that decodes by extension would unpickle this member."""
    parts = extension.lower().split(".")
    while len(parts) > 1 and parts[-1] in _COMPRESSED:
        parts.pop()
    return parts[-1] in PICKLE_EXTENSIONS


def group(entries: Iterable[Entry]) -> tuple[list[Sample], int]:
    """Samples of a walk, and the bytes of directories and global headers that belong to none.

    Members of one key in a row are a sample. Directories and members that webdataset skips do not end it;
    inside a sample they are part of it. Everything else that is not a directory, a global header or an
    end mark is a row of its own.
    """
    state = _Grouping()
    for entry in entries:
        kind = entry.kind
        if kind in (FILE, ODD):
            split = split_name(entry.name)
            if split is not None:
                state.add(entry, split)
            elif kind == FILE:
                state.skipped.append(entry)
            else:
                state.close()
                state.alone(entry, "not-a-file")
        elif kind in (DIRECTORY, GLOBAL):
            state.skipped.append(entry)
        else:
            state.broken(entry)
    state.close()
    return state.samples, state.loose_bytes


class _Grouping:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.loose_bytes = 0
        self.skipped: list[Entry] = []
        self._keys: set[str] = set()
        self._after_end = False
        self._reset()

    def _reset(self) -> None:
        self._key: str | None = None
        self._members: dict[str, Entry] = {}
        self._faults: set[str] = set()
        self._start = self._end = 0

    def add(self, entry: Entry, split: tuple[str, str]) -> None:
        key, extension = split
        if key != self._key:
            self.close()
            self._key, self._start = key, entry.start
            if key in self._keys:
                self._faults.add("repeated-key")
        elif self.skipped:
            self._absorb()
        if extension in self._members or extension in RESERVED_EXTENSIONS:
            self._faults.add("duplicate-member")
        else:
            self._members[extension] = entry
        self._end = entry.end
        if entry.kind == ODD:
            self._faults.add("not-a-file")
        if is_unsafe(entry.name):
            self._faults.add("unsafe-name")
        if is_pickle(extension):
            self._faults.add("pickle-member")

    def _absorb(self) -> None:
        for entry in self.skipped:
            if entry.kind == GLOBAL:
                self._faults.add("not-a-file")
            if is_unsafe(entry.name):
                self._faults.add("unsafe-name")
            if entry.kind == FILE and is_pickle(entry.name):
                self._faults.add("pickle-member")
        self.skipped = []

    def close(self) -> None:
        if self._key is not None:
            status = self._status()
            self.samples.append(Sample(self._key, self._start, self._end, self._members, status))
            self._keys.add(self._key)
            self._reset()
        if self.skipped:
            waiting, self.skipped = self.skipped, []
            for entry in waiting:
                if entry.kind == FILE:
                    self.alone(entry, "no-image")
                else:
                    self.loose_bytes += entry.end - entry.start

    def alone(self, entry: Entry, status: str) -> None:
        if self._after_end and status not in ("cut", "corrupt-header"):
            status = "after-end"
        elif status == "no-image" and is_unsafe(entry.name):
            status = "unsafe-name"
        elif status == "no-image" and is_pickle(entry.name):
            status = "pickle-member"
        self.samples.append(Sample(entry.name, entry.start, entry.end, {}, status))

    def broken(self, entry: Entry) -> None:
        """An end mark or unreadable bytes: whatever sample was open is over."""
        split = split_name(entry.name) if entry.kind == CUT else None
        if split is not None:
            self.add(entry, split)
            self._members = {name: member for name, member in self._members.items() if member.kind != CUT}
            self._faults.add("cut")
            self.close()
            return
        self.close()
        if entry.kind == END:
            self._after_end = True
        else:
            self.alone(entry, {CUT: "cut", CORRUPT: "corrupt-header", GARBAGE: "after-end"}[entry.kind])

    def _status(self) -> str:
        faults = self._faults
        if self._after_end:
            faults.add("after-end")
        if faults:
            return next(fault for fault in _FAULT_ORDER if fault in faults)
        images = len(IMAGE_EXTENSIONS & self._members.keys())
        return "ok" if images == 1 else "two-images" if images else "no-image"


_FAULT_ORDER = (
    "cut",
    "after-end",
    "unsafe-name",
    "not-a-file",
    "pickle-member",
    "duplicate-member",
    "repeated-key",
)


def account(buffer: Buffer, entries: list[Entry], samples: list[Sample], loose_bytes: int) -> Accounting:
    """Where every byte of the tar is.

    Raises:
        SanitizeError: the parts do not add up to the size: a defect of this program, not of the shard.
    """
    unreadable_starts = {e.start for e in entries if e.kind in (CORRUPT, GARBAGE)}
    unreadable = in_samples = 0
    for sample in samples:
        if sample.status == "cut" or sample.start in unreadable_starts:
            unreadable += sample.end - sample.start
        else:
            in_samples += sample.end - sample.start
    end_bytes = sum(entry.size for entry in entries if entry.kind == END)
    accounted = in_samples + loose_bytes + end_bytes + unreadable
    if accounted != len(buffer):
        raise SanitizeError(
            f"{len(buffer):,} bytes of tar, but {accounted:,} accounted for; please report this shard"
        )
    problems = _problems(buffer, entries)
    return Accounting(in_samples, loose_bytes, end_bytes, unreadable, problems)


def _problems(buffer: Buffer, entries: list[Entry]) -> list[str]:
    problems = []
    sentences = {
        CORRUPT: "unreadable bytes in the shard, which a reader stops at without a word",
        CUT: "the file is cut off inside a member",
        GARBAGE: "bytes after the end mark that are no tar",
    }
    for kind, sentence in sentences.items():
        hits = [entry for entry in entries if entry.kind == kind]
        if hits:
            total = sum(entry.end - entry.start for entry in hits)
            problems.append(f"{sentence} ({total:,} bytes, the first at {hits[0].start:,})")
    first_end = next((number for number, entry in enumerate(entries) if entry.kind == END), None)
    if not len(buffer):
        problems.append("an empty file")
    elif first_end is None:
        problems.append("no end mark: the shard may be cut off")
    elif any(entry.kind in (FILE, ODD) for entry in entries[first_end:]):
        problems.append("members after the end mark, which no reader sees")
    return problems
