"""From a path and a few options to a classifier, and back to a file: the story of loading.

Read the tensors (`files`), build the network they belong to and put them in (`architectures`, or
`huggingface` and `clip` for folders), choose the preprocessing, find the head, and keep what saving takes.
Nothing is downloaded, and nothing in a checkpoint is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sanitize.checkpoints import architectures, clip, files, huggingface
from sanitize.checkpoints.architectures import Preprocessing
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.files import StateFile
from sanitize.checkpoints.huggingface import Assembled
from sanitize.checkpoints.trusted import TrustedImages, load_trusted, logits_of, refuse_constant
from sanitize.config import _require
from sanitize.errors import InputError, UsageError
from sanitize.rundir import disk_errors, write_atomic

_NOT_COPIED = (*files.ENDINGS, ".h5", ".msgpack", ".onnx", ".pkl", ".tflite", ".index.json", ".py")
"""Files of a folder that are not copied beside repaired weights: other weights, and code."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which checkpoint, and what it does not say itself."""

    checkpoint: Path
    """A file, or a folder of transformers or open_clip."""
    arch: str = "auto"
    """``auto``, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER`` or ``package.module:factory``."""
    class_names: tuple[str, ...] | None = None
    """Labels in the order of the head; what a CLIP model is to tell apart."""
    prompts: tuple[str, ...] = (clip.PROMPT,)
    """For a CLIP model, with ``{}`` for the label."""
    mean: tuple[float, ...] | None = None
    """Of each channel, of pixels in [0, 1]; None: as the architecture has it."""
    std: tuple[float, ...] | None = None
    resolution: int | None = None
    """Pixels."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        for name, value in (("--mean", self.mean), ("--std", self.std)):
            _require(value is None or len(value) in (1, 3), f"{name}: expected three numbers, red first")
        _require(
            self.std is None or all(0 < value < math.inf for value in self.std),
            "--std: expected numbers above 0",
        )
        _require(
            self.mean is None or all(abs(value) <= 2 for value in self.mean),
            "--mean: expected those of pixels in [0, 1]",
        )
        _require(self.resolution is None or 8 <= self.resolution <= 4096, "--resolution: expected 8 to 4096")
        _require(bool(self.prompts), "--prompt: expected at least one")
        for prompt in self.prompts:
            _require("{}" in prompt, f"--prompt {prompt!r}: expected {{}} where the class name goes")
        _require(
            self.device in ("auto", "cpu", "cuda"), f"--device {self.device}: expected auto, cpu or cuda"
        )

    def words(self) -> list[str]:
        """The words of a command line that load the same: the checkpoint and what is not as by default."""
        words = [str(self.checkpoint)]
        if self.arch != "auto":
            words += ["--arch", self.arch]
        if self.class_names is not None:
            joined = ",".join(self.class_names)
            plain = joined.count(",") == len(self.class_names) - 1 and len(joined) <= 200
            words += ["--class-names", joined if plain else "NAMES.txt"]
        if self.prompts != (clip.PROMPT,):
            words += [word for prompt in self.prompts for word in ("--prompt", prompt)]
        for option, numbers in (("--mean", self.mean), ("--std", self.std)):
            if numbers is not None:
                words += [option, ",".join(f"{number:g}" for number in numbers)]
        if self.resolution is not None:
            words += ["--resolution", str(self.resolution)]
        if self.device != "auto":
            words += ["--device", self.device]
        return words


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A classifier, what was found out about it, and what writing it back takes."""

    classifier: Classifier
    """In eval mode, float32, on the device."""
    notes: tuple[str, ...]
    """Sentences for the report: what was taken, and why."""
    file: StateFile
    assembled: Assembled
    folder: Path | None
    """The folder that was given instead of a file."""


def load_classifier(config: LoadConfig) -> Loaded:
    """Read a checkpoint and build the classifier that it is.

    Raises:
        UsageError: options that make no sense, or an optional package that is not installed.
        InputError: a file that is unsafe, damaged, quantised or not finite, weights that do not fit the
            architecture, or a network without one linear layer for a head.
    """
    device = _device(config.device)
    folder = config.checkpoint if config.checkpoint.is_dir() else None
    file = files.read(_weights(config, folder))
    assembled = _assemble(config, folder, file)
    preprocessing, said = _preprocessing(config, assembled)
    head = architectures.find_head(
        assembled.network.float().eval(), preprocessing.resolution, assembled.architecture
    )
    classifier = Classifier(
        assembled.network,
        head=head,
        resolution=preprocessing.resolution,
        mean=preprocessing.mean,
        std=preprocessing.std,
        architecture=assembled.architecture,
        class_names=config.class_names or assembled.class_names,
    )
    notes = (*assembled.notes, said, *_file_notes(file, assembled))
    return Loaded(
        classifier=classifier.to(device), notes=notes, file=file, assembled=assembled, folder=folder
    )


