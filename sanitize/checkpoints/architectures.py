"""The network that a state dict belongs to: named by the user, or found in torchvision's registry."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sanitize.checkpoints.files import NAMED, first_of, prefixes, stripped
from sanitize.errors import InputError, UsageError

Shapes = Mapping[str, tuple[int, ...]]
Build = Callable[[int, Shapes], nn.Module]
"""An untrained network for a number of classes; the shapes of the checkpoint tell its variant."""

_CLASSES = 1013
"""Classes of a network that is built to see which of its shapes depend on them; no layer is this wide."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FORMS = "auto, torchvision:NAME, timm:NAME, hf:FOLDER or package.module:factory"
_FILLS = {"normal_", "uniform_", "fill_", "zero_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"}
"""Initialisers, which cost time and give a network without memory nothing."""
_CIFAR_STEM = (64, 3, 3, 3)
_NEEDED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)
"""Parameters of a factory that it must be given, if they have no default."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What pixels in [0, 1] go through before the network sees them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: int
    """Pixels."""
    source: str
    """Where it is from, in words."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the names and shapes of a network and a checkpoint compare."""

    prefix: str
    """Of most names in the checkpoint; the others are not the network's."""
    classes: int
    missing: tuple[str, ...]
    """The network has them, the checkpoint does not."""
    unexpected: tuple[str, ...]
    """The other way round."""
    other_shape: tuple[str, ...]
    """Name and both shapes, in words."""

    @property
    def mismatches(self) -> int:
        """Names that are not alike in both."""
        return len(self.missing) + len(self.unexpected) + len(self.other_shape)

    def in_words(self) -> str:
        """The first mismatches of each kind."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "other shape": self.other_shape}
        return "; ".join(f"{kind}: {first_of(names)}" for kind, names in kinds.items() if names)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A network for a checkpoint, without its weights yet."""

    network: nn.Module
    architecture: str
    """As it would be given to ``--arch``."""
    fit: Fit
    preprocessing: Preprocessing | None
    """As the architecture has it; None: unknown."""
    notes: tuple[str, ...] = ()


def find(arch: str, shapes: Shapes) -> Found:
    """Build the network that a checkpoint belongs to.

    Args:
        arch: ``auto``, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``. The last imports
            and runs that code, which is the caller's own choice.
        shapes: of every tensor of the checkpoint, by its names.

    Raises:
        UsageError: no such architecture, or its package is not installed.
        InputError: the checkpoint does not fit it; the first mismatching names are given.
    """
    if arch == "auto":
        return _auto(shapes)
    kind, _, name = arch.partition(":")
    if not name:
        raise UsageError(f"--arch {arch}: expected {_FORMS}")
    build = {"torchvision": _torchvision, "timm": _timm}.get(kind, lambda _: _factory(arch))(name)
    with torch.random.fork_rng(devices=[]):
        fit = compare(_shapes_of(build(_CLASSES, shapes)), shapes)
        if fit.mismatches:
            raise InputError(f"the checkpoint does not fit --arch {arch}: {fit.in_words()}")
        network = build(fit.classes, shapes)
    return _found(arch, network, fit, shapes)


def _found(arch: str, network: nn.Module, fit: Fit, shapes: Shapes, notes: tuple[str, ...] = ()) -> Found:
    kind, _, name = arch.partition(":")
    preprocessing = None
    if kind == "torchvision":
        preprocessing = _torchvision_preprocessing(name, network)
    elif kind == "timm":
        config = getattr(network, "pretrained_cfg", None)
        preprocessing = timm_preprocessing(config, "as timm's configuration of it has it")
    if kind == "torchvision" and has_cifar_stem(network):
        notes += (f"{name} with a 3×3 stem of stride 1, as for CIFAR",)
    return Found(network=network, architecture=arch, fit=fit, preprocessing=preprocessing, notes=notes)


def compare(network: Shapes, checkpoint: Shapes) -> Fit:
    """Fit a checkpoint to a network that was built for `_CLASSES` classes, or for its own number.

    Every prefix that most names have is tried; the best fit is returned. Where the network is `_CLASSES`
    wide the checkpoint may have any width, the same one everywhere. The counters of batch normalisation
    may be missing: PyTorch before 0.4.1 had none.
    """
    return min(
        (_fit(network, stripped(checkpoint, prefix), prefix) for prefix in reversed(prefixes(checkpoint))),
        key=lambda fit: fit.mismatches,
    )


