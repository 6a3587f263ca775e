"""Weights in files: every wrapping comes back bit for bit, and nothing hostile or damaged is opened."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sanitize.checkpoints import files
from sanitize.errors import InputError, SanitizeError, UsageError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def prefixed(prefix: str, state: Any) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def averaged(state: Any) -> dict[str, torch.Tensor]:
    """As torch.optim.swa_utils.AveragedModel saves it."""
    return {"n_averaged": torch.tensor(3), **prefixed("module.", {k: v + 1 for k, v in state.items()})}


STATE = network().state_dict()
WRAPPINGS: dict[str, Any] = {
    "bare": STATE,
    "state_dict": {"epoch": 3, "state_dict": STATE, "best": 0.5},
    "model": {"model": dict(STATE), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": [0.1]}},
    "model_state_dict": {"model_state_dict": STATE},
    "net": {"net": prefixed("module.", STATE), "acc": 90.1},
    "ema": {"model": STATE, "model_ema": averaged(STATE)},
    "lightning": {
        "pytorch-lightning_version": "2.0",
        "state_dict": prefixed("model._orig_mod.", STATE),
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1},
    },
    "lightning net": {"state_dict": prefixed("net.", STATE)},
    "nested": {"checkpoint": {"weights_of_step_7": prefixed("_orig_mod.module.", STATE)}},
    "half": OrderedDict((k, v.half() if v.is_floating_point() else v) for k, v in STATE.items()),
    "bfloat16": OrderedDict((k, v.bfloat16() if v.is_floating_point() else v) for k, v in STATE.items()),
    "double": OrderedDict((k, v.double() / 3 if v.is_floating_point() else v) for k, v in STATE.items()),
    "parameters": OrderedDict(network().named_parameters()),
    "channels_last": OrderedDict(
        (k, v.to(memory_format=torch.channels_last) if v.ndim == 4 else v) for k, v in STATE.items()
    ),
    "tied": OrderedDict(a=STATE["3.weight"], b=STATE["3.weight"], part=STATE["3.weight"][0]),
}


def same(one: Any, other: Any) -> bool:
    """Whether nested content is alike in order, types, dtypes and bits."""
    if isinstance(one, torch.Tensor):
        return (
            type(one) is type(other)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.stride() == other.stride()
            and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def as_float32(file: files.StateFile) -> dict[str, torch.Tensor]:
    """What a network that holds the weights would hand back unchanged."""
    return {
        name: value.detach().float().clone() if value.is_floating_point() else value.clone()
        for name, value in file.tensors.items()
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_an_unchanged_torch_file_comes_back_bit_for_bit(tmp_path: Path, name: str, legacy: bool) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out" / "fixed.pt"
    torch.save(WRAPPINGS[name], path, _use_new_zipfile_serialization=not legacy)
    original = path.read_bytes()
    file = files.read(path)
    prefix = files.prefixes(file.tensors)[-1]

    written = files.write(file, as_float32(file), out, prefix)

    assert path.read_bytes() == original
    assert written == [out, out.with_suffix(".safetensors")]
    assert zipfile.is_zipfile(out) is not legacy
    assert same(torch.load(path, weights_only=True), torch.load(out, weights_only=True))
    bare = load_file(written[1])
    inner = files.stripped(file.tensors, prefix)
    assert bare.keys() == inner.keys()
    assert all(same(bare[k], v.detach().contiguous()) for k, v in inner.items() if type(v) is torch.Tensor)


def test_safetensors_come_back_byte_for_byte(tmp_path: Path) -> None:
    """Order, metadata and padding are the file's own, even where the library would write others."""
    tensors = {
        "z": torch.rand(3),
        "a": torch.rand(2, 2).half(),
        "count": torch.tensor(7),
        "b": torch.rand(0, 2),
    }
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"author": "somebody"}}
    data = b""
    for name, value in tensors.items():
        raw = value.numpy().tobytes()
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header, indent=2).encode()
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)

    file = files.read(path)
    assert list(file.tensors) == list(tensors)
    assert files.write(file, as_float32(file), out, "") == [out]
    assert out.read_bytes() == path.read_bytes()

    files.write(file, {"a": torch.full((2, 2), 0.5)}, out, "")
    changed = load_file(out)
    assert torch.equal(changed["a"], torch.full((2, 2), 0.5).half())
    assert all(torch.equal(changed[name], tensors[name]) for name in ("z", "count", "b"))


def test_new_values_get_the_dtype_of_the_file(tmp_path: Path) -> None:
    path, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(WRAPPINGS["half"], path)
    file = files.read(path)
    files.write(file, {"3.weight": torch.full((2, 4), 1.5)}, out, "")
    found = torch.load(out, weights_only=True)
    assert torch.equal(found.pop("3.weight"), torch.full((2, 4), 1.5).half())
    assert all(torch.equal(value, WRAPPINGS["half"][name]) for name, value in found.items())


