"""State dicts in files: read without running anything that is in them, written back as they were.

A checkpoint is hostile input. Tensors come from `.safetensors`, or from `torch.load(weights_only=True)`;
whatever would need more unpickling than that is refused, with the names of what it asked for.
"""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from sanitize.checkpoints.pickles import UNREADABLE, foreign_globals
from sanitize.errors import InputError, SanitizeError, UsageError
from sanitize.rundir import disk_errors, write_atomic

TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
ENDINGS = (".safetensors", *TORCH_ENDINGS)
NAMED = 5
"""Most tensors or globals that a message names before it counts."""
LONGEST = 200
"""Characters of a global's name; nobody's own is longer."""

_EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
_WRAPPERS = (
    *_EMA,
    *(
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "net",
        "network",
        "params",
        "weights",
        "module",
    ),
)
"""Keys that weights lie under in training checkpoints, the averaged ones first, as timm takes them."""
_DEPTH = 3
"""Dictionaries in dictionaries that are looked through."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.")
_COUNTERS = ("n_averaged",)
"""What torch.optim.swa_utils.AveragedModel adds beside the names it prefixes."""
_QUANTISED = re.compile(
    r"_packed_params|\.(SCB|qweight|qzeros|absmax|quant_map)$|\.quant_state|\.(weight_scale|scb)$"
)


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A file with weights, and all that writing it back takes."""

    path: Path
    format: str
    """``safetensors``, ``torch`` (a zip) or ``torch-legacy`` (before PyTorch 1.6)."""
    tensors: dict[str, torch.Tensor]
    """Names, dtypes and order of the file; finite, dense, at least one."""
    content: Any = None
    """All of a torch file: training state around the weights is kept."""
    where: tuple[str, ...] = ()
    """Keys that lead from `content` to the weights."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read(path: Path) -> StateFile:
    """Read the weights of a file; nothing in it is run.

    Args:
        path: `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin` as torch.save writes them: a state dict, or
            one in a training checkpoint (`state_dict`, `model`, averaged weights and the like).

    Raises:
        InputError: it needs unpickling, or is TorchScript, quantised, sparse, cut, not finite, or no weights.
    """
    _check_name(path)
    if path.suffix.lower() == ".safetensors":
        file = StateFile(path=path, format="safetensors", tensors=_read_safetensors(path))
    else:
        file = _read_torch(path)
    if not file.tensors:
        raise InputError(f"{path}: the state dict is empty; save it after training, not before")
    for name, tensor in file.tensors.items():
        _check_dense(path, name, tensor)
    _check_finite(path, file.tensors)
    return file


def _check_name(path: Path) -> None:
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give the file with the weights, or a folder that "
            "transformers or open_clip saved"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path} is no checkpoint: its name must end in one of {', '.join(ENDINGS)}")
    with disk_errors(path), open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise InputError(f"{path} is empty; it was not downloaded or not written to its end")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in _safetensors_header(path)}
    except (SafetensorError, *UNREADABLE) as error:
        raise InputError(f"{path} is no whole safetensors file ({_short(error)}); fetch it again") from error


def _safetensors_header(path: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of every tensor, in the order of the header, of a file that safetensors opens."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_torch(path: Path) -> StateFile:
    zipped = _check_container(path)
    asked = foreign_globals(path, zipped)
    if any(len(name) > LONGEST for name in asked):  # torch's own message about it would take hours to make
        raise _refusal(path, asked, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise _refusal(path, asked, error) from error
    where = _find(path, content)
    state = content
    for key in where:
        state = state[key]
    return StateFile(
        path=path,
        format="torch" if zipped else "torch-legacy",
        tensors={name: value for name, value in state.items() if isinstance(value, torch.Tensor)},
        content=content,
        where=where,
    )


def _check_container(path: Path) -> bool:
    """Whether a torch file is a zip; refuses what is no state dict by its looks."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        raise InputError(f"{path} looks like safetensors; name it {path.stem}.safetensors")
    if not start.startswith(b"PK"):
        if start[:1] == b"\x80":
            return False
        raise InputError(f"{path} is no checkpoint: it is neither a zip nor a pickle that torch.save wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
    except UNREADABLE as error:
        raise InputError(f"{path} is cut or damaged ({_short(error)}); fetch it again") from error
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise InputError(
            f"{path} is a TorchScript program, which brings its own code; save the weights of the original "
            "network instead: torch.save(network.state_dict(), 'weights.pt')"
        )
    if not any(name.endswith("/data.pkl") for name in members):
        raise InputError(
            f"{path} is a zip, but not one that torch.save wrote (no data.pkl); save the weights with "
            "torch.save(network.state_dict(), 'weights.pt')"
        )
    if packed:
        raise InputError(
            f"{path}: {packed[0]} in it is compressed, as torch.save never writes it, and may unpack to any "
            "size; save the weights again: torch.save(network.state_dict(), 'weights.pt')"
        )
    return True


def _refusal(path: Path, asked: list[str], error: Exception | None) -> InputError:
    if error and not asked:
        return InputError(
            f"{path} cannot be read ({_short(error)}); it may be cut or damaged: fetch it again"
        )
    named = first_of([name[:LONGEST] for name in asked])
    return InputError(
        f"{path} needs unpickling, which can run any code, and is not opened. It asks for: "
        f"{named}. Ask its author for a .safetensors file; or, on a machine that you can throw away, "
        "load it with torch.load(weights_only=False) and save the tensors alone: "
        "torch.save(network.state_dict(), 'weights.pt')"
    )


def _find(path: Path, content: Any) -> tuple[str, ...]:
    """Keys that lead to the weights in what a torch file holds."""
    for where in _descend(content, _WRAPPERS):
        return where
    others = [where for where in _descend(content, None) if where]
    if len(others) == 1:
        return others[0]
    if others:
        raise InputError(
            f"{path} holds several sets of weights ({', '.join('.'.join(w) for w in others[:NAMED])}); save "
            "the one that is meant: torch.save(checkpoint[name], 'weights.pt')"
        )
    if isinstance(content, Mapping) and any("_packed_params" in str(key) for key in content):
        raise _quantised(path, next(str(key) for key in content if "_packed_params" in str(key)))
    other = _first_other(content)
    if other is not None:
        raise InputError(
            f"{path} holds tensors and, among them, {other[:LONGEST]}; save the weights alone: "
            "torch.save(network.state_dict(), 'weights.pt')"
        )
    if isinstance(content, Mapping) and not any(len(v) for v in content.values() if isinstance(v, Mapping)):
        raise InputError(f"{path}: the state dict is empty, or holds no tensors; save it after training")
    raise InputError(
        f"{path} holds a {type(content).__name__} and no state dict; save one: "
        "torch.save(network.state_dict(), 'weights.pt')"
    )


def _descend(
    value: Any, keys: tuple[str, ...] | None, depth: int = 0, barren: set[tuple[int, int]] | None = None
) -> Iterator[tuple[str, ...]]:
    """Where state dicts are; under these keys alone, or under any key that is a text.

    What was found barren at some depth is not walked again: a dictionary may hold itself, many times over.
    """
    barren = set() if barren is None else barren
    if not isinstance(value, Mapping) or (id(value), depth) in barren:
        return
    if _is_state(value):
        yield ()
        return
    found = False
    if depth < _DEPTH:
        for key in keys or [key for key in value if isinstance(key, str)]:
            for inner in _descend(value.get(key), keys, depth + 1, barren):
                found = True
                yield (key, *inner)
    if not found:
        barren.add((id(value), depth))


def _is_state(value: Mapping[Any, Any]) -> bool:
    """Whether it maps names to tensors, and to modules' extra state at most."""
    return any(isinstance(entry, torch.Tensor) for entry in value.values()) and all(
        isinstance(key, str) and (isinstance(entry, torch.Tensor) or key.endswith("_extra_state"))
        for key, entry in value.items()
    )


def _first_other(content: Any) -> str | None:
    """What keeps a dictionary with tensors from being a state dict, in words."""
    if not isinstance(content, Mapping) or not any(isinstance(v, torch.Tensor) for v in content.values()):
        return None
    return next(
        f"{key!r}, of type {type(value).__name__}"
        if isinstance(key, str)
        else f"a name that is no text, {key!r}"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    )


def _check_dense(path: Path, name: str, tensor: torch.Tensor) -> None:
    integer = not (tensor.is_floating_point() or tensor.is_complex())
    if (
        tensor.is_quantized
        or _QUANTISED.search(name)
        or (tensor.is_floating_point() and tensor.dtype.itemsize < 2)
        or (integer and tensor.dtype.itemsize == 1 and name.endswith("weight"))
    ):
        raise _quantised(path, name)
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_complex() or tensor.device.type != "cpu":
        raise InputError(f"{path}: {name} is no plain tensor of numbers ({tensor.dtype}, {tensor.device})")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise InputError(f"{path}: {name} is a sparse or nested tensor; save it with .to_dense()")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: {name} claims {tensor.numel():,} values and stores fewer; save a .clone()")


def _quantised(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} is quantised ({name}), and cannot be tuned; give the float checkpoint that it was made from"
    )


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if bad:
        raise InputError(
            f"{path}: NaN or infinite weights in {first_of(bad)}; the training diverged or the file is "
            "damaged: take an earlier checkpoint"
        )


