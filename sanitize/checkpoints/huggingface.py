"""Folders as transformers saves them: local image classifiers, and what zero-shot folders share with them.

Configurations are read, code in a folder is never run, weights go through `files.read` alone, and the hub
is switched off for the process.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sanitize.checkpoints.architectures import (
    Fit,
    Preprocessing,
    installed,
    is_timm_model,
    timm_preprocessing,
)
from sanitize.checkpoints.files import StateFile, prefixes, stripped
from sanitize.errors import InputError

Restore = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""From the network's names and tensors to the file's."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENISERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)
"""What transformers raises on folders that it cannot use."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A network with its weights, and how they are called in the file."""

    network: nn.Module
    architecture: str
    """As it would be given to ``--arch``."""
    restore: Restore
    prefix: str
    """Of the names of the network's weights in the file, which the bare weights go without."""
    preprocessing: Preprocessing | None
    class_names: Sequence[str] | None
    notes: tuple[str, ...]


def image_classifier(folder: Path, file: StateFile) -> Assembled:
    """The network of a folder of AutoModelForImageClassification, with the weights of a file.

    Raises:
        UsageError: transformers is not installed.
        InputError: the folder has no configuration of an image classifier, or the weights do not fit it.
    """
    transformers = installed("transformers", f"--arch hf:{folder}")
    config = read_config(transformers, folder)
    if config.model_type == "timm_wrapper":
        _check_timm(folder, config)
    with quiet(f"{folder}: transformers cannot build an image classifier from its config.json"):
        with torch.device("meta"):
            kind = type(transformers.AutoModelForImageClassification.from_config(config))
    network, restore, prefix = with_weights(kind, config, file)
    network.register_forward_hook(_logits)
    return Assembled(
        network=network,
        architecture=f"hf:{folder}",
        restore=restore,
        prefix=prefix,
        preprocessing=read_preprocessing(folder, config),
        class_names=_class_names(config),
        notes=(f"{kind.__name__} as in {folder / 'config.json'}",),
    )


def _check_timm(folder: Path, config: Any) -> None:
    """Refuse what would make timm fetch something, or open another file by its own rules."""
    timm = installed("timm", f"--arch hf:{folder}")
    if not is_timm_model(timm, str(config.architecture)):
        raise InputError(f"{folder / 'config.json'}: timm has no network {config.architecture}")
    if (
        config.model_args
    ):  # a checkpoint_path among them is unpickled, by older versions of timm with all code
        raise InputError(
            f"{folder / 'config.json'}: its model_args ({', '.join(map(str, config.model_args))}) are not "
            "passed on to timm; give the file with the weights, and --arch package.module:factory"
        )


def _logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.logits