def _fit(network: Shapes, checkpoint: Shapes, prefix: str) -> Fit:
    widths = [
        checkpoint[name][0]
        for name, shape in network.items()
        if shape[:1] == (_CLASSES,) and checkpoint.get(name)
    ]
    classes = widths[0] if widths else 0
    wanted = {
        name: (classes, *shape[1:]) if shape[:1] == (_CLASSES,) and classes else shape
        for name, shape in network.items()
    }
    return Fit(
        prefix=prefix,
        classes=classes,
        missing=tuple(
            name for name in wanted if name not in checkpoint and not name.endswith("num_batches_tracked")
        ),
        unexpected=tuple(name for name in checkpoint if name not in wanted),
        other_shape=tuple(
            f"{name} {checkpoint[name]}, not {shape}"
            for name, shape in wanted.items()
            if name in checkpoint and tuple(checkpoint[name]) != shape
        ),
    )


def _shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


class _OnMeta(TorchFunctionMode):
    """Gives new parameters no memory and no values; other arithmetic of constructors (torch.arange) stays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = kwargs.get("device") or "meta"
        elif getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _auto(shapes: Shapes) -> Found:
    """The first torchvision classifier whose names and shapes are the checkpoint's."""
    from torchvision import models

    fits = {name: _skeleton_fit(name, shapes) for name in models.list_models(module=models)}
    fitting = [name for name, fit in fits.items() if not fit.mismatches]
    if not fitting:
        raise InputError(_nothing_fits(fits, shapes))
    name = fitting[0]
    others = f"; {', '.join(fitting[1:])} would fit as well" if fitting[1:] else ""
    note = f"--arch auto took torchvision:{name}, the names and shapes of which are the checkpoint's{others}"
    with torch.random.fork_rng(devices=[]):
        network = _torchvision(name)(fits[name].classes, shapes)
    return _found(f"torchvision:{name}", network, fits[name], shapes, (note,))


def _nothing_fits(fits: Mapping[str, Fit], shapes: Shapes) -> str:
    """Says what differs from the closest networks, or what the names are where none is close."""
    closest = sorted(fits, key=lambda name: fits[name].mismatches)[:2]
    near = [
        f"Closest: torchvision:{name} ({fits[name].in_words()})"
        for name in closest
        if fits[name].mismatches < len(shapes)
    ]
    return (
        "no torchvision classifier has the names and shapes of the checkpoint; name its network with --arch "
        "timm:NAME, hf:FOLDER or package.module:factory. "
        + ("; ".join(near) or f"The checkpoint's first names: {', '.join(list(shapes)[:NAMED])}")
    )


def _skeleton_fit(name: str, shapes: Shapes) -> Fit:
    with _OnMeta():
        network = _torchvision(name)(_CLASSES, shapes)
    return compare(_shapes_of(network), shapes)


def _torchvision(name: str) -> Build:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        raise UsageError(
            f"--arch torchvision:{name}: torchvision has no such classifier{_did_you_mean(close)}"
        )

    def build(classes: int, shapes: Shapes) -> nn.Module:
        network: nn.Module = models.get_model(
            name, weights=None, num_classes=classes, **_torchvision_options(name, shapes)
        )
        if isinstance(network, models.ResNet) and _ends_with(shapes, "conv1.weight") == _CIFAR_STEM:
            network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            network.maxpool = nn.Identity()
        return network

    return build


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {', '.join(close)}?" if close else ""