def first_of(names: Sequence[str]) -> str:
    """The first of many names in words, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def prefixes(names: Mapping[str, Any]) -> list[str]:
    """Prefixes that wrappers (DDP, torch.compile, Lightning) put before most names: "" first, then nested.

    Most, because a Lightning module has weights beside its network's, such as those of a loss.
    """
    found = [""]
    while True:
        inside = [name.removeprefix(found[-1]) for name in names if name.startswith(found[-1])]
        more = next((p for p in _PREFIXES if 2 * sum(n.startswith(p) for n in inside) > len(inside)), None)
        if more is None:
            return found
        found.append(found[-1] + more)


def outside(names: Mapping[str, Any], prefix: str) -> list[str]:
    """Names that do not begin with a prefix; the counter of averaged weights is left out of account."""
    return [name for name in names if not name.startswith(prefix) and name not in _COUNTERS]


def stripped(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and not (prefix and name in _COUNTERS)
    }


def write(file: StateFile, values: Mapping[str, torch.Tensor], path: Path, prefix: str) -> list[Path]:
    """Write a file like the one that was read, with other values, and the bare weights as safetensors.

    A tensor that is as it was keeps its very bits, whatever its dtype; the others are cast to their own.
    Other sets of the same weights in the file (averaged and last ones) get the new values too, if any value
    is new: what was repaired must not lie beside what was not. Each file appears whole or not at all.

    Args:
        values: by the file's names; names that are not in it stay as they were.
        path: with an ending of the format that was read.
        prefix: what is left out of the names in the safetensors file.

    Returns:
        What was written: `path`, and for a torch format the safetensors file beside it.

    Raises:
        UsageError: an ending of another format, or the file that was read itself.
        SanitizeError: a value that the dtype cannot hold.
    """
    bare = path.with_suffix(".safetensors")
    check_output(file, path)
    tensors = {name: _cast(name, old, values.get(name)) for name, old in file.tensors.items()}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.format == "safetensors":
            write_atomic(path, _patched_safetensors(file.path, tensors))
            return [path]
        write_atomic(path, _torch_bytes(file, tensors, prefix))
        own = {name: value.detach().clone().contiguous() for name, value in stripped(tensors, prefix).items()}
        write_atomic(bare, safetensors_bytes(own, metadata={"format": "pt"}))
    return [path, bare]


def check_output(file: StateFile, path: Path) -> None:
    """Refuse a path that `write` could not write to, or would harm the original by.

    Raises:
        UsageError: an ending of another format, or the file that was read itself.
    """
    wanted = (".safetensors",) if file.format == "safetensors" else TORCH_ENDINGS
    if path.suffix.lower() not in wanted:
        raise UsageError(
            f"--out {path}: {file.path.name} is written back in its own format; end the name in "
            f"{' or '.join(wanted)}"
            + ("" if file.format == "safetensors" else " (a .safetensors file is written beside it)")
        )
    for output in (path, path.with_suffix(".safetensors")):
        if output.exists() and output.samefile(file.path):
            raise UsageError(f"--out {path} would replace the checkpoint itself; give another name")


def _cast(name: str, old: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
    """The new values in the old tensor's dtype and memory layout; the old tensor where nothing changed."""
    if new is None:
        return old
    new = new.detach().to("cpu")
    if torch.equal(new, old.detach().to(new.dtype)):
        return old
    cast = torch.empty_like(old, memory_format=torch.preserve_format, requires_grad=False).copy_(new)
    if cast.is_floating_point() and not bool(cast.isfinite().all()):
        raise SanitizeError(f"{name}: a repaired weight is too large for {old.dtype}; nothing was written")
    return nn.Parameter(cast, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else cast


def _patched_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The file's bytes, with the header as it is and other values."""
    content = bytearray(path.read_bytes())
    for name, (start, end) in _safetensors_header(path).items():
        content[start:end] = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return bytes(content)


def _torch_bytes(file: StateFile, tensors: Mapping[str, torch.Tensor], prefix: str) -> bytes:
    content = _with_state(file.content, file.where, tensors)
    if any(tensors[name] is not old for name, old in file.tensors.items()):
        for where, renamed in _copies(file, prefix):
            content = _with_state(
                content, where, {theirs: tensors[ours].clone() for theirs, ours in renamed.items()}
            )
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=file.format == "torch")
    return stream.getvalue()