def weights_in(folder: Path, names: Sequence[str] = WEIGHTS) -> Path:
    """The file with the weights of a folder, safetensors before anything else.

    Raises:
        InputError: there is none, or they are in several files.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pieces = sorted(folder.glob("*.index.json"))
    if pieces:
        raise InputError(f"{pieces[0]}: weights in several files are not supported; save them in one")
    raise InputError(f"{folder} holds no weights; expected one of {', '.join(names)}")


def check_tokeniser(folder: Path, name: str) -> None:
    """Refuse a folder without the files of a tokeniser, for which transformers would make an empty one.

    Raises:
        InputError: there are none.
    """
    if not any((folder / own).is_file() for own in _TOKENISERS):
        raise InputError(
            f"{folder} holds no tokeniser ({', '.join(_TOKENISERS)}); put that of {name} into it, as "
            "tokenizer.save_pretrained writes it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        InputError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no {path.name}; give the folder as it was saved") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def read_config(transformers: Any, folder: Path) -> Any:
    """The configuration of a folder, without code of its own and without kernels from the hub.

    Raises:
        InputError: there is none that transformers knows, or it is of a quantised model.
    """
    if "quantization_config" in read_json(folder / "config.json"):
        raise InputError(f"{folder} is quantised, and cannot be tuned; give the float model it was made from")
    with quiet(f"{folder / 'config.json'} is of no model that transformers knows without running its code"):
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )


def with_weights(kind: Any, config: Any, file: StateFile) -> tuple[Any, Restore, str]:
    """A transformers model with the tensors of a file in float32, the way back, and the names' prefix.

    Names of older versions of transformers are translated by it, both ways.

    Raises:
        InputError: names or shapes do not fit, or cannot be translated back.
    """
    tries = [
        (prefix, *_with_weights(kind, config, stripped(file.tensors, prefix)))
        for prefix in prefixes(file.tensors)
    ]
    prefix, model, fit = min(tries, key=lambda attempt: attempt[2].mismatches)
    if fit.mismatches:
        raise InputError(f"{file.path} does not fit {kind.__name__}: {fit.in_words()}")
    revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion

    def restore(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {prefix + name: value for name, value in revert(model, dict(state)).items()}

    back = restore(model.state_dict())
    lost = tuple(
        name
        for name, value in file.tensors.items()
        if name in back and not torch.equal(back[name], value.to(back[name].dtype))
    )
    if lost:
        raise InputError(
            f"{file.path}: {lost[0]} is changed by transformers on loading, and could not be put back"
        )
    return model.eval(), restore, prefix


def _with_weights(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[Any, Fit]:
    state = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in tensors.items()
    }
    with (
        quiet(f"transformers cannot load the weights into {kind.__name__}"),
        torch.random.fork_rng(devices=[]),
    ):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    fit = Fit(
        prefix="",
        classes=0,
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        other_shape=tuple(
            f"{name} {tuple(found)}, not {tuple(wanted)}"
            for name, found, wanted in sorted(info["mismatched_keys"], key=str)
        ),
    )
    return model, fit


def read_preprocessing(folder: Path, config: Any) -> Preprocessing | None:
    """What preprocessor_config.json says, or timm's part of config.json; None where there is neither.

    A rescaling other than 1/255 and an offset are worked into mean and std.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        named = f"pretrained_cfg of {folder / 'config.json'}"
        try:
            return timm_preprocessing(getattr(config, "pretrained_cfg", None), f"as {named} has it")
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise InputError(
                f"{named} is malformed ({error}); give --mean, --std and --resolution"
            ) from error
    values = read_json(path)
    scale = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    offset = 1.0 if values.get("rescale_offset") else 0.0
    normalises = values.get("do_normalize", True)
    mean = values.get("image_mean", [0.5] * 3) if normalises else [0.0] * 3
    std = values.get("image_std", [0.5] * 3) if normalises else [1.0] * 3
    resolution = _side(values.get("crop_size") if values.get("do_center_crop") else None)
    resolution = resolution or _side(values.get("size")) or _side(getattr(config, "image_size", None))
    if resolution is None:
        raise InputError(f"{path} gives no image size; give --resolution, --mean and --std")
    return Preprocessing(
        mean=tuple((float(value) + offset) / scale for value in mean),
        std=tuple(float(value) / scale for value in std),
        resolution=resolution,
        source=f"as {path} has it",
    )


def _side(size: Any) -> int | None:
    """Pixels of a square; {"height": h, "width": w}, {"shortest_edge": s} and plain numbers."""
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    return int(size) if isinstance(size, int | float) else None


def _class_names(config: Any) -> list[str] | None:
    """Labels in the order of the head, None where they are placeholders."""
    labels = dict(config.id2label or {})
    names = [str(labels[number]) for number in sorted(labels)]
    placeholders = [f"LABEL_{number}" for number in range(len(names))]
    return None if names == placeholders or not names else names


@contextmanager
def quiet(what: str) -> Iterator[None]:
    """Silence progress bars and advice of other packages, and turn their errors into one that begins so."""
    transformers_logging = importlib.import_module("transformers.utils.logging")
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    disabled = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        yield
    except _BROKEN as error:
        lines = str(error).strip().splitlines()
        raise InputError(f"{what}: {lines[0][:300] if lines else type(error).__name__}") from error
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