def test_a_copy_is_replaced_whole_and_another_network_is_not(tmp_path: Path) -> None:
    """Most names begin with "backbone.", but the head is the network's too."""
    mine = {"backbone.a": torch.zeros(2), "backbone.b": torch.zeros(2), "fc": torch.zeros(2)}
    other = {"backbone.a": torch.ones(2), "backbone.b": torch.ones(2), "head": torch.ones(2)}
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"state_dict": mine, "last": dict(mine), "pretrained": other}, path)
    file = files.read(path)
    assert files.copies(file, "") == ["last"]
    new = {name: value + 5 for name, value in mine.items()}
    files.write(file, new, out, "")
    found = torch.load(out, weights_only=True)
    for name, value in new.items():
        assert torch.equal(found["state_dict"][name], value)
        assert torch.equal(found["last"][name], value)
    assert all(torch.equal(found["pretrained"][name], value) for name, value in other.items())


def test_both_sets_of_weights_are_replaced(tmp_path: Path) -> None:
    """Nobody may take the unrepaired weights from a repaired file; the averaged ones are worked on."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(WRAPPINGS["ema"], path)
    file = files.read(path)
    assert file.where == ("model_ema",)
    assert files.copies(file, files.prefixes(file.tensors)[-1]) == ["model"]
    new = torch.full((2, 4), 9.0)
    files.write(file, {"module.3.weight": new}, out, "module.")
    found = torch.load(out, weights_only=True)
    assert torch.equal(found["model_ema"]["module.3.weight"], new)
    assert torch.equal(found["model"]["3.weight"], new)
    assert torch.equal(found["model"]["0.weight"], STATE["0.weight"] + 1)
    assert found["model_ema"]["n_averaged"] == 3


def test_the_checkpoint_itself_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save(STATE, path)
    save_file(dict(STATE), tmp_path / "other.safetensors")
    (tmp_path / "link.pt").symlink_to(path)
    file = files.read(path)
    with pytest.raises(UsageError, match="would replace the checkpoint itself"):
        files.write(file, {}, path, "")
    with pytest.raises(UsageError, match="would replace"):
        files.write(file, {}, tmp_path / "link.pt", "")
    with pytest.raises(UsageError, match=r"end the name in \.pt or .* beside it"):
        files.write(file, {}, tmp_path / "out.safetensors", "")
    with pytest.raises(UsageError, match=r"end the name in \.safetensors"):
        files.write(files.read(tmp_path / "other.safetensors"), {}, tmp_path / "out.pt", "")
    beside = files.StateFile(path=tmp_path / "other.safetensors", format="torch", tensors={})
    with pytest.raises(UsageError, match="would replace"):  # by the safetensors file beside it
        files.write(beside, {}, tmp_path / "other.pt", "")


def test_a_value_that_half_precision_cannot_hold_is_an_error(tmp_path: Path) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(WRAPPINGS["half"], path)
    with pytest.raises(SanitizeError, match=r"3\.weight: a repaired weight is too large for torch.float16"):
        files.write(files.read(path), {"3.weight": torch.full((2, 4), 1e6)}, out, "")
    assert not out.exists()


class Runs:
    """A pickle of it runs a command on being opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, legacy: bool, protocol: int) -> None:
    path, proof = tmp_path / "in.pt", tmp_path / "ran"
    torch.save(
        {"state_dict": STATE, "args": Runs(proof)},
        path,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    with pytest.raises(InputError, match=r"needs unpickling.* asks for: posix\.system\. Ask .*safetensors"):
        files.read(path)
    assert not proof.exists()


def test_a_pickled_network_is_refused_with_its_classes(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "in.pt")
    with pytest.raises(
        InputError, match=r"asks for: torch\.nn\.modules\.container\.Sequential, .* and \d more"
    ):
        files.read(tmp_path / "in.pt")


def test_a_pickle_that_is_no_checkpoint_is_named_too(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (tmp_path / "in.bin").write_bytes(pickle.dumps(Runs(proof)))
    with pytest.raises(InputError, match=r"posix\.system"):
        files.read(tmp_path / "in.bin")
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_global_with_an_endless_name_is_refused_at_once(tmp_path: Path, zipped: bool) -> None:
    """PyTorch searches its own message about it in quadratic time."""
    content = b"\x80\x02c" + b"a" * 300_000 + b"\nx\n)R."
    path = tmp_path / "in.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("in/data.pkl", content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="needs unpickling") as caught:
        files.read(path)
    assert len(str(caught.value)) < 1000


def refused(tmp_path: Path, content: Any, match: str, name: str = "in.pt") -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=match) as caught:
        files.read(path)
    assert name in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="TorchScript program"):
        files.read(path)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.rand(2, 2), 0.1, 0, torch.qint8)
    refused(tmp_path, {"fc.weight": quantised}, r"quantised \(fc.weight\)")
    packed = {"fc.scale": torch.tensor(1.0), "fc._packed_params._packed_params": (quantised, None)}
    refused(tmp_path, packed, r"quantised \(fc\._packed_params")
    refused(tmp_path, {"fc.weight": torch.ones(2, 2, dtype=torch.int8)}, "quantised")
    refused(tmp_path, {"fc.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "quantised")
    refused(tmp_path, {"fc.qweight": torch.ones(2, 2, dtype=torch.int32)}, "quantised")
    save_file({"w": torch.ones(2, 2).to(torch.float8_e5m2)}, tmp_path / "in.safetensors")
    with pytest.raises(InputError, match="quantised"):
        files.read(tmp_path / "in.safetensors")


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    bad = {name: value.clone() for name, value in STATE.items()}
    bad["0.weight"][0, 0, 0, 0] = float("nan")
    bad["3.bias"][0] = float("inf")
    refused(tmp_path, bad, r"NaN or infinite weights in 0\.weight, 3\.bias; the training diverged")
    save_file(bad, tmp_path / "in.safetensors")
    with pytest.raises(InputError, match="NaN or infinite"):
        files.read(tmp_path / "in.safetensors")


def test_odd_tensors_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, {"w": torch.eye(3).to_sparse()}, "w is a sparse or nested tensor")
    refused(tmp_path, {"w": torch.ones(2, dtype=torch.complex64)}, "w is no plain tensor")
    refused(tmp_path, {"w": torch.ones(2, device="meta")}, "w is no plain tensor")
    refused(tmp_path, {"w": torch.ones(1).expand(10**12)}, "claims 1,000,000,000,000 values and stores fewer")


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, b"", "is empty")
    refused(tmp_path, b"hello there, this is text", "neither a zip nor a pickle")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull")
    refused(tmp_path, {}, "state dict is empty")
    refused(tmp_path, {"state_dict": {}}, "state dict is empty")
    refused(tmp_path, [1, 2], "holds a list and no state dict")
    refused(tmp_path, {**STATE, "epoch": 3}, "among them, 'epoch', of type int; save the weights")
    refused(tmp_path, {0: torch.zeros(2)}, "a name that is no text, 0; save the weights")
    refused(tmp_path, {"generator": STATE, "critic": STATE}, r"several sets of weights \(generator, critic\)")
    refused(tmp_path, b"\x80\x02garbage", "cut or damaged")
    save_file({}, tmp_path / "in.safetensors")
    with pytest.raises(InputError, match="state dict is empty"):
        files.read(tmp_path / "in.safetensors")
    with pytest.raises(InputError, match="no such file"):
        files.read(tmp_path / "none.pt")
    with pytest.raises(InputError, match="its name must end in one of"):
        files.read(Path(__file__))
    with pytest.raises(InputError, match="is a folder"):
        files.read(tmp_path)