def _with_state(value: Any, where: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A copy of nested dictionaries in which one state dict has other tensors; the order stays."""
    copied = copy.copy(value)
    if hasattr(value, "_metadata"):  # versions of the modules, which load_state_dict looks at
        copied._metadata = value._metadata
    if where:
        copied[where[0]] = _with_state(value[where[0]], where[1:], tensors)
    else:
        copied.update({name: tensor for name, tensor in tensors.items() if name in value})
    return copied


def _copies(file: StateFile, prefix: str) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Other sets of the network's weights in a file: where they are, and our name for each of theirs.

    Args:
        prefix: of the network's names in the file.
    """
    ours = stripped(dict(zip(file.tensors, file.tensors, strict=True)), prefix)
    for where in _descend(file.content, None):
        if where == file.where:
            continue
        state = file.content
        for key in where:
            state = state[key]
        state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for own_prefix in prefixes(state):
            theirs = stripped(dict(zip(state, state, strict=True)), own_prefix)
            if theirs.keys() == ours.keys() and all(
                state[theirs[name]].shape == file.tensors[ours[name]].shape for name in ours
            ):
                yield where, {theirs[name]: ours[name] for name in ours}
                break


def copies(file: StateFile, prefix: str) -> list[str]:
    """Where other sets of the weights whose names begin with `prefix` are in the file, as dotted keys."""
    return [".".join(where) for where, _ in _copies(file, prefix)] if file.content is not None else []


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