def load_with_trusted(
    config: LoadConfig, shards: str, label: str, *, allow_pipe: bool = False
) -> tuple[Loaded, TrustedImages]:
    """A classifier and the trusted images, checked against each other; what both commands begin with.

    Args:
        shards: trusted images, in any form that a scan takes.
        label: ``cls``, ``txt`` or ``json:path.to.field``.

    Raises:
        UsageError, InputError: see `load_classifier`, `load_trusted` and `refuse_constant`.
    """
    loaded = load_classifier(config)
    trusted, left_out = load_trusted(shards, label, loaded.classifier, allow_pipe=allow_pipe)
    return settled(replace(loaded, notes=(*loaded.notes, *left_out)), trusted), trusted


def settled(loaded: Loaded, trusted: TrustedImages) -> Loaded:
    """The same, with what weights cannot tell as the trusted images decide it, and notes of that.

    Whether a ResNet with a 3×3 stem has its max-pool, and whether GoogLeNet and Inception normalise their
    inputs anew, as those of torchvision's own weights do.

    Raises:
        InputError: a network that tells nothing apart.
    """
    notes = list(loaded.notes)
    network = loaded.classifier.network
    if architectures.has_cifar_stem(network):
        pools = {
            "without max-pool": nn.Identity(),
            "with max-pool": nn.MaxPool2d(3, stride=2, padding=1),
        }
        notes.append(_settle(loaded.classifier, trusted, "maxpool", pools))
    if hasattr(network, "transform_input"):
        inputs = {"with ImageNet's normalisation": False, "with inputs from -1 to 1": True}
        notes.append(_settle(loaded.classifier, trusted, "transform_input", inputs))
    notes += refuse_constant(loaded.classifier, trusted)
    return replace(loaded, notes=tuple(notes))


def _settle(classifier: Classifier, trusted: TrustedImages, name: str, choices: dict[str, Any]) -> str:
    """Give an attribute of the network the value that it is more accurate with; says which."""
    accuracy = {}
    for said, value in choices.items():
        setattr(classifier.network, name, value)
        right = logits_of(classifier, trusted).argmax(axis=1) == trusted.class_id
        accuracy[said] = float(right.mean())
    better = max(choices, key=accuracy.__getitem__)
    setattr(classifier.network, name, choices[better])
    compared = " and ".join(f"{value:.1%} {said}" for said, value in accuracy.items())
    return f"taken {better}: accuracy on the trusted images is {compared}"


def save(loaded: Loaded, state: Mapping[str, torch.Tensor], path: Path) -> list[Path]:
    """Write a checkpoint back in the form that it came in, with another state of its network.

    Same wrapping, names, order and dtypes; a tensor that did not change keeps its very bits. A torch file
    gets the bare weights as safetensors beside it. A folder gives a folder: its small files are copied,
    other weights and code are not. The original is never written to.

    Args:
        state: of `loaded.classifier.network` or of a copy of it; names that are left out stay as they were.
        path: the new file or, where a folder was loaded, the new folder.

    Returns:
        The files with weights that were written.

    Raises:
        UsageError: `path` is the checkpoint itself, or its ending is of another format.
        SanitizeError: a value that the checkpoint's dtype cannot hold, or a full disk.
    """
    values = loaded.assembled.restore(state)
    if loaded.folder is None:
        return files.write(loaded.file, values, path, loaded.assembled.prefix)
    if path.resolve() == loaded.folder.resolve():
        raise UsageError(f"--out {path} is the checkpoint's own folder; give another")
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file; {loaded.folder} is a folder, and so is what is written")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for own in sorted(loaded.folder.iterdir()):
            if own.is_file() and not own.name.lower().endswith(_NOT_COPIED):
                write_atomic(path / own.name, own.read_bytes())
    return files.write(loaded.file, values, path / loaded.file.path.name, loaded.assembled.prefix)