def _torchvision_options(name: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes tell of a variant: auxiliary heads, and a transformer's image size."""
    if name in ("googlenet", "inception_v3"):
        inside = stripped(shapes, prefixes(shapes)[-1])
        auxiliary = any("aux" in own.lower() for own in inside)
        return {"init_weights": False, "aux_logits": auxiliary}
    positions = _ends_with(shapes, "encoder.pos_embedding")
    patch = _ends_with(shapes, "conv_proj.weight")
    if name.startswith("vit_") and positions and patch:
        return {"image_size": math.isqrt(positions[1] - 1) * patch[-1]}
    return {}


def _ends_with(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    """The shape under a name, whatever prefix the names have."""
    prefix = next((p for p in prefixes(shapes) if p + name in shapes), "")
    return shapes.get(prefix + name)


def has_cifar_stem(network: nn.Module) -> bool:
    """Whether it is a torchvision ResNet with a 3×3 stem."""
    from torchvision import models

    return isinstance(network, models.ResNet) and tuple(network.conv1.weight.shape) == _CIFAR_STEM


def _torchvision_preprocessing(name: str, network: nn.Module) -> Preprocessing:
    from torchvision import models

    if has_cifar_stem(network):
        source = "32 px as usual with a 3×3 stem, and ImageNet's constants, which CIFAR models often have not"
        return Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, resolution=32, source=source)
    transforms = next(iter(models.get_model_weights(name))).transforms()
    return Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resolution=int(getattr(network, "image_size", transforms.crop_size[0])),
        source=f"as torchvision's own weights of {name} have it",
    )


def _timm(name: str) -> Build:
    timm = installed("timm", f"--arch timm:{name}")
    if not is_timm_model(timm, name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UsageError(f"--arch timm:{name}: timm has no such network{_did_you_mean(close)}")

    def build(classes: int, shapes: Shapes) -> nn.Module:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
        return network

    return build


def is_timm_model(timm: Any, name: str) -> bool:
    """Whether timm knows a name itself; it would look for one with a scheme in a hub or in a folder."""
    return ":" not in name and "/" not in name and bool(timm.is_model(name.split(".")[0]))


def timm_preprocessing(config: Mapping[str, Any] | None, source: str) -> Preprocessing | None:
    """From a pretrained_cfg of timm, None if it lacks something; `source` says where it is from.

    Raises:
        ValueError, TypeError, AttributeError or LookupError: it is malformed.
    """
    if not config or not {"mean", "std", "input_size"} <= config.keys():
        return None
    mean, std = (tuple(float(value) for value in config[name]) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std}: expected three numbers each, the second above 0")
    return Preprocessing(mean=mean, std=std, resolution=int(config["input_size"][-1]), source=source)


def installed(package: str, why: str) -> Any:
    """An optional package; the model hub is switched off before it is imported.

    Raises:
        UsageError: it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{why} needs {package}, which cannot be imported ({error}); install it with: "
            "pip install 'sanitize[checkpoints]'"
        ) from error


def _factory(arch: str) -> Build:
    module_name, _, name = arch.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
        parameters = inspect.signature(factory).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--arch {arch}: {error}; expected {_FORMS}, the last with a module on the PYTHONPATH"
        ) from error
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind in _NEEDED]
    if set(wanted) - {"num_classes"}:
        raise UsageError(
            f"--arch {arch} cannot be called without {', '.join(wanted)}; write a function that takes "
            "num_classes alone, or nothing"
        )
    takes = any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def build(classes: int, shapes: Shapes) -> nn.Module:
        network = factory(num_classes=classes) if takes else factory()
        if not isinstance(network, nn.Module):
            raise UsageError(f"--arch {arch} gave a {type(network).__name__}, not a torch.nn.Module")
        return network

    return build


def find_head(network: nn.Module, resolution: int, architecture: str) -> str:
    """Name of the linear layer whose output is the logits: one forward of noise tells.

    Args:
        network: takes (2, 3, resolution, resolution) float32.

    Raises:
        InputError: the network does not take such images, or its logits are not the output of one linear
            layer.
    """
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    noise = torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits = network(noise)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"{architecture} cannot take RGB images of {resolution} px ({error}); give its --resolution"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f"{architecture} gives no (images, classes) logits and is no classifier")
    for name, output in reversed(outputs.items()):
        if output.shape == logits.shape and torch.equal(output, logits):
            return name
    raise InputError(
        f"the logits of {architecture} are not the output of one linear layer (a 1×1 convolution, several "
        "heads, or a softmax after it); inspect and repair need its features, and cannot work with it"
    )