def test_a_file_of_the_other_kind_is_told(tmp_path: Path) -> None:
    save_file(dict(STATE), tmp_path / "in.safetensors")
    refused(tmp_path, (tmp_path / "in.safetensors").read_bytes(), r"name it in\.safetensors")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(InputError, match=r"not one that torch\.save wrote"):
        files.read(tmp_path / "other.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_cut_torch_file_is_refused_wherever_it_is_cut(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "in.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for kept in (1, 8, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match=r"in\.pt"):
            files.read(path)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(dict(STATE), path)
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-3],
        "cut in the header": whole[:40],
        "header length": struct.pack("<Q", 2**62) + whole[8:],
        "header text": whole[:9] + b"\xff\xff" + whole[11:],
        "only a length": whole[:8],
        "too long": whole + b"abc",
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no whole safetensors file"):
            files.read(path)


def test_damaged_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    """Every byte of the pickle and of the zip's directory, one after the other."""
    path = tmp_path / "in.pt"
    torch.save({"w": torch.ones(2)}, path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(InputError):
            files.read(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """torch.save stores them; a few kilobytes could unpack to all memory."""
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(InputError, match=r"compressed, as torch\.save never writes it"):
        files.read(tmp_path / "packed.pt")


def test_a_dictionary_that_holds_itself_many_times_is_walked_once(tmp_path: Path) -> None:
    knot: dict[str, Any] = {"epoch": 3}
    knot |= {f"key{number}": knot for number in range(400)}
    torch.save(knot, tmp_path / "knot.pt")
    with pytest.raises(InputError, match=r"knot.pt"):
        files.read(tmp_path / "knot.pt")