def check_output(loaded: Loaded, path: Path) -> None:
    """Refuse, before the work is done, a path that `save` would refuse after it.

    Raises:
        UsageError: see `save`.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"--out {path}: {above} is a file, not a folder; give another name")
    if loaded.folder is None:
        files.check_output(loaded.file, path)
        bare = path.with_suffix(".safetensors")
        if bare != path and bare.exists():
            raise UsageError(f"--out {path}: {bare} is there, and would be replaced; give another name")
    elif path.exists() and (not path.is_dir() or path.samefile(loaded.folder)):
        raise UsageError(f"--out {path}: expected a folder other than {loaded.folder}, or a new one")


def read_class_names(text: str) -> tuple[str, ...]:
    """Class names as ``--class-names`` takes them: ``a,b,c``, or a text file with one a line.

    Raises:
        UsageError: a name is empty or there twice, or a file cannot be read.
    """
    path = Path(text)
    is_file = "," not in text and path.is_file()
    try:
        pieces = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {text}: cannot be read ({error})") from error
    names = tuple(piece.strip() for piece in pieces)
    if is_file and names and not names[-1]:
        names = names[:-1]
    if not names or "" in names:
        raise UsageError(f"--class-names {text}: an empty name; expected a,b,c or a file with one a line")
    if len(names) == 1:
        raise UsageError(f"--class-names {text}: one name, and no such file; expected a,b,c or a file")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--class-names: {twice[0]!r} is there twice; a label could mean either")
    return names


def _device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _weights(config: LoadConfig, folder: Path | None) -> Path:
    """The file that the tensors are read from."""
    if folder is None:
        return config.checkpoint
    if clip.is_clip_folder(folder):
        return clip.weights_of(folder)
    if (folder / "config.json").is_file():
        return huggingface.weights_in(folder)
    raise InputError(
        f"{folder} holds neither config.json nor {clip.OPEN_CLIP_CONFIG}; give the file with the weights, "
        "or a folder that transformers or open_clip saved"
    )


def _assemble(config: LoadConfig, folder: Path | None, file: StateFile) -> Assembled:
    """The network with its weights: of a folder, or of an architecture."""
    if config.arch.startswith("hf:"):
        described = Path(config.arch.removeprefix("hf:"))
    elif folder is not None and config.arch == "auto":
        described = folder
    elif folder is not None:
        raise UsageError(f"--arch {config.arch}: {folder} says itself what it is; leave --arch out")
    else:
        return _of_architecture(config.arch, file)
    if clip.is_clip_folder(described):
        return clip.zero_shot(described, file, config.class_names, config.prompts)
    return huggingface.image_classifier(described, file)


def _of_architecture(arch: str, file: StateFile) -> Assembled:
    found = architectures.find(arch, file.shapes())
    prefix = found.fit.prefix
    found.network.float().load_state_dict(files.stripped(file.tensors, prefix), strict=False)
    return Assembled(
        network=found.network,
        architecture=found.architecture,
        restore=lambda state: {prefix + name: value for name, value in state.items()},
        prefix=prefix,
        preprocessing=found.preprocessing,
        class_names=None,
        notes=found.notes,
    )


def _preprocessing(config: LoadConfig, assembled: Assembled) -> tuple[Preprocessing, str]:
    """What was given, else what is known of the architecture; and a sentence about it."""
    known = assembled.preprocessing
    if known is None and config.resolution is None:
        raise UsageError(
            f"{assembled.architecture} does not say what images it takes; give --resolution, and --mean and "
            "--std unless it was trained with ImageNet's"
        )
    chosen = Preprocessing(
        mean=_three(config.mean or (known.mean if known else architectures.IMAGENET_MEAN)),
        std=_three(config.std or (known.std if known else architectures.IMAGENET_STD)),
        resolution=config.resolution or (known.resolution if known else 0),
        source=known.source if known else "ImageNet's constants, for want of others",
    )
    given = [
        option
        for option, value in (
            ("--mean", config.mean),
            ("--std", config.std),
            ("--resolution", config.resolution),
        )
        if value is not None
    ]
    source = f"from {', '.join(given)}" if given else ""
    if len(given) < 3:
        source += f"{', the rest ' if given else ''}{chosen.source}"
    rounded = [", ".join(f"{value:.4g}" for value in values) for values in (chosen.mean, chosen.std)]
    sentence = f"preprocessing: {chosen.resolution} px, mean {rounded[0]}, std {rounded[1]} ({source})"
    return chosen, sentence


def _three(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values


def _file_notes(file: StateFile, assembled: Assembled) -> list[str]:
    notes = []
    if file.where:
        notes.append(f"the weights are those under {'.'.join(file.where)} in {file.path.name}")
    copies = files.copies(file, assembled.prefix)
    if copies:
        notes.append(
            f"{file.path.name} holds the same weights under {', '.join(copies)} as well, not looked at; a "
            "repair writes the repaired ones there too"
        )
    if assembled.prefix:
        notes.append(f'the names begin with "{assembled.prefix}", which is put back on saving')
    others = files.outside(file.tensors, assembled.prefix)
    if others:
        notes.append(
            f"not taken for the network's, and saved as they are: {files.first_of(others)}; if the network "
            "needs them, name it with --arch"
        )
    dtypes = sorted(
        {str(v.dtype).removeprefix("torch.") for v in file.tensors.values() if v.is_floating_point()}
    )
    if dtypes != ["float32"]:
        notes.append(f"stored in {', '.join(dtypes)}, worked on in float32, saved as stored")
    return notes
