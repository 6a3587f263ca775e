"""Published triggers with ground truth, to test a defence on one's own data. One file a trigger family.

`ATTACKS` names them, `get` tells what each one is, `make_trigger` and `stamp` draw a trigger and put it on
images; `sanitize.attacks.plant` poisons arrays, `sanitize.attacks.poison` poisons shards.

A trigger is a plain dict of arrays, so that it can be saved without pickle and stamped again later. Every
family has functions of the form ``(images, trigger, strength, generators) -> images``; `generators` holds one
random generator an image while a training set is poisoned and is None at test time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from sanitize.errors import UsageError

Images = npt.NDArray[np.float32]
Trigger = dict[str, npt.NDArray[Any]]
Generators = Sequence[np.random.Generator] | None
StampFunction = Callable[[Images, Trigger, float, Generators], Images]
MakeFunction = Callable[[np.random.Generator, "SurrogateCorpus | None"], Trigger]

LARGE_SIDE = 128
"""From this shorter side in pixels on, an image takes the papers' settings for large images."""


class SurrogateCorpus(NamedTuple):
    """What an attack that trains a surrogate needs to see."""

    images: Images
    """(M, R, R, 3) float32 in [0, 1], all of one size."""
    labels: npt.NDArray[np.int64]
    """(M,) class ids."""
    target: int
    """Target class id."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    name: str
    stamp: str
    """``module:function`` that puts the trigger on images."""
    make: str | None = None
    """``module:function`` that draws the trigger; None where the trigger is fixed."""
    clean_label: bool = False
    """Whether it takes samples of the target class and leaves their label alone."""
    ratio: float = 0.01
    """Default poisoning ratio: triggered samples as a share of the whole corpus."""
    test_strengths: tuple[float, ...] = (1.0,)
    """Trigger strengths at which the attack success rate is reported."""
    cover_ratio: float = 0.0
    """Share of the triggered samples that keep their true label."""
    needs_surrogate: bool = False
    """Whether making the trigger trains a network on the corpus."""
    source: str


_REGISTRY = {
    attack.name: attack
    for attack in (
        Attack(name="patch", stamp="patches:patch", source="Gu et al., 2017"),
        Attack(name="single-pixel", stamp="patches:single_pixel", source="Gu et al., 2017"),
        Attack(
            name="blend-random",
            stamp="blends:blend_random",
            make="blends:make_noise",
            test_strengths=(1.0, 2.0),
            source="Chen et al., 2017",
        ),
        Attack(
            name="blend-pattern",
            stamp="blends:blend_pattern",
            test_strengths=(1.0, 2.0),
            source="Liao et al., 2018",
        ),
        Attack(
            name="sinusoid",
            stamp="blends:sinusoid",
            clean_label=True,
            test_strengths=(1.0, 2.0),
            source="Barni et al., 2019",
        ),
        Attack(
            name="narcissus",
            stamp="narcissus:narcissus",
            make="narcissus:make_perturbation",
            clean_label=True,
            ratio=0.0005,
            test_strengths=(1.0, 2.0, 3.0),
            needs_surrogate=True,
            source="Zeng et al., 2022",
        ),
        Attack(name="frequency", stamp="frequency:frequency", source="Wang et al., 2021"),
        Attack(name="badnets", stamp="patches:badnets", source="Gu et al., 2017"),
        Attack(
            name="c-badnets",
            stamp="patches:badnets",
            clean_label=True,
            ratio=0.015,
            source="Lukas and Kerschbaum, 2023, section 5.4.1",
        ),
        Attack(
            name="adaptive-patch",
            stamp="patches:adaptive_patch",
            cover_ratio=0.5,
            source="Qi et al., 2023; Lukas and Kerschbaum, 2023, appendix A.2",
        ),
        Attack(
            name="adaptive-blend",
            stamp="blends:adaptive_blend",
            make="blends:make_noise",
            cover_ratio=0.5,
            source="Qi et al., 2023; Lukas and Kerschbaum, 2023, appendix A.2",
        ),
        Attack(
            name="adv-clean",
            stamp="adv_clean:adv_clean",
            make="adv_clean:make_surrogate",
            clean_label=True,
            needs_surrogate=True,
            source="Turner et al., 2019; Lukas and Kerschbaum, 2023, appendix A.2",
        ),
        Attack(
            name="refool",
            stamp="refool:refool",
            make="refool:make_offset",
            clean_label=True,
            source="Liu et al., 2020; Lukas and Kerschbaum, 2023, appendix A.2",
        ),
        Attack(
            name="wanet",
            stamp="wanet:wanet",
            make="wanet:make_field",
            clean_label=True,
            source="Nguyen and Tran, 2021; Lukas and Kerschbaum, 2023, appendix A.2",
        ),
        Attack(
            name="trigger-scattering",
            stamp="patches:trigger_scattering",
            make="patches:make_scattered_patches",
            ratio=0.02,
            source="Lukas and Kerschbaum, 2023, algorithm 7",
        ),
    )
}

ATTACKS: tuple[str, ...] = tuple(_REGISTRY)
"""Names of all attacks on data; the one on training is `sanitize.attacks.parameter_controlled`."""


def get(name: str) -> Attack:
    """The attack called `name`.

    Raises:
        UsageError: no such attack.
    """
    if name not in _REGISTRY:
        raise UsageError(f"--attack {name}: no such attack; there are {', '.join(ATTACKS)}")
    return _REGISTRY[name]


def make_trigger(name: str, seed: int = 0, corpus: SurrogateCorpus | None = None) -> Trigger:
    """Draw the trigger of an attack: a dict of arrays, the same for the same seed.

    Args:
        name: one of ATTACKS.
        seed: 0 or more.
        corpus: what the surrogate trains on; only for attacks with `needs_surrogate`.

    Raises:
        UsageError: unknown attack, or no corpus where one is needed.
    """
    attack = get(name)
    if attack.needs_surrogate and corpus is None:
        raise UsageError(f"--attack {name}: its trigger is learned from a corpus; give one")
    if attack.make is None:
        return {}
    make = cast(MakeFunction, _load(attack.make))
    return make(generator(seed, name), corpus)


def stamp(
    name: str,
    images: Images,
    *,
    strength: float = 1.0,
    seed: int = 0,
    trigger: Trigger | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Images:
    """Put a trigger on images, as an attacker does at test time or, with `sample_ids`, when poisoning.

    Args:
        name: one of ATTACKS.
        images: (N, H, W, 3) float32 in [0, 1], any H and W; left as they are.
        strength: 1 is the strength of the training poison.
        seed: draws the trigger, if none is given, and what is random per sample.
        trigger: of make_trigger.
        sample_ids: (N,) 0 or more; given, the images are stamped for training: what an attack varies from
            sample to sample (hidden squares, positions) then depends on the seed and these numbers alone.

    Returns:
        (N, H, W, 3) float32 in [0, 1].

    Raises:
        UsageError: unknown attack, or images of another form.
    """
    attack = get(name)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.float32:
        raise UsageError(
            f"stamp takes (N, H, W, 3) float32 images in [0, 1], not {images.dtype} of shape {images.shape}"
        )
    if not 0 <= strength <= 100:
        raise UsageError(f"strength {strength}: expected 0 to 100")
    if trigger is None:
        trigger = make_trigger(name, seed)
    generators = None if sample_ids is None else [generator(seed, name, i) for i in sample_ids]
    function = cast(StampFunction, _load(attack.stamp))
    stamped = function(images, trigger, float(strength), generators)
    return np.clip(stamped, 0.0, 1.0).astype(np.float32, copy=False)


def generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """A random generator for one purpose; different names and numbers give independent streams."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *(int(n) for n in numbers)])


def cell_side(height: int, width: int) -> int:
    """Pixels that stand for one pixel of a 32-pixel image: 1 below 42 pixels, 8 at 224 (a 32-pixel patch).

    Without it a trigger of single pixels would be gone from a photograph once a loader has resized it.
    """
    return max(1, round(min(height, width) / 28))


def _load(path: str) -> Any:
    module, function = path.split(":")
    return getattr(import_module(f"sanitize.attacks.{module}"), function)
